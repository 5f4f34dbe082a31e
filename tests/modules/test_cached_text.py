"""Keys and values of a text, kept between the steps of a sampler: fewer products, the same pictures."""

import pytest
import torch

from ldm.generate import Settings, decoded, generate
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.cached_text import cached_text
from tests import tuned_models

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]
CONTEXT = {"transformer_adp_config": [{"din": "attn2c", "dout": "attn2c", "mid_dim": 4, "init": "default"}]}


def blocks(model):
    return [m for m in model.model.diffusion_model.modules() if isinstance(m, BasicTransformerBlock)]


def drawn(model, **settings):
    """Pictures, and how often the keys of a text were computed in each block."""
    counts = []
    hooks = [block.attn2.to_k.register_forward_hook(lambda *_: counts.append(1)) for block in blocks(model)]
    pictures = generate(model, PROMPTS, SEEDS, Settings(steps=4, scale=3.0, **settings))
    for hook in hooks:
        hook.remove()
    return pictures, len(counts) / len(hooks)


@pytest.mark.parametrize("adapters", [None, CONTEXT, tuned_models.ROUTE], ids=["plain", "attn2c", "attn2o-ffni"])
def test_the_same_pictures_from_fewer_products(adapters):
    model = tuned_models.model(unet={"adapter_config": adapters})
    always, many = drawn(model, cache_text=False)
    once, few = drawn(model)
    assert torch.equal(once, always)
    assert many == 4 and few == (4 if adapters is CONTEXT else 1)


def test_another_text_is_computed_anew_and_nothing_stays_behind():
    model = tuned_models.model()
    unet, layer = model.model.diffusion_model, blocks(model)[0].attn2
    first, second = torch.randn(2, 1, 5, 128, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        expected = [layer.keys_and_values(text)[0] for text in (first, second)]
        with cached_text(unet):
            for text, keys in zip((first, second, second, first), (*expected, *reversed(expected)), strict=True):
                assert torch.equal(layer.keys_and_values(text)[0], keys)
    assert "keys_and_values" not in vars(layer)


def test_a_compiled_model_is_left_alone():
    model = tuned_models.model()
    unet = model.model.diffusion_model
    unet.compile(backend="eager")
    with cached_text(unet):
        assert all("keys_and_values" not in vars(block.attn2) for block in blocks(model))


def test_decoding_in_slices_gives_the_same_pictures():
    class Doubling(torch.nn.Module):
        downsampling_factor = 2
        sizes = []

        def decode_first_stage(self, z):
            self.sizes.append(len(z))
            return torch.nn.functional.interpolate(z, scale_factor=2)

    model = Doubling()
    model.first_stage_model = model
    latents = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = decoded(model, latents, 5 * 64)
    assert torch.equal(decoded(model, latents, 2 * 64), whole) and torch.equal(decoded(model, latents, 1), whole)
    assert model.sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]
