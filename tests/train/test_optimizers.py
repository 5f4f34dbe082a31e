"""Optimizers, schedules and learning rates by name."""

import importlib
import importlib.util

import pytest
import torch
from diffusers.optimization import get_scheduler

from ldm.checkpoints import read_weights
from ldm.config import instantiate_from_config, plain
from ldm.errors import InputError
from ldm.lr_scheduler import NamedSchedule
from ldm.train.optimizers import OPTIMIZERS
from ldm.train.run_config import read_configs
from tests.conftest import ROOT
from tests.runs import differences, last, resume, train
from tests.tuned_models import ROUTE, family, model

CONFIG = str(ROOT / "configs/sd-mini/attn2o-ffni.yaml")


def params(*words):
    return plain(read_configs([CONFIG], [*words], None).model.params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_down(name):
    if importlib.util.find_spec(OPTIMIZERS[name].target.partition(".")[0]) is None:
        pytest.skip(f"{OPTIMIZERS[name].package} is not installed")
    section = params(f"optimizer={name}", "model.base_learning_rate=1")["optimizer_config"]
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 80))
    rate = 1.0 if OPTIMIZERS[name].finds_rate else 1e-3
    optimizer = instantiate_from_config(section, params=[{"params": [weight], "lr": rate}], lr=rate)
    before = weight.norm().item()
    for _ in range(5):
        getattr(optimizer, "train", lambda: None)()
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.norm().item() < before


@pytest.mark.parametrize("name", [*NamedSchedule.WAYS])
def test_schedules_are_those_of_diffusers(name):
    if name == "constant":
        assert [NamedSchedule(name).schedule(n) for n in (0, 99)] == [1.0, 1.0]
        return
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    # diffusers' polynomial ends at a learning rate of 1e-7 instead of 0.
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40, num_cycles=2, power=2.0)
    cycles = {"cosine_with_restarts": 2}.get(name, 1)
    steps = None if name.startswith("constant") else 40
    ours = NamedSchedule(name, steps=steps, warmup=5, cycles=cycles, power=2.0)
    for n in range(41):
        assert ours.schedule(n) == pytest.approx(theirs.get_last_lr()[0], abs=2e-7)
        optimizer.step()
        theirs.step()


def test_a_schedule_can_end_above_zero():
    schedule = NamedSchedule("cosine", steps=10, end=0.1)
    assert [schedule.schedule(n) for n in (0, 5, 10, 20)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_the_short_forms():
    found = params("optimizer=lion", "schedule.name=cosine", "schedule.warmup=10", "loss.gamma=3.0")
    assert found["optimizer_config"] == {"target": "lion_pytorch.Lion", "params": {}}
    assert found["scheduler_config"]["target"] == "ldm.lr_scheduler.NamedSchedule"
    assert (
        found["scheduler_config"]["params"] | {"name": "cosine", "warmup": 10, "steps": 800}
        == (found["scheduler_config"]["params"])
    )
    assert params("schedule=constant")["scheduler_config"]["params"]["steps"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=adamm"], "there is no optimizer 'adamm': expected adamw"),
        (["optimizer=prodigy"], "add model.base_learning_rate=1"),
        (["schedule=cosin"], "schedule.name must be constant or"),
        (["schedule=cosine", "schedule.wramup=3"], "schedule"),
        (["schedule.name=cosine", "schedule.warmup=900"], "schedule.warmup is 900 steps, but the schedule has 800"),
        (["schedule=linear", "lightning.trainer.max_steps=-1"], "set schedule.steps or --max_steps"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        params(*words)


def test_a_package_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install lion-pytorch"):
        params("optimizer=lion")


def rates_of(tuned, **by_name):
    tuned.learning_rate = 1e-3
    [optimizer] = [tuned.configure_optimizers()]
    names = {id(value): name for name, value in tuned.trainable_parameters().items()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_parameters_have_learning_rates_of_their_own():
    lora = family("lora.LoRA", rank=2) | {"learning_rate": 1e-4}
    tuned = model([family("position.PositionAdapters", adapter_config=ROUTE), lora],
                  learning_rates={"*.lora_B.*": "x16", "*.output_blocks.*.adapter_inout.*": 5e-5})  # fmt: skip
    for name, rate in rates_of(tuned).items():
        if "adapter_inout" in name:
            assert rate == (5e-5 if "output_blocks" in name else 1e-3)
        else:
            assert rate == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4)


def test_a_learning_rate_for_nothing_is_refused():
    tuned = model([family("lora.LoRA", rank=2)], learning_rates={"cond_stage_model.*": 5e-5})
    with pytest.raises(InputError, match="'cond_stage_model.\\*' is for no trainable parameter"):
        rates_of(tuned)
    with pytest.raises(InputError, match="must be a positive number or x16, got '16'"):
        model([family("lora.LoRA", rank=2)], learning_rates={"*": "16"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedulefree_adamw", "prodigy", "lion"])
def test_a_run_goes_on_to_the_bit(tmp_path, name):
    words = [
        f"optimizer={name}",
        "model.base_learning_rate=1",
        "schedule.name=constant_with_warmup",
        "schedule.warmup=2",
    ]
    whole = train(tmp_path, "whole", "--max_steps", 6, *words)
    parts = train(tmp_path, "parts", "--max_steps", 3, *words)
    resume(parts, "--max_steps", 6)
    assert differences(last(whole), last(parts)) == []
    if name == "schedulefree_adamw":  # the folder has the average, as the checkpoint between steps
        saved = read_weights(whole / "checkpoints" / "6-adapters" / "adapters.safetensors")
        state = last(whole)["state_dict"]
        assert all(torch.equal(value, state[f"model.diffusion_model.{name}"]) for name, value in saved.items())
        [group] = last(whole)["optimizer_states"][0]["param_groups"]
        assert group["train_mode"] is False
