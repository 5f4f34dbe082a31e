"""What makes a step cheap changes no loss by more than its precision: fifty steps with all switches on and all off."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.train import trainer_section
from tests.runs import events, last, train

pytestmark = pytest.mark.slow

QUIET = ["--max_steps", 20, "lightning.callbacks.image_logger.params.disabled=true"]


def losses(folder):
    return torch.tensor([scalar.value for scalar in events(folder).Scalars("train/loss")])


def test_twenty_steps_with_all_switches_on_and_off(tmp_path):
    off = train(tmp_path, "off", "--cache", "off", *QUIET)
    on = train(tmp_path, "on", "--cache", "memory", "--base_precision", "bf16", *QUIET)
    first, second = losses(off), losses(on)
    assert len(first) == len(second) == 20
    # bf16 has 8 bits; errors of single weights average out over a picture
    assert ((first - second).abs() / first).max() < 0.02
    assert abs(first.mean() - second.mean()) / first.mean() < 0.005
    assert all(value.dtype == torch.float32 for value in last(on)["state_dict"].values())


@pytest.mark.parametrize(
    "told, devices", [("0,", [0]), ("1", [0]), ("1,", [1]), ([1], [1]), ("[0, 2]", [0, 2]), ("-1", [0, 1, 2])]
)
def test_which_gpus_are_meant(told, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert trainer_section.gpu_options(told) == {"accelerator": "gpu", "devices": devices}


@pytest.mark.parametrize("precision, fits", [("bf16-mixed", True), ("bf16-mixed", False), ("16-mixed", True)])
def test_precision_is_what_the_machine_can_do(precision, fits, monkeypatch, caplog):
    monkeypatch.setattr(trainer_section, "computes_on_cpu", lambda kind: fits and kind == "bf16")
    config = OmegaConf.create({"lightning": {"trainer": {"accelerator": "cpu", "precision": precision}}})
    kept = precision == "bf16-mixed" and fits
    assert trainer_section.trainer_options(config)["precision"] == (precision if kept else "32-true")
    assert ("needs a GPU or another CPU" in caplog.text) is not kept
