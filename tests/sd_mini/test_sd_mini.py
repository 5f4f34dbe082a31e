"""The shipped small model: complete, small enough, loadable, and as good as its card says."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoints import read_weights
from ldm.config import find_file, load_config
from ldm.data.captioned import COLOURS, compose, decode
from ldm.evaluate.metrics import psnr
from ldm.generate import Settings, generate
from ldm.models.clip import CLIP
from ldm.util import load_model_from_config

FOLDER = find_file("models/sd-mini")
SUBJECTS = find_file("examples/subjects")

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="models/sd-mini/model.safetensors is not in this checkout"
)


@pytest.fixture(scope="module")
def model():
    return load_model_from_config(load_config("configs/sd-mini/inference.yaml"))


def pictures_of(subject: Path) -> torch.Tensor:
    """All pictures of a subject on white, [b, 3, 64, 64] in -1 .. 1."""
    files = sorted(subject.glob("*.png"))
    rgba = torch.stack([torch.from_numpy(decode(file.read_bytes(), 64, file.name).copy()) for file in files])
    return compose(rgba, torch.tensor(COLOURS["white"], dtype=torch.float32)).movedim(-1, 1)


def test_everything_together_is_at_most_25_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 25e6


def test_weights_have_the_names_of_stable_diffusion_and_half_precision():
    weights = read_weights(FOLDER / "model.safetensors")
    for name in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.conv_out.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ):
        assert weights[name].dtype == torch.float16, name
    assert all(value.isfinite().all() for value in weights.values())


def test_the_text_encoder_is_the_text_tower_of_clip(model):
    prompts = ["an emoji of a cat", "a photo of a ship on a lake"]
    clip = CLIP("models/sd-mini/clip").eval()
    with torch.no_grad():
        expected = clip.clip.text_model(input_ids=clip.tokenize(prompts)).last_hidden_state
        assert torch.allclose(model.get_learned_conditioning(prompts), expected, atol=1e-3)


def test_pictures_are_finite_and_depend_on_the_prompt(model):
    prompts = ["an emoji of a red heart", "a photo of a ship"]
    red, ship = generate(model, prompts, [1, 1], Settings(steps=10, scale=5.0))
    assert red.shape == (3, 64, 64) and red.isfinite().all()
    assert (red - ship).abs().mean() > 0.05


@torch.inference_mode()
@pytest.mark.parametrize("subject", ["noto_cat", "noto_woman", "twemoji_monkey"])
def test_the_autoencoder_rebuilds_subjects_that_it_never_saw(model, subject):
    x = pictures_of(SUBJECTS / subject)
    rebuilt = model.first_stage_model.decode(model.first_stage_model.encode(x).mode()).clamp(-1, 1)
    assert psnr((rebuilt + 1) / 2, (x + 1) / 2).mean() >= 24  # measured: 24.7 to 31.8 dB
