"""The commands of cloneofsimo's lora's README on SD-mini: pivotal tuning, and merging by `lora_add`.

A published command stands in the docstring; only the config, the device, the number of steps and the files are others.
"""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from ldm.checkpoints import read_weights
from ldm.commands import Program
from ldm.config import instantiate_from_config, load_config
from ldm.errors import InputError
from ldm.interchange import cloneofsimo
from tests import runs
from tests.conftest import ROOT
from tests.published.conftest import CKPT

pytestmark = pytest.mark.slow
PIVOTAL, BASE = (ROOT / f"configs/sd-mini/{name}.yaml" for name in ("textual-inversion-pivotal", "inference"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory, hub_folder):
    """lora_pti --pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=$INSTANCE_DIR --output_dir=$OUTPUT_DIR
    --train_text_encoder --resolution=512 ... --lora_rank=1"""
    work = tmp_path_factory.mktemp("pti")
    runs.pictures(work / "data_disney", 1)
    words = (
        f"--instance_data_dir={work / 'data_disney'} --output_dir={work / 'output_dsn'} --train_text_encoder "
        "--resolution=64 --train_batch_size=1 --gradient_accumulation_steps=4 --scale_lr --learning_rate_unet=1e-4 "
        "--learning_rate_text=1e-5 --learning_rate_ti=5e-4 --color_jitter --lr_scheduler=linear --lr_warmup_steps=0 "
        "--placeholder_tokens='<s1>|<s2>' --use_template=style --save_steps=100 --max_train_steps_ti=1 "
        "--max_train_steps_tuning=2 --perform_inversion=True --clip_ti_decay --weight_decay_ti=0.000 "
        "--weight_decay_lora=0.001 --continue_inversion --continue_inversion_lr=1e-4 --device=cpu --lora_rank=1"
    )
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(hub_folder))
        given = ["--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5", "--config", str(PIVOTAL)]
        Program("lora-pti")([*given, *shlex.split(words)])
    return work / "output_dsn" / "final_lora.safetensors"


def add(words):
    Program("lora-add")([*shlex.split(words), "--config", str(BASE)])


def test_pivotal_tuning_leaves_a_lora_with_words(lora):
    content = cloneofsimo.read_safetensors(lora)
    assert list(content.tokens) == ["<s1>", "<s2>"] and set(content.factors) == {"unet", "text_encoder"}


def test_a_lora_in_a_model_of_the_hub(lora, hub, tmp_path):
    """lora_add runwayml/stable-diffusion-v1-5 ./example_loras/lora_krk.safetensors ./output_merged 0.8 --mode upl, and
    ./output_merged.ckpt 0.7 --mode upl-ckpt-v2"""
    add(f"{hub} {lora} {tmp_path / 'output_merged'} 0.8 --mode upl")
    assert (tmp_path / "output_merged" / "model_index.json").is_file()
    add(f"{hub} {lora} {tmp_path / 'other' / 'output_merged.ckpt'} 0.7 --mode upl-ckpt-v2")
    merged, base = read_weights(tmp_path / "other" / "output_merged.ckpt"), read_weights(CKPT)
    changed = {name for name in merged if not torch.equal(merged[name].float(), base[name].float())}
    assert changed and all("attn" in name or "ff.net" in name for name in changed)


@pytest.mark.parametrize(
    "words", ["{lora} {lora} {out} 2.0 0.7", "{lora} {lora} {out} --alpha 0.5", "{lora} {lora} {out} --mode=ljl"]
)
def test_two_loras_in_one(lora, tmp_path, words):
    """lora_add ./example_loras/analog_svd_rank4.safetensors ./example_loras/lora_krk.safetensors
    ./krk_analog.safetensors 2.0 0.7; --alpha is the synopsis' flag; --mode=ljl joins"""
    add(words.format(lora=lora, out=tmp_path / "both.safetensors"))
    found, one = cloneofsimo.read_safetensors(tmp_path / "both.safetensors"), cloneofsimo.read_safetensors(lora)
    assert found.factors.keys() == one.factors.keys()
    ranks = cloneofsimo.numbered(found).ranks()
    assert set(ranks) == ({2} if "ljl" in words else {1})


@pytest.mark.parametrize(("script", "with_text"), [("run_lora_db", False), ("run_lora_db_w_text", True)])
def test_dreambooth_by_the_published_scripts(script, with_text, tmp_path):
    """training_scripts/run_lora_db.sh, which runs train_lora_dreambooth.py; the words that it says are run here."""
    stub = tmp_path / "stub.py"
    stub.write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    places = {"MODEL_NAME": str(CKPT), "INSTANCE_DIR": str(tmp_path / "photos"), "OUTPUT_DIR": str(tmp_path / "out")}
    environment = runs.ENVIRONMENT | places | {"LDM": f"{sys.executable} {stub}"}
    done = subprocess.run(["bash", str(ROOT / f"scripts/{script}.sh")], env=environment, capture_output=True, text=True)
    verb, *words = json.loads(done.stdout)
    assert verb == "lora-dreambooth"
    runs.pictures(tmp_path / "photos", 2)
    prior = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a game style"]
    small = ["--resolution=64", "--max_train_steps=2", "--num_class_images=1", "--device=cpu", "--config",
             str(ROOT / "configs/sd-mini/lora-attention.yaml"), "--prior_loss_weight=0.5"]  # fmt: skip
    Program(verb)([*words, *small, *([] if with_text else prior)])
    content = cloneofsimo.read_safetensors(tmp_path / "out" / "lora_weight.safetensors")
    assert set(content.factors) == ({"unet", "text_encoder"} if with_text else {"unet"})
    assert (tmp_path / "out" / "lora_weight.pt").is_file()
    assert (tmp_path / "out" / "lora_weight.text_encoder.pt").is_file() == with_text
    (run,) = (tmp_path / "out").glob("*_lora")
    config = load_config(run / "configs" / "project.yaml")
    own = instantiate_from_config(config.data.params.train)
    assert own.all_captions() == ["game character sks" if with_text else "style of sks"]
    if not with_text:
        assert instantiate_from_config(config.data.params.reg).all_captions() == ["a game style"]
        assert config.model.params.reg_weight == 0.5 and len(list((tmp_path / "class").glob("*.png"))) == 1
        with pytest.raises(InputError, match="needs --class_data_dir and --class_prompt"):
            Program(verb)([*words, *small, "--force", "--with_prior_preservation"])
