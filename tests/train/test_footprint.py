"""What `ldm plan` counts: against hand-computed sizes, and against the same step on real tensors."""

import json

import pytest
import torch

from ldm.commands import Program
from ldm.errors import InputError
from ldm.train.footprint import Count, measure
from ldm.train.gpus import Gpu, gpu, seconds
from tests.conftest import ROOT
from tests.runs import TINY
from tests.tuned_models import ROUTE, base_weights, config, family, model

MINI = str(ROOT / "configs/sd-mini/attn2o-ffni.yaml")
POSITION = family("position.PositionAdapters", adapter_config=ROUTE)


def test_a_storage_counts_once_and_as_long_as_it_lives():
    with Count() as count:
        a = torch.ones(1000)  # 4000 bytes
        b = a.view(10, 100)
        c = a + 1
        del a
        count.forget_dead()
        assert count.now == 8000  # b keeps the first one
        del b, c
        count.forget_dead()
        d = torch.ones(10)
    assert (count.now, count.peak) == (40, 8000) and d.sum() == 10


def test_operations_and_traffic():
    a, b = torch.ones(20, 30), torch.ones(30, 40)
    with Count() as count:
        a @ b
    assert count.calls == [(2 * 20 * 30 * 40, 4 * (20 * 30 + 30 * 40 + 20 * 40))]


@pytest.mark.slow
def test_the_parts_of_a_step():
    found = measure(config([POSITION]), [(2, 8, 8, 4)], base_precision="bf16")
    tuned = model([POSITION])
    trainable = sum(p.numel() for p in tuned.trainable_parameters().values())
    unet = sum(v.numel() for name, v in base_weights().items() if name.startswith("model.diffusion_model."))
    assert found.parameters == trainable
    assert found.trainable == found.gradients == 4 * trainable
    assert found.unet == 2 * unet
    steps = 4 * len(tuned.trainable_parameters())  # AdamW counts its steps for each parameter
    assert found.optimizer == 8 * trainable + steps
    assert found.activations > 0


@pytest.mark.slow
def test_a_fake_step_counts_what_a_real_one_does():
    fake = measure(config([POSITION]), [(2, 8, 8, 4), (2, 8, 8, 4)])
    tuned = model([POSITION]).train()
    tuned.learning_rate = 1e-4
    optimizer = tuned.configure_optimizers()
    captions = ["photo of a sks dog"] * 2
    with torch.no_grad():
        known = tuned.get_learned_conditioning(captions)
    tuned.cond_stage_model = None
    batches = [{"image": torch.randn(2, 8, 8, 4), "caption": captions} for _ in range(2)]
    with Count() as count:
        for value in tuned.state_dict().values():
            count.track(value)
        tuned.get_learned_conditioning = lambda texts, *_: known[: len(texts)]
        tuned._condition = lambda batch, *_: known
        for _ in range(2):
            count.calls.clear()
            sum(loss for loss, _ in tuned.losses(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(flops for flops, _ in count.calls) == fake.flops > 0
    text_encoder = fake.encoders
    assert count.peak == pytest.approx(fake.peak - text_encoder, rel=0.02)


def test_a_roofline_takes_the_longer_of_computing_and_moving():
    small = Gpu(memory=1, tera=1, bandwidth=1)
    assert seconds([(10**12, 10), (10, 10**9)], small) == pytest.approx(2.0)
    assert seconds([(10**12, 10)], small, throughput=0.5) == pytest.approx(2.0)
    with pytest.raises(InputError, match="did you mean RTX 4090"):
        gpu("RTX 409")


def plan(capsys, *words, base=MINI):
    Program("plan")(["--base", str(base), *words])
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_report(capsys):
    found = json.loads(plan(capsys, "--json", "--gpu", "T4"))
    assert found["peak"] > found["unet"] > found["trainable"] > 0 and found["seconds_floor"] > 0
    text = plan(capsys, "--memory", "24")
    assert "trainable weights" in text and "fits into 24 GiB" in text


@pytest.mark.slow
def test_what_does_not_fit_names_the_switches(capsys):
    text = plan(capsys, "--memory", "0.62", "--cache", "off", "data.params.batch_size=16", base=TINY)
    assert "does not fit into 0.62 GiB" in text and "--cache memory" in text
    assert text.index("--cache memory") < text.index("--base_precision bf16")


def test_a_step_of_unknown_size_is_refused():
    with pytest.raises(InputError, match="the size of a step is unknown"):
        Program("plan")(["--base", MINI, "data.params.train.params.size=null"])
