"""The commands of Stable Diffusion's and latent diffusion's READMEs, on small models: they run and leave pictures.

Each line is the published one; only the model (config, checkpoint), the number of steps and the folders are smaller.
"""

import shlex

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoints import save_torch
from ldm.commands import Program
from ldm.errors import InputError
from ldm.models.building import build_model
from tests import runs
from tests.conftest import ROOT
from tests.tuned_models import UNET

pytestmark = pytest.mark.slow
MINI = f"--config {ROOT / 'configs/sd-mini/inference.yaml'} --ddim_steps 2"

# (source, program, words): the published words, then what makes it small.
COMMANDS = [
    ("stable-diffusion", "txt2img", '--prompt "a photograph of an astronaut riding a horse" --plms'),
    (
        "stable-diffusion", "img2img",
        '--prompt "A fantasy landscape, trending on artstation" --init-img {photo} --strength 0.8',
    ),
    (
        "latent-diffusion", "txt2img",
        '--prompt "a virus monster is playing guitar, oil on canvas" --ddim_eta 0.0 --n_samples 4 --n_iter 4 '
        "--scale 5.0 --ddim_steps 50",
    ),
    (
        "latent-diffusion", "txt2img",
        '--prompt "a sunset behind a mountain range, vector image" --ddim_eta 1.0 --n_samples 1 --n_iter 1 --H 64 '
        "--W 128 --scale 5.0",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "sketch.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("source", "verb", "words"), COMMANDS, ids=range(len(COMMANDS)))
def test_a_published_command(source, verb, words, photo, tmp_path):
    given = shlex.split(f"{words.format(photo=photo)} {MINI} --outdir {tmp_path}")
    Program(verb)(given)
    assert list((tmp_path / "samples").glob("*.png")) and list(tmp_path.glob("grid-*.png"))


def test_inpainting_of_a_folder(photo, tmp_path):
    """python scripts/inpaint.py --indir data/inpainting_examples/ --outdir outputs/inpainting_results"""
    folder = tmp_path / "inpainting_examples"
    folder.mkdir()
    Image.open(photo).save(folder / "bench.png")
    Image.new("L", (96, 64), 255).save(folder / "bench_mask.png")
    Program("inpaint")(shlex.split(f"--indir {folder} --outdir {tmp_path / 'results'} {MINI}"))
    assert Image.open(tmp_path / "results" / "bench.png").size == (96, 64)


@pytest.fixture(scope="module", params=["unconditional", "classes"])
def model_folder(request, tmp_path_factory):
    """A tiny latent diffusion model without text, as the published ones are laid out: model.ckpt and config.yaml."""
    folder = tmp_path_factory.mktemp(request.param)
    unet = {"target": UNET["target"], "params": dict(UNET["params"])}
    params = {
        "unet_config": unet, "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "timesteps": 20, "image_size": 8, "channels": 3, "use_ema": False, "linear_start": 0.0015, "linear_end": 0.0195,
    }  # fmt: skip
    unet["params"] |= {"in_channels": 3, "out_channels": 3}
    if request.param == "classes":
        encoder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 128, "n_classes": 7}}
        params |= {"cond_stage_config": encoder, "cond_stage_key": "class_label", "conditioning_key": "crossattn"}
    else:
        unet["params"] |= {"use_spatial_transformer": False, "context_dim": None}
        params |= {"cond_stage_config": "__is_unconditional__", "concat_mode": False}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    OmegaConf.save(config, folder / "config.yaml")
    save_torch(folder / "model.ckpt", {"state_dict": build_model(config, None).state_dict()})
    return folder


@pytest.mark.parametrize("more", ["-c 4 -e 1.0", "-v"])
def test_sample_diffusion(model_folder, tmp_path, more):
    """python scripts/sample_diffusion.py -r models/ldm/<spec>/model.ckpt -l <logdir> -n N --batch_size B -c S -e ETA"""
    words = f"-r {model_folder / 'model.ckpt'} -l {tmp_path} -n 3 --batch_size 2 {more} --device cpu"
    if model_folder.name.startswith("classes"):
        with pytest.raises(InputError, match="from 0 to 6, got None"):
            Program("sample-diffusion")(shlex.split(words))
        words += " --class_label 3"
    Program("sample-diffusion")(shlex.split(words))
    (folder,) = (tmp_path / "samples").iterdir()
    pictures = [runs.pixels(path) for path in sorted((folder / "img").glob("*.png"))]
    (array,) = (folder / "numpy").glob("*.npz")
    assert len(pictures) == 3 and np.load(array)["arr_0"].shape == (3, 8, 8, 3)


def test_a_checkpoint_without_a_config_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match="name one with --config"):
        Program("sample-diffusion")(["-r", str(tmp_path)])
