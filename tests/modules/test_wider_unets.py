"""The UNets of Stable Diffusion 2.x, its inpainting model and SDXL against the published ones; their parameters."""

import pytest
import torch

from ldm.config import get_obj_from_str
from ldm.errors import InputError
from ldm.models.building import reinit_zero_layers
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.helpers import assert_close_to
from tests.reference import index, tensors

TINY = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [2, 1],
    "channel_mult": [1, 2], "num_head_channels": 16, "context_dim": 12, "use_linear_in_transformer": True,
}  # fmt: skip


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def built(golden, request):
    folder = golden / request.param
    unet = UNetModel(**index(folder)["unet"]["constructor"]).eval().requires_grad_(False)
    unet.load_state_dict(tensors(folder / "unet.safetensors"))
    return request.param, unet, tensors(folder / "unet_io.safetensors"), folder


def test_outputs_and_every_block(built):
    _, unet, io, _ = built
    seen = {}
    names = [name.removeprefix("mid.") for name in io if name.startswith("mid.")]
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name in names
        if name != "emb"
    ]
    labels = (io["y"],) if "y" in io else ()
    assert_close_to(unet(io["x"], io["timesteps"], io["context"], *labels), io["out"])
    seen.clear()
    unet(io["x"][:1], io["timesteps"][:1], io["context"][:1], *(y[:1] for y in labels))
    for hook in hooks:
        hook.remove()
    for name, value in seen.items():
        assert_close_to(value.reshape(io[f"mid.{name}"].shape), io[f"mid.{name}"])


def test_other_sizes_and_times(built):
    name, unet, io, folder = built
    if name == "sd2":
        for kind in ("nonsquare", "float_t"):
            t = io["timesteps_float" if kind == "float_t" else "timesteps_nonsquare"]
            assert_close_to(unet(io[f"x_{kind}"], t, io[f"context_{kind}"]), io[f"out_{kind}"])
        return
    conditions = tensors(folder / "conditioner_io.safetensors")
    for out, side in (("out_nonsquare", "cond"), ("out_uncond_zero", "uncond_zero")):
        context, vector = (conditions[f"{side}.{kind}"][1:2] for kind in ("crossattn", "vector"))
        assert_close_to(unet(io["x_nonsquare"], io["timesteps_nonsquare"], context, vector), io[out])


def test_the_inpainting_unet(golden):
    folder = golden / "sd2"
    unet = UNetModel(**index(folder)["unet"]["constructor"] | {"in_channels": 9}).eval().requires_grad_(False)
    unet.load_state_dict(
        tensors(folder / "unet.safetensors") | tensors(folder / "unet_inpainting_first_conv.safetensors")
    )
    io = tensors(folder / "unet_io.safetensors")
    x = torch.cat([io["x"], io["concat_mask"], io["concat_masked_latents"]], dim=1)
    assert_close_to(unet(x, io["timesteps"], io["context"]), io["out_inpainting"])
    x = torch.cat([io["x_nonsquare"], io["concat_nonsquare"]], dim=1)
    expected = io["out_inpainting_nonsquare"]
    assert_close_to(unet(x, io["timesteps_nonsquare"], io["context_nonsquare"]), expected)


def test_published_parameters_are_accepted():
    ldm = UNetModel(
        **TINY, image_size=32, use_spatial_transformer=True, use_fp16=True, use_checkpoint=True, legacy=False
    )
    sgm = get_obj_from_str("sgm.modules.diffusionmodules.openaimodel.UNetModel")(
        **TINY, spatial_transformer_attn_type="softmax-xformers", use_checkpoint=True
    )
    assert ldm.state_dict().keys() == sgm.state_dict().keys()
    assert ldm.state_dict()["middle_block.1.proj_in.weight"].shape == (64, 64)


def depths(unet):
    names = {name.split(".transformer_blocks")[0] for name in unet.state_dict() if ".transformer_blocks." in name}
    return {name: len(unet.get_submodule(name).transformer_blocks) for name in sorted(names)}


def test_parameters_per_level():
    assert depths(UNetModel(**TINY, transformer_depth=[1, 3])) == {
        "input_blocks.1.1": 1, "input_blocks.3.1": 3, "middle_block.1": 3,
        "output_blocks.0.1": 3, "output_blocks.1.1": 3, "output_blocks.2.1": 1, "output_blocks.3.1": 1,
    }  # fmt: skip
    assert depths(UNetModel(**TINY, transformer_depth=2, transformer_depth_middle=1))["middle_block.1"] == 1
    assert "middle_block.1" not in depths(UNetModel(**TINY, disable_middle_transformer=True))
    one = UNetModel(**{**TINY, "num_res_blocks": [2, 1]}, num_attention_blocks=[1, 0])
    assert set(depths(one)) == {"input_blocks.1.1", "middle_block.1", "output_blocks.2.1"}
    crossed = UNetModel(**TINY, disable_self_attentions=[True, False]).eval()
    widths = {name: value.shape[1] for name, value in crossed.state_dict().items() if "attn1.to_k" in name}
    assert widths["input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"] == 12
    assert widths["input_blocks.3.1.transformer_blocks.0.attn1.to_k.weight"] == 64
    assert crossed(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, 12)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("labels", "y"),
    [
        ({"num_classes": 10}, torch.tensor([1, 2])),
        ({"num_classes": "continuous"}, torch.rand(2, 1)),
        ({"num_classes": "timestep"}, torch.tensor([10.0, 500.0])),
        ({"num_classes": "sequential", "adm_in_channels": 6}, torch.rand(2, 6)),
    ],
)
def test_labels_act_and_are_needed(labels, y):
    torch.manual_seed(0)
    unet = UNetModel(**TINY, **labels).eval().requires_grad_(False)
    reinit_zero_layers(unet)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 7, 12)
    assert not torch.allclose(unet(x, t, context, y)[0], unet(x, t, context, y.flip(0))[0])
    with pytest.raises(InputError, match="y are missing"):
        unet(x, t, context)
    with pytest.raises(InputError, match="y is for 1 samples, the batch has 2"):
        unet(x, t, context, y[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": "sequential"}, "needs adm_in_channels"),
        (
            {"num_classes": "many"},
            "num_classes must be a number or one of continuous, timestep, sequential, got 'many'",
        ),
        ({"transformer_depth": [1, 2, 3]}, "transformer_depth has 3 entries, channel_mult has 2"),
        ({"context_dim": [12, 16]}, "context_dim must be one width"),
        ({"spatial_transformer_attn_type": "linear"}, "must be softmax or softmax-xformers, got 'linear'"),
        ({"use_spatial_transformer": False}, "use_spatial_transformer and context_dim go together"),
    ],
)
def test_what_contradicts_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        UNetModel(**{**TINY, **change})


def test_vectors_of_another_width_and_unasked_ones_are_refused():
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, 12)
    with pytest.raises(InputError, match=r"y has shape \[1, 5\], this UNet takes vectors \[1, 6\]"):
        UNetModel(**TINY, num_classes="sequential", adm_in_channels=6)(x, t, context, torch.zeros(1, 5))
    with pytest.raises(InputError, match="no num_classes"):
        UNetModel(**TINY)(x, t, context, torch.zeros(1, 5))
