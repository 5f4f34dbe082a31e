"""Singular values, criteria for ranks and block weights, each against a direct computation."""

import pytest
import torch

from ldm.errors import InputError
from ldm.interchange import blocks, resize
from ldm.interchange.lora import Factors, Lora, delta
from ldm.interchange.resize import Cut
from tests.helpers import assert_close_to

torch.set_num_threads(1)


def random_change(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 8, 3, 3), (32, 32, 1, 1)])
def test_the_decomposition_is_that_of_a_whole_svd(shape):
    change = random_change(*shape)
    u, s, vh = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    found = resize.of_change(change)
    assert_close_to(found.s, s.float(), 1e-6)
    for rank in (1, 5, len(s)):
        best = (u[:, :rank] * s[:rank] @ vh[:rank]).reshape(shape)
        assert_close_to(delta(resize.cut(found, rank, shape)), best.float(), 1e-5)


@pytest.mark.parametrize("shape", [(150, 400), (400, 150), (90, 20, 3, 3)])
@pytest.mark.parametrize("fall", [0, 4])
def test_the_leading_values_leave_out_as_little_as_a_whole_svd(shape, fall):
    """A flat spectrum, where nothing separates the values, and one that falls by orders of magnitude to zero."""
    change = random_change(*shape)
    u, s, vh = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    if fall:
        s = torch.logspace(0, -fall, len(s), dtype=torch.float64) * (torch.arange(len(s)) < 20)
    change = (u * s @ vh).reshape(shape).float()
    whole = change.flatten(1).double()
    for rank in (4, 20):
        found = resize.leading(change, rank)
        assert len(found.s) == len(s) and found.u.shape[1] == rank + resize.OVERSAMPLED < len(s)
        least, ours = s[rank:].norm(), (delta(resize.cut(found, rank, shape)).flatten(1).double() - whole).norm()
        assert ours <= least * (1 + 1e-5) + 1e-6 * whole.norm()
        assert_close_to(found.s[:rank], s[:rank].float(), 1e-5)


def test_a_change_of_low_rank_has_no_more_values_than_that():
    """Values below what fp32 holds are zero, with finite vectors; a zero change has none."""
    found = resize.of_change(random_change(30, 3) @ random_change(3, 50, seed=1))
    assert (found.s > 0).sum() == 3 and all(value.isfinite().all() for value in found)
    nothing = resize.of_change(torch.zeros(6, 9))
    assert not any(value.any() for value in (nothing.s, nothing.vh))
    assert Cut(4, criterion="sv_fro", target=0.9).of(nothing.s) == 1 and Cut(4).of(nothing.s) == 4


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (Cut(3), 3),
        (Cut(conv_rank=2, rank=3), {1: 3, 3: 2}),
        (Cut(criterion="sv_ratio", target=4.0), 3),  # 8, 4, 2.5 are above 8 / 4
        (Cut(criterion="sv_fro", target=0.9), 2),  # 64 + 16 of 64 + 16 + 6.25 + 4 + 1 = 91.25: 0.936 of the norm
        (Cut(criterion="sv_fro", target=0.83), 1),  # 8 of 9.55
        (Cut(criterion="sv_cumulative", target=0.8), 3),  # 8, 12, 14.5 of 17.5
        (Cut(2, criterion="sv_cumulative", target=0.8), 2),
        (Cut(criterion="sv_fro", target=1.0), 5),
    ],
)
def test_criteria(cut, expected, kernel):
    """Factors with known singular values, which a rotation hides."""
    values = torch.tensor([8.0, 4.0, 2.5, 2.0, 1.0])
    left = torch.linalg.qr(random_change(20, 5))[0]
    right = torch.linalg.qr(random_change(6 * kernel**2, 5, seed=1))[0]
    mix = torch.linalg.qr(random_change(5, 5, seed=2))[0]
    factors = Factors((mix.T @ right.T).reshape(5, 6, kernel, kernel), (left * values @ mix)[..., None, None], 0.25)
    small, share = resize.resized(factors, cut)
    rank = expected[kernel] if isinstance(expected, dict) else expected
    assert small.rank == rank and small.scale == 0.25
    best = 0.25 * (left[:, :rank] * values[:rank] @ right.T[:rank])
    assert_close_to(delta(small).flatten(1), best, 1e-5)
    assert share == pytest.approx((values[:rank].square().sum() / values.square().sum()).sqrt().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "expected a rank of at least 1, got 0"),
        ({"criterion": "sv_ratio", "target": 0.5}, "sv_ratio: expected a number of at least 1, got 0.5"),
        ({"criterion": "sv_fro", "target": 1.5}, "sv_fro: expected a share above 0, up to 1, got 1.5"),
        ({"criterion": "sv_fro", "target": float("nan")}, "sv_fro: expected a share"),
    ],
)
def test_cuts_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        Cut(**settings)


UNET = "model.diffusion_model."
LAYERS = {
    "BASE": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
    "IN01": UNET + "input_blocks.1.1.proj_in",
    "IN08": UNET + "input_blocks.8.1.transformer_blocks.0.attn1.to_q",
    "M00": UNET + "middle_block.1.proj_in",
    "OUT03": UNET + "output_blocks.3.1.proj_in",
    "OUT11": UNET + "output_blocks.11.1.proj_in",
}


def test_block_weights():
    lora = Lora({name: Factors(torch.ones(1, 2), torch.ones(2, 1), 0.5) for name in LAYERS.values()}, {"<s>": 1})
    assert {block: blocks.block_of(name) for block, name in LAYERS.items()} == {block: block for block in LAYERS}
    assert blocks.block_of(UNET + "time_embed.0") == blocks.block_of(UNET + "out.2") == "BASE"
    numbers = ",".join(map(str, range(17)))
    found = blocks.weighted(lora, blocks.parse(numbers))
    scales = {block: found.layers[name].scale if name in found.layers else 0 for block, name in LAYERS.items()}
    assert scales == {"BASE": 0, "IN01": 0.5, "IN08": 3.0, "M00": 3.5, "OUT03": 4.0, "OUT11": 8.0}
    assert found.tokens == lora.tokens
    counted = blocks.parse(",".join(map(str, range(26))))
    assert (counted["BASE"], counted["IN00"], counted["IN11"], counted["M00"], counted["OUT00"]) == (0, 1, 12, 13, 14)


# A1111's extension, by its 17 numbers
OF_THE_EXTENSION = {
    "INS": "1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL": ",".join("1" * 17),
    "NONE": ",".join("0" * 17),
    "ALL0.5": ",".join(["0.5"] * 17),
}


@pytest.mark.parametrize("name", blocks.PRESETS)
def test_presets_are_those_of_the_extension(name):
    numbers = blocks.parse(OF_THE_EXTENSION[name])
    assert {block: blocks.parse(name.lower())[block] for block in numbers} == numbers


@pytest.mark.parametrize("text", ["1,2,3", "SOME", "", ",".join(["nan"] * 17)])
def test_block_weights_that_cannot_be_read(text):
    with pytest.raises(InputError, match="expected 12, 17, 20, 26 numbers joined by commas, or one of NONE, ALL"):
        blocks.parse(text)


def test_blocks_without_a_weight_are_not_dropped_in_silence():
    lora = Lora({UNET + "input_blocks.3.0.op": Factors(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(
        InputError, match="17 block weights have none for IN03, which the LoRA changes: give 20 numbers"
    ):
        blocks.weighted(lora, blocks.parse(",".join("1" * 17)))
