"""Prompts as web UIs write them: weights and windows."""

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import cut_words, encode, weighted_parts, window_count
from tests.conftest import ROOT
from tests.helpers import assert_close_to


@pytest.fixture(scope="module")
def encoder():
    return FrozenCLIPEmbedder(str(ROOT / "models/sd-mini/clip"), max_length=32)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a ((red)) [cat]", [("a ", 1), ("red", 1.21), (" ", 1), ("cat", 1 / 1.1)]),
        ("(a (red:1.5) cat:0.5)", [("a ", 0.5), ("red", 0.75), (" cat", 0.5)]),
        (r"a \(red\) cat", [("a (red) cat", 1)]),
        ("a (red cat", [("a ", 1), ("red cat", 1.1)]),
        ("12:30 o'clock)", [("12:30 o'clock)", 1)]),
        ("(x: y:2)", [("x: y", 2)]),
    ],
)
def test_weights_are_read(prompt, parts):
    found = weighted_parts(prompt)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])


def test_brackets_without_end_are_refused():
    with pytest.raises(InputError, match="more than 50 brackets"):
        weighted_parts("(" * 51)
    assert weighted_parts("(" * 50 + "a")[0].weight == pytest.approx(1.1**50)


@torch.no_grad()
def test_a_short_prompt_is_what_the_encoder_gives(encoder):
    prompts = ["a cat", "a dog on a red car"]
    assert torch.equal(encode(encoder, prompts), encoder(prompts))
    assert torch.equal(encode(encoder, prompts, weighted=True), encoder(prompts))


@torch.no_grad()
def test_long_prompts_take_windows(encoder):
    things = ("cat", "dog", "bird", "fish", "tree", "house", "car", "boat", "moon", "sun", "hat")
    long = " and ".join(f"a {thing}" for thing in things)
    assert window_count(encoder, ["a cat", long]) == 2
    states = encode(encoder, ["a cat", long])
    assert states.shape == (2, 64, encoder(["a"]).shape[-1])
    assert torch.equal(states[0], torch.cat([encoder(["a cat"])[0], encoder([""])[0]]))  # the second window is empty
    ids = encoder.tokens_of(long)
    second = encoder.encode_ids(encoder.with_markers([ids[30:]]))
    assert torch.equal(states[1, 32:], second[0])


@torch.no_grad()
def test_weights_scale_states_and_keep_their_mean(encoder):
    plain, heavy = encode(encoder, ["a red cat"]), encode(encoder, ["a (red:2) cat"], weighted=True)
    [red] = encoder.tokens_of("red") if len(encoder.tokens_of("red")) == 1 else [None]
    assert red is not None
    factors = torch.ones(32)
    factors[2] = 2.0
    scaled = plain * factors[None, :, None]
    assert_close_to(heavy, scaled * plain.mean() / scaled.mean(), 1e-5)
    assert heavy.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)


def test_what_a_single_window_cuts(encoder):
    words = [f"cat{i}" for i in range(40)]
    cut = cut_words(encoder, " ".join(words))
    kept = words[: len(words) - len(cut.split())]
    counts = [len(encoder.tokens_of(" ".join(words[: len(kept) + more]))) for more in (0, 1)]
    assert cut and counts[0] <= 30 < counts[1]
    assert cut_words(encoder, "a cat") == ""


