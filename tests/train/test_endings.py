"""Whatever ends a run saves what was learnt or says that nothing was; a damaged last.ckpt is refused in one line."""

import os
import signal
import textwrap

import pytest
import torch

from ldm.checkpoints import save_torch
from ldm.errors import InputError
from ldm.train import caches
from ldm.train import manifest as manifests
from tests.runs import arguments, command, differences, find_run, last, resume, start, train
from tests.train.test_resume import ENDLESS, wait_for

pytestmark = pytest.mark.slow

CPU = ("--accelerator", "cpu")
SCRIPT = """
import os, signal, sys, pytorch_lightning as pl, torch
sys.path.insert(0, os.getcwd())
{}
from ldm.cli import run_command
from main_dream_booth import main
run_command(lambda _: main(sys.argv[1:]))
"""


def run_with(code: str, work, *more: str):
    """A training in a process of its own, in which `code` was run before; and its folder."""
    script = SCRIPT.format(textwrap.dedent(code))
    done = command("-c", script, *arguments(work, "-n", "run", *CPU, "--max_steps", 6, *ENDLESS, *more))
    return done, find_run(work, "run")


# --- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    work = tmp_path_factory.mktemp("saved")
    return train(work, "run", "--max_steps", 2)


DAMAGE = {
    "an edited tensor": lambda c: next(iter(c["state_dict"].values())).add_(1),
    "an edited moment": lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].add_(1),
    "an empty optimizer": lambda c: c["optimizer_states"][0]["state"].clear(),
    "no optimizer": lambda c: c["optimizer_states"].clear(),
    "no loops": lambda c: c.pop("loops"),
    "no loop": lambda c: c["loops"].pop("fit_loop"),
    "no step": lambda c: c.pop("global_step"),
    "another step": lambda c: c.update(global_step=1),
    "no data": lambda c: c.pop("DataModuleFromConfig"),
    "no random states": lambda c: c.pop("random_states"),
    "random states of another kind": lambda c: c.update(random_states=[{"torch": "x"}]),
    "a counter that is text": lambda c: c["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready="1"),
    "a counter less": lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"].pop("is_last_batch"),
    "weights that are text": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): "x"}),
    "data of another kind": lambda c: c.update(DataModuleFromConfig={"batches_done": "x"}),
    "a weight that is not finite": lambda c: next(iter(c["state_dict"].values())).fill_(torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "none"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, damage, has_manifest):
    if not has_manifest and damage in ("an edited tensor", "an edited moment"):
        pytest.skip("only a manifest tells")
    content = last(saved)
    content = {key: _copied(value) for key, value in content.items()}
    DAMAGE[damage](content)
    if not has_manifest:
        del content["manifest"]
    before = (saved / "checkpoints" / "last.ckpt").read_bytes()
    stored = (saved / "configs" / "project.yaml").read_text()
    try:
        save_torch(saved / "checkpoints" / "last.ckpt", content)
        with pytest.raises(InputError, match="damaged|incomplete") as error:
            resume(saved, "--max_steps", 3)
        assert "\n" not in str(error.value)
        assert (saved / "configs" / "project.yaml").read_text() == stored
    finally:
        (saved / "checkpoints" / "last.ckpt").write_bytes(before)


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(tmp_path, caplog):
    whole, parts = train(tmp_path, "whole", "--max_steps", 3), train(tmp_path, "parts", "--max_steps", 2)
    content = last(parts)
    del content["manifest"], content["configured"]
    save_torch(parts / "checkpoints" / "last.ckpt", content)
    resume(parts, "--max_steps", 3)
    assert sum("has no manifest" in record.message for record in caplog.records) == 1
    assert differences(last(whole), last(parts)) == []


def test_a_manifest_names_every_tensor():
    content = {"state_dict": {"a": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, "n": [1, (2.5, None)]}
    told = manifests.manifest(content)
    assert list(told["tensors"]) == ["/state_dict/a", "/state_dict/b"]
    assert told["tensors"]["/state_dict/a"]["shape"] == [2, 3]
    for other in ([1, [2.5, None]], [1, (2.5, 0)], [True, (2.5, None)], [1, (2.5,)]):
        assert manifests.manifest({**content, "n": other})["rest"] != told["rest"]


# --- ends


def whole_of(tmp_path, steps: int) -> dict:
    return last(train(tmp_path / "whole", "whole", "--max_steps", steps, *ENDLESS))


FAILS_AT_3 = """
class Fails(pl.Callback):
    def {hook}(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("of the user's own")
from ldm.train import run
make = run.make_callbacks
run.make_callbacks = lambda *parts: (lambda first, *rest: [first, Fails(), *rest])(*make(*parts))
"""


@pytest.mark.parametrize("hook", ["on_after_backward"])
def test_an_error_of_a_callback_leaves_the_last_finished_step(tmp_path, hook):
    done, run = run_with(FAILS_AT_3.format(hook=hook), tmp_path)
    assert done.returncode == 1 and "RuntimeError: of the user's own" in done.stderr
    assert f"RuntimeError: what was learnt up to step 3 is saved; go on with -r {run}" in done.stderr
    assert (run / "checkpoints" / "3-adapters").is_dir()
    resume(run, "--max_steps", 6)
    assert differences(whole_of(tmp_path, 6), last(run)) == []


def test_an_error_within_a_step_of_the_optimizer_saves_no_half_step(tmp_path):
    code = """
    step, count = torch.optim.AdamW.step, []
    def fails(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return loss
    torch.optim.AdamW.step = fails
    """
    done, run = run_with(code, tmp_path)
    assert done.returncode == 130
    assert "KeyboardInterrupt: nothing was learnt that could be saved" in done.stderr
    assert list((run / "checkpoints").iterdir()) == []


def test_an_error_of_the_data_leaves_the_last_finished_step(tmp_path):
    code = """
    from ldm.data.encoded import EncodedSamples
    item = EncodedSamples.__getitem__
    def fails(self, k):
        if k == 3:
            raise OSError("the disk is gone")
        return item(self, k)
    EncodedSamples.__getitem__ = fails
    """
    done, run = run_with(code, tmp_path)
    assert done.returncode != 0 and "OSError: what was learnt up to step" in done.stderr
    resume(run, "--max_steps", 6)
    assert differences(whole_of(tmp_path, 6), last(run)) == []


def test_early_stopping_saves_what_was_learnt(tmp_path, capsys):
    stop = "lightning.callbacks.early"
    run = train(
        tmp_path, "run", "--max_steps", 100, *ENDLESS, f"{stop}.target=pytorch_lightning.callbacks.EarlyStopping",
        f"{stop}.params.monitor=val/loss", f"{stop}.params.stopping_threshold=100",
    )  # fmt: skip
    assert last(run)["global_step"] == 12 and (run / "checkpoints" / "12-adapters").is_dir()
    assert f"adapters and checkpoints are in {run / 'checkpoints'}" in capsys.readouterr().out


def test_max_time_saves_what_was_learnt(tmp_path):
    run = train(tmp_path, "run", "--max_steps", -1, *ENDLESS, "lightning.trainer.max_time='00:00:00:01'")
    assert last(run)["global_step"] > 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143)])
def test_asked_to_stop_before_the_first_step_it_says_that_nothing_was_learnt(tmp_path, number, code):
    setup = f"""
    from ldm.train import caches
    def sleeps(*_):
        os.kill(os.getpid(), {int(number)})
        __import__("time").sleep(20)
    caches.pictures = sleeps
    """
    done, run = run_with(setup, tmp_path)
    assert done.returncode == code, done.stderr
    assert "stopped before the first step: nothing was learnt, nothing is saved" in done.stderr
    assert "Traceback" not in done.stderr and not list(run.rglob("*.ckpt"))


def test_twice_ctrl_c_saves_the_last_finished_step(tmp_path):
    code = """
    from ldm.models.diffusion.ddpm import LatentDiffusion
    losses = LatentDiffusion.losses_of
    def slow(self, *drawn):
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)
        return losses(self, *drawn)
    LatentDiffusion.losses_of = slow
    """
    done, run = run_with(code, tmp_path)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert f"KeyboardInterrupt: what was learnt up to step 3 is saved; go on with -r {run}" in done.stderr
    resume(run, "--max_steps", 6)
    assert differences(whole_of(tmp_path, 6), last(run)) == []


def test_ctrl_c_while_class_pictures_are_drawn_keeps_those_that_are_done(tmp_path):
    code = """
    from ldm import generate
    save = generate.save_png
    def stops(picture, path, about):
        save(picture, path, about)
        os.kill(os.getpid(), signal.SIGINT)
    generate.save_png = stops
    """
    script = SCRIPT.format(textwrap.dedent(code))
    done = command("-c", script, *arguments(tmp_path, "-n", "run", *CPU, "--num_class_images", 5))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert f"4 of 5 class pictures are in {tmp_path / 'class'}" in done.stderr
    assert "nothing was learnt" in done.stderr


# --- a run has one process


def test_a_second_resume_is_refused_and_a_dead_process_holds_no_lock(tmp_path):
    process = start("main_dream_booth.py", *arguments(tmp_path, "-n", "run", *CPU, "--max_steps", -1))
    wait_for(process, "epoch 0:")
    run = find_run(tmp_path, "run")
    stored = (run / "configs" / "project.yaml").read_text()
    done = command("main_dream_booth.py", "-t", "-r", run, "--max_steps", 10**6, *CPU)
    assert done.returncode == 2
    assert f"{run} is in use: process {process.pid} on " in done.stderr and "Traceback" not in done.stderr
    assert (run / "configs" / "project.yaml").read_text() == stored
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    step = last(run)["global_step"]
    resume(run, "--max_steps", step + 1)
    assert last(run)["global_step"] == step + 1


# --- no picture of numbers that are not finite


@pytest.mark.parametrize("part", ["the text encoder", "the UNet at step 2 of 3", "the first stage"])
def test_no_picture_is_made_of_numbers_that_are_not_finite(monkeypatch, part):
    from ldm.generate import NotFinite, Settings, generate
    from tests.runs import tiny_model

    model = tiny_model()
    calls = []

    def spoilt(function, at=0):
        def call(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs) * (torch.nan if len(calls) > at else 1)

        return call

    functions = {"text": "get_learned_conditioning", "UNet": "apply_model", "first": "decode_first_stage"}
    name, at = functions[part.split()[1]], int("step 2" in part)
    monkeypatch.setattr(model, name, spoilt(getattr(model, name), at))
    with pytest.raises(NotFinite, match=f"^{part} gave numbers that are not finite .* try another adapter"):
        generate(model, ["a dog"], [0], Settings(steps=3))
    monkeypatch.undo()
    with torch.no_grad():
        model.model.diffusion_model.out[2].bias.fill_(torch.nan)
    with pytest.raises(NotFinite, match="the UNet at step 1 of 3 .* model.diffusion_model.out.2.bias is not finite"):
        generate(model, ["a dog"], [0], Settings(steps=3))


def test_a_first_stage_that_overflows_is_named_before_training(tmp_path, monkeypatch):
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

    begin = DiagonalGaussianDistribution.__init__

    def spoilt(self, parameters, *more):
        begin(self, parameters * torch.inf, *more)

    monkeypatch.setattr(DiagonalGaussianDistribution, "__init__", spoilt)
    with pytest.raises(InputError, match="the first stage gives numbers that are not finite for .*/0.png: use"):
        train(tmp_path, "run", "--max_steps", 1)


def test_a_text_encoder_that_overflows_is_named_before_training(tmp_path, monkeypatch):
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

    encode = FrozenCLIPEmbedder.encode
    monkeypatch.setattr(FrozenCLIPEmbedder, "encode", lambda self, texts: encode(self, texts) * torch.nan)
    with pytest.raises(InputError, match="the text encoder gives numbers that are not finite for the caption ''"):
        train(tmp_path, "run", "--max_steps", 1)


def test_no_picture_that_is_not_finite_is_written(tmp_path):
    from ldm.generate import save_png

    with pytest.raises(InputError, match="a picture has numbers that are not finite"):
        save_png(torch.full((3, 8, 8), torch.nan), tmp_path / "black.png", {})
    assert not list(tmp_path.iterdir())


# --- before the first step


@pytest.fixture
def sends(monkeypatch):
    """Sends this process a signal while the captions of a training are encoded."""

    def prepare(number):
        encode = caches._encode_prompts

        def told(*args):
            os.kill(os.getpid(), number)
            return encode(*args)

        monkeypatch.setattr(caches, "_encode_prompts", told)

    return prepare


def test_sigusr1_before_the_first_step_is_answered_after_it(tmp_path, sends, caplog):
    sends(signal.SIGUSR1)
    with caplog.at_level("INFO"):
        run = train(tmp_path, "run", "--max_steps", 3)
    assert "SIGUSR1 before the first step: nothing to save yet" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").glob("*")) == ["1-adapters", "3-adapters", "last.ckpt"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
