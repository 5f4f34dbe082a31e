"""The shipped configs for captioned pictures."""

import logging

import pytest

from ldm.config import load_config, merged, plain
from ldm.data import captions
from ldm.evaluate.sources import read_run, subject_of
from ldm.train.run_config import check_config
from tests.conftest import ROOT
from tests.runs import last, train

CONFIGS = ROOT / "configs"
BASES = ("lora/attention", "lora/dora", "sd-inject-dreambooth/resi-resi", "sd2-inject-dreambooth/lora-attention",
         "sdxl-inject-dreambooth/attn2o-ffni", "sd-mini/lora-loha", "sd-dream")  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_captions_lie_over_any_base_and_family(base):
    below = load_config(CONFIGS / f"{base}.yaml")
    config = merged(below, load_config(CONFIGS / "text-image" / "captioned.yaml"))
    check_config(config)
    train = plain(config)["data"]["params"]["train"]
    assert train["target"] == "ldm.data.folder.CaptionedFolder" and train["params"]["buckets"] is True
    assert train["params"]["size"] == below.data.params.train.params.size
    assert config.data.params.reg is None and config.model == below.model


@pytest.mark.slow
def test_the_small_model_trains_on_the_shipped_drawings(tmp_path, caplog):
    captions._tell.cache_clear()
    drawings = ROOT / "examples" / "subjects" / "noto_cat"
    words = ["--data_root", drawings, "--captions", "filename", "lightning.callbacks.image_logger.params.disabled=true"]
    with caplog.at_level(logging.INFO):
        run = train(tmp_path, "run", "--max_steps", 2, *words, config=CONFIGS / "sd-mini" / "captioned.yaml")
    assert last(run)["global_step"] == 2
    assert subject_of(read_run(run)).template == "photo of a {}"  # reports and scores know what to draw
    assert f"{drawings}: 11 pictures, 11 captions from file names" in caplog.text


def test_photographs_are_called_photographs():
    below = load_config(CONFIGS / "sd-mini" / "lora-attention.yaml")
    config = merged(below, load_config(CONFIGS / "sd-mini" / "photographs.yaml"))
    sets = [config.data.params[name].params.templates for name in ("train", "reg", "validation")]
    assert sets == ["a photo of a {}"] * 3 and config.model == below.model
