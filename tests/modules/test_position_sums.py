"""Position adapters scaled, summed and stacked: the UNet's output is what the sum of the adapters' functions gives."""

import pytest
import torch

from ldm.errors import InputError
from ldm.interchange import position
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.helpers import assert_close_to

torch.set_num_threads(1)
SMALL = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
    "num_res_blocks": 1, "channel_mult": [1], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 24,
}  # fmt: skip


def unet(seed=0, **adapters) -> UNetModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNetModel(**SMALL).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * max(parameter[0].numel(), 1) ** -0.5
        torch.manual_seed(seed)
        from ldm.modules.adapters import attach_adapters

        attach_adapters(model, adapters)
    return model


def saved(tmp_path, seed, kind="transformer_adp_config", **entry):
    entry = {"din": "attn2o", "dout": "ffni", "mid_dim": 4, "method": "relu", "init": "default", **entry}
    unet(seed, **{kind: entry}).requires_grad_(False).save_adapter_to_dir(tmp_path / str(seed))
    return tmp_path / str(seed)


def output(*folders, strengths=None):
    model = unet()
    for number, path in enumerate(folders):
        model.load_adapter_from_dir(path, (strengths or [1.0] * len(folders))[number], add=number > 0)
    generator = torch.Generator().manual_seed(9)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    return model(x, torch.tensor([3, 500]), context)


@pytest.mark.parametrize("together", [position.summed, position.stacked])
def test_a_sum_is_the_sum_of_the_functions(tmp_path, together):
    one, two = saved(tmp_path, 1, scale=0.5), saved(tmp_path, 2, mid_dim=6)
    position.write(tmp_path / "both", together([position.read(one), position.read(two)], [0.7, -0.4]))
    expected = output(one, two, strengths=[0.7, -0.4])
    assert (expected - output()).abs().max() > 1e-2 * expected.abs().max()
    assert_close_to(output(tmp_path / "both"), expected, 1e-5)
    if together is position.summed:
        [entry] = position.read(tmp_path / "both")[0]["adapters"]
        assert entry["mid_dim"] == 10


def test_averaging_tensors_would_be_wrong(tmp_path):
    one, two = (position.read(saved(tmp_path, seed)) for seed in (1, 2))
    position.write(tmp_path / "mean", (one[0], {n: (one[1][n] + two[1][n]) / 2 for n in one[1]}))
    expected = output(tmp_path / "1", tmp_path / "2", strengths=[0.5, 0.5])
    assert (output(tmp_path / "mean") - expected).abs().max() > 1e-3 * expected.abs().max()


def test_scaling(tmp_path):
    position.write(tmp_path / "half", position.scaled(position.read(saved(tmp_path, 1, scale=0.8)), 0.5))
    assert_close_to(output(tmp_path / "half"), output(tmp_path / "1", strengths=[0.5]), 1e-6)
    assert position.read(tmp_path / "half")[0]["adapters"][0]["scale"] == pytest.approx(0.4)


def test_residual_blocks_sum_while_their_norms_agree_and_stack_always(tmp_path):
    kind = "resblock_adp_config"
    one, two = (position.read(saved(tmp_path, seed, kind, din="resi", dout="reso")) for seed in (1, 2))
    position.write(tmp_path / "sum", position.summed([one, two], [1.0, 0.5]))
    assert_close_to(output(tmp_path / "sum"), output(tmp_path / "1", tmp_path / "2", strengths=[1.0, 0.5]), 1e-5)
    moved = {name: value + 1 if name.endswith("adapter.0.bias") else value for name, value in two[1].items()}
    with pytest.raises(InputError, match="different norms"):
        position.summed([one, (two[0], moved)], [1.0, 0.5])
    position.write(tmp_path / "stack", position.stacked([one, (two[0], moved)], [1.0, 0.5]))
    assert output(tmp_path / "stack").isfinite().all()


def test_refusals(tmp_path):
    one, two = saved(tmp_path, 1), saved(tmp_path, 2, dout="transo")
    with pytest.raises(InputError, match=r"different routes .*attn2o-ffni .*attn2o-transo"):
        position.summed([position.read(one), position.read(two)], [1, 1])
    config, tensors = position.read(two)
    with pytest.raises(InputError, match="different base models"):
        position.stacked([position.read(one), ({**config, "base_fingerprint": "other"}, tensors)], [1, 1])
    (one / "adapter_config.json").unlink()
    torch.save({"adp.0.weight": torch.zeros(1)}, one / "x.pt")
    (one / "adapters.safetensors").unlink()
    with pytest.raises(InputError, match="does not name its routes"):
        position.read(one)
