"""The commands of unet-finetune's README on SD-mini: training, sampling, adapters saved and loaded.

A published command stands in the docstring; only the config, the model and the number of steps are smaller.
"""

import shlex

import pytest
import torch

from ldm.commands import Program
from ldm.config import load_config
from ldm.errors import InputError
from ldm.util import load_model_from_config
from tests import runs
from tests.conftest import ROOT
from tests.published.conftest import CKPT

pytestmark = pytest.mark.slow
CONFIG = ROOT / "configs/sd-mini/attn1i-attn2i.yaml"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs in `example/`, class pictures, and a run on them."""
    work = tmp_path_factory.mktemp("readme")
    runs.pictures(work / "example", 2), runs.pictures(work / "reg", 2, seed=1)
    return work


def training(work, more):
    words = (
        f"--base {CONFIG} -t --actual_resume {CKPT} -n my-run --data_root {work / 'example'} --reg_data_root "
        f"{work / 'reg'} --scale_lr False --class_word dog --logdir {work / 'logs'} {more}"
    )
    runs.main_dream_booth(*shlex.split(words))


@pytest.fixture(scope="module")
def adapters(work):
    """python main_dream_booth.py --base configs/sd-inject-dreambooth/<input>-<output>.yaml -t --actual_resume
    /path/to/pretrained/model.ckpt -n <run_name> --gpus 0, --data_root <photographs> --reg_data_root <class pictures>
    --scale_lr False --class_word <class_word> --logdir /path/to/logdir"""
    training(work, "--accelerator cpu --max_steps 1 data.params.batch_size=1 --no-test")
    (run,) = (work / "logs").glob("example*_my-run")  # <logdir>/example<time stamp>_<run_name>
    return run / "checkpoints" / "1-adapters"


def test_without_a_gpu_gpus_leaves_no_folder(work, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="--gpus 0,"):
        training(work, f"--gpus 0, --logdir {tmp_path / 'none'}")
    assert not list((tmp_path / "none").glob("*"))


def test_generation(adapters, tmp_path):
    """python sample.py --n_samples 1 --n_iter 1 --scale 7.5 --ddim_steps 20 --ckpt /path/to/ckpt --prompt "a photo of a
    sks <class_word> " --config "configs/sd-inject-dreambooth/attn1i-attn2i.yaml" --adapter_path
    "<logdir>/example<time stamp>_<run_name>/checkpoints/999-adapters" --outdir outputs"""
    words = (
        f'--n_samples 1 --n_iter 1 --scale 7.5 --ddim_steps 2 --ckpt {CKPT} --prompt "a photo of a sks dog " '
        f'--config "{CONFIG}" --adapter_path "{adapters}" --outdir {tmp_path}'
    )
    Program("sample")(shlex.split(words))
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1


def test_adapters_are_stored_and_loaded(adapters, tmp_path):
    """model = load_model_from_config(config, ckpt_path, True); save_adapter_to_dir, load_adapter_from_dir"""
    config = load_config(CONFIG)
    models = [load_model_from_config(config, CKPT, verbose) for verbose in (True, False)]
    unets = [model.model.diffusion_model for model in models]
    unets[0].load_adapter_from_dir(adapters)
    unets[0].save_adapter_to_dir(tmp_path / "kept")
    unets[1].load_adapter_from_dir(tmp_path / "kept")
    states = [{n: v for n, v in unet.state_dict().items() if "adapter" in n} for unet in unets]
    assert states[0] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
