"""The commands of Custom Diffusion's README, on a small model: training, sampling, deltas, compression, composition.

Each line is the published one; only the model, the number of steps and the folders are smaller, and no GPU is named.
"""

import shlex

import pytest

from ldm.checkpoints import save_torch
from ldm.commands import Program
from ldm.config import load_config
from ldm.models.building import build_model
from tests import runs
from tests.conftest import ROOT
from tests.train.test_custom_diffusion import SMALL_RUN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs, class pictures, the small config and a checkpoint of its random base."""
    work = tmp_path_factory.mktemp("readme")
    for number, name in enumerate(("cat", "chair", "samples_cat")):
        runs.pictures(work / name, 3, seed=number)
    (work / "small.yaml").write_text(SMALL_RUN)
    config = load_config(ROOT / "configs/sd-mini/custom-diffusion-finetune.yaml")
    config.merge_with(load_config(work / "small.yaml"))
    save_torch(work / "sd-v1-4.ckpt", {"state_dict": build_model(config, None, 0).state_dict()})
    return work


def trained(work, name, words):
    base = f"--base {ROOT}/configs/sd-mini/custom-diffusion-addtoken.yaml {work}/small.yaml --logdir {work}/logs"
    runs.main_dream_booth(*shlex.split(f"{base} {words} --name {name} --accelerator cpu --max_steps 2"))
    return runs.find_run(work, name)


def test_the_readme_from_training_to_pictures(work, tmp_path):
    """python -u train.py --base configs/custom-diffusion/finetune_addtoken.yaml -t --gpus 0,1
    --resume-from-checkpoint-custom <ckpt> --caption "<new1> cat" --datapath data/cat
    --reg_datapath real_reg/samples_cat --reg_caption "cat" --modifier_token "<new1>" --name "cat-sdv4"; then
    sample.py, get_deltas.py and compress.py."""
    ckpt = f"--resume-from-checkpoint-custom {work}/sd-v1-4.ckpt"
    run = trained(
        work, "cat-sdv4",
        f'-t {ckpt} --caption "<new1> cat" --datapath {work}/cat --reg_datapath {work}/samples_cat --reg_caption "cat" '
        '--modifier_token "<new1>" --batch_size 1 --repeat 2',
    )  # fmt: skip
    config = load_config(run / "configs" / "project.yaml")
    assert config.data.params.batch_size == 1 and config.data.params.train[0].params.repeat == 2

    Program("deltas")(shlex.split(f"--path {run} --newtoken 1"))
    (delta,) = [path for path in run.rglob("delta*") if path.is_file()]
    config = f"--config {tmp_path}/config.yaml"
    (tmp_path / "config.yaml").write_text((run / "configs" / "project.yaml").read_text())
    Program("sample")(
        shlex.split(
            f'--prompt "<new1> cat playing with a ball" --delta_ckpt {delta} --ckpt {work}/sd-v1-4.ckpt {config} '
            f"--n_samples 1 --n_iter 1 --ddim_steps 2 --scale 6. --ddim_eta 1. --outdir {tmp_path}/out"
        )
    )
    assert list((tmp_path / "out" / "samples").glob("*.png"))
    Program("compress")(shlex.split(f"--delta_ckpt {delta} --ckpt {work}/sd-v1-4.ckpt"))
    assert [path for path in delta.parent.iterdir() if "compressed" in path.name]
