"""The commands of cloneofsimo's lora's README on SD-mini: pivotal tuning, and merging by `lora_add`.

A published command stands in the docstring; only the config, the device, the number of steps and the files are others.
"""

import shlex

import pytest
import torch

from ldm.checkpoints import read_weights
from ldm.commands import Program
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
