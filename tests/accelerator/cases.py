"""On an accelerator a tiny model computes what it computes on a CPU. Run by `test_accelerator.py`."""

import json

import pytest
import torch

from tests.accelerator.pretended import DEVICE, NAME, pretended, waits  # first: it changes torch

import main_dream_booth  # isort: skip
from ldm import generate
from ldm.config import find_file
from ldm.interchange import load_any
from ldm.train import run as runs
from ldm.tuning import files
from tests.helpers import assert_close_to
from tests.runs import TINY, tiny_model

# Position adapters go through `test_dreambooth`.
WORD = "{family: textual-inversion, params: {words: <sks>, norm_weight: 10}}"
LORA = "{family: lora, params: {rank: 4}}, {family: lora, params: {targets: [cond_stage_model.*.self_attn.*_proj]}}"
PIVOTAL = ["model.params.train_level=[]", "model.params.unet_config.params.adapter_config=null",
           f"model.params.tuning=[{WORD}, {LORA}]"]  # fmt: skip
FUNCTIONS = ("ddim", "plms", "lms")  # those that keep or draw something from step to step


def tiny(*more, device="cpu"):
    torch.manual_seed(0)
    model = tiny_model(*more).to(device)
    model.log_dict = model.log = lambda *_, **__: None
    return model


def gradients(device):
    """Of a training step, and the operations for which the host waited in it."""
    model = tiny(*PIVOTAL, device=device).train()
    torch.manual_seed(1)
    picture = torch.rand(1, 32, 32, 3).to(device)
    batch = {"image": picture, "caption": ["a photo of a cat"], "mask": torch.ones(1, 8, 8, device=device)}
    model.training_step([batch, batch], 0)  # the first call of a model may look at it
    waits.clear()
    model.training_step([batch, batch], 1).backward()
    waited = list(waits)
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}, waited


def test_a_training_step():
    expected, _ = gradients("cpu")
    with pretended() as device:
        found, waited = gradients(device)
    assert not waited
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close_to(found[key], value, 1e-2)  # where sums cancel, their order is left over


def pictures(model, sampler="ddim", steps=4, eta=0.0):
    settings = generate.Settings(sampler, steps=steps, eta=eta, scale=3.0)
    return generate.generate(model, ["a cat", "a sks dog"], [1, 2], settings)


@pytest.mark.parametrize("how", [("ddim", 3, 0.5)])
def test_sampling(how):
    expected = pictures(tiny(), *how)
    with pretended() as device:
        found = pictures(tiny(device=device), *how)
    assert found.device.type == "cpu"
    assert_close_to(found, expected, 1e-3)


@pytest.mark.parametrize("sampler", FUNCTIONS)
def test_sampling_waits_as_often_for_many_steps_as_for_few(sampler):
    with pretended() as device:
        model, counts = tiny(device=device), []
        for steps in (3, 5):
            waits.clear()
            pictures(model, sampler, steps)
            counts.append(len(waits))
    assert counts[0] == counts[1]


def test_what_was_trained_elsewhere(tmp_path):
    trained = tiny(*PIVOTAL)
    for parameter in trained.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    files.save(trained, tmp_path / "adapters")
    plain = tiny()
    load_any(plain, tmp_path / "adapters")
    expected = pictures(plain)
    with pretended() as device:
        model = tiny(device=device)
        load_any(model, tmp_path / "adapters")
        found = pictures(model)
    assert_close_to(found, expected, 1e-3)
    assert (found - pictures(tiny())).abs().max() > 0.03, "the adapters did nothing"


def test_dreambooth(tmp_path, monkeypatch):
    """From class pictures through caches, sample pictures and checkpoints to a resume."""
    monkeypatch.setattr(runs, "first_device", lambda _: DEVICE)
    told = ["--accelerator", NAME, "--strategy", NAME]
    start = ["--base", str(TINY), "-l", str(tmp_path), "--class_word", "monkey", "--data_root",
             str(find_file("examples/subjects/twemoji_monkey")), "--reg_data_root", str(tmp_path / "class"),
             "--num_class_images", "1", "lightning.callbacks.image_logger.params.batch_frequency=4",
             "lightning.callbacks.image_logger.params.max_images=2",
             "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=4"]  # fmt: skip
    with pretended():
        main_dream_booth.main([*start, "-t", "--max_steps", "2", *told])
        (folder,) = tmp_path.glob("*/checkpoints")
        main_dream_booth.main(["-t", "-r", str(folder.parent), "--max_steps", "4", *told])
    assert len(list((tmp_path / "class").glob("*.png"))) == 1
    assert {path.name for path in (folder.parent / "images").glob("*.png")} == {"000004.png"}
    assert json.loads((folder / "4-adapters" / "adapter_config.json").read_text())["step"] == 4
