"""Presets for GPUs lie over any config of adapters or LoRA, and `ldm plan` counts with what they say."""

import json

import pytest

from ldm.config import load_config, merged
from ldm.train.run_config import check_config
from tests.conftest import ROOT
from tests.runs import TINY

PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
BASES = ("sdxl-inject-dreambooth/lora-attention", "sd-inject-dreambooth/resi-resi", "sd2-inject-dreambooth/dreambooth")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_lies_over_any_base(preset):
    sizes = []
    for base in BASES:
        config = merged(load_config(ROOT / "configs" / f"{base}.yaml"), load_config(preset))
        check_config(config)
        sizes.append((config.data.params.batch_size, config.lightning.trainer.get("accumulate_grad_batches", 1)))
    assert len(set(sizes)) == 1


def test_larger_cards_get_larger_batches():
    names = sorted(PRESETS, key=lambda path: int(path.stem.removesuffix("gb")))
    sizes = [load_config(path).data.params.batch_size for path in names]
    assert [path.stem for path in names] == ["8gb", "12gb", "24gb", "80gb"] and sizes == sorted(set(sizes))


def test_a_plan_counts_with_the_config(tmp_path, capsys):
    from ldm.__main__ import main

    (tmp_path / "half.yaml").write_text("dreambooth: {base_precision: bf16}\n")
    bytes_of = []
    for more in ([], [str(tmp_path / "half.yaml")], [str(tmp_path / "half.yaml"), "--base_precision", "fp32"]):
        main(["plan", "--json", "--base", str(TINY), *more])
        bytes_of.append(json.loads(capsys.readouterr().out)["unet"])
    assert bytes_of[0] == bytes_of[2] == 2 * bytes_of[1]


def test_a_plan_takes_the_short_options(capsys):
    from ldm.__main__ import main

    counts = []
    for rank in ("2", "4"):
        main(["plan", "--json", "--base", str(TINY), "--family", "lora", "--rank", rank])
        counts.append(json.loads(capsys.readouterr().out)["parameters"])
    assert counts[1] == 2 * counts[0]
