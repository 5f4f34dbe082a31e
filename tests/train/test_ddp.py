"""Two processes on the CPU train on different draws to the same parameters, into one folder, and resume exactly."""

import os
import signal
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.data.sampling import ResumableBatches, SharedBatches
from ldm.errors import InputError
from tests.conftest import ROOT
from tests.models.test_published_models import narrow
from tests.runs import arguments, command, differences, events, find_run, last, pictures, resume, start, train

pytestmark = pytest.mark.slow

TWO = ("--accelerator", "cpu", "--devices", "2")

# What every process sees, into a file of its own: the pictures and the captions that it trained on, its parameters.
WATCHED = textwrap.dedent(
    """
    import os, sys, torch
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from main_dream_booth import main
    seen, draw = [], LatentDiffusion.draw
    def watched(model, batch):
        drawn = draw(model, batch)
        if model.training:
            seen.append((batch["image"], drawn[3]))
        return drawn
    LatentDiffusion.draw = watched
    end = LatentDiffusion.on_train_end
    def on_train_end(model):
        folder = os.environ["SEEN"]
        learning = {name: value.detach() for name, value in model.trainable_parameters().items()}
        torch.save((seen, learning), os.path.join(folder, f"rank{model.global_rank}.pt"))
        end(model)
    LatentDiffusion.on_train_end = on_train_end
    main(sys.argv[1:])
    """
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps on two processes, and what it wrote to the terminal."""
    work = tmp_path_factory.mktemp("two")
    pictures(work / "photos", 5), pictures(work / "class", 3)  # 5: validation is uneven
    script = work / "watched.py"
    script.write_text(WATCHED)
    done = command(script, *arguments(work, "-n", "whole", *TWO, "--max_steps", 9, "--cache", "off"), SEEN=str(work))
    assert done.returncode == 0, done.stderr
    return work, done


def test_both_processes_train_to_the_same_parameters(whole):
    work, _ = whole
    (first, learnt), (second, learnt_too) = (torch.load(work / f"rank{i}.pt", weights_only=True) for i in range(2))
    assert differences(learnt, learnt_too) == []
    assert len(first) == len(second) == 2 * 9  # subject and class in every step
    assert all(not torch.equal(noise, other) for (_, noise), (_, other) in zip(first, second, strict=True))
    # An epoch is 5 pictures, 3 times, of which two processes show 14. That no picture comes a fourth time, and none
    # just once, is only so if they share the draws out.
    subject = [image for image, _ in first[:14:2] + second[:14:2]]
    shown = Counter(round(image.sum().item(), 1) for image in subject)  # flipped or not
    assert sorted(shown.values()) == [2, 3, 3, 3, 3]


def test_one_folder_one_voice(whole):
    work, done = whole
    content, run = last(find_run(work, "whole")), find_run(work, "whole")
    assert content["global_step"] == 9 and len(content["random_states"]) == 2
    assert not torch.equal(*(states["torch"] for states in content["random_states"]))
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    assert done.stderr.count("starting from random base weights") == 1
    assert done.stdout.count("adapters and checkpoints are in") == 1


def test_two_processes_resume_exactly(whole):
    work, _ = whole
    for words in (arguments(work, "-n", "parts", *TWO, "--max_steps", 4), None):
        done = command("main_dream_booth.py", *(words or ["-t", "-r", find_run(work, "parts"), "--max_steps", 9]))
        assert done.returncode == 0, done.stderr
    assert last(find_run(work, "parts"))["global_step"] == 9
    assert differences(last(find_run(work, "whole")), last(find_run(work, "parts"))) == []


# --- a step is a function of its pictures, not of how processes and accumulated batches share them

PLAIN = ("data.params.num_workers=0", "--max_steps", "8", "lightning.trainer.log_every_n_steps=1")


@pytest.fixture(scope="module")
def as_one(tmp_path_factory):
    """A run of 8 steps on four pictures at once, on one process; an epoch of six photographs has four steps."""
    work = tmp_path_factory.mktemp("one")
    pictures(work / "photos", 6), pictures(work / "class", 3)
    return work, train(work, "one", *PLAIN, "data.params.batch_size=4")


def test_a_step_is_the_same_however_it_is_shared(as_one):
    work, one = as_one
    how = (*TWO, "--accumulate_grad_batches", 2, *PLAIN, "data.params.batch_size=1")
    done = command("main_dream_booth.py", *arguments(work, "-n", "shared", *how))
    assert done.returncode == 0, done.stderr
    run = find_run(work, "shared")
    for tag in ("train/loss", "train/loss_prior"):
        ours, theirs = ([e.value for e in events(r).Scalars(tag)] for r in (run, one))
        assert len(ours) == len(theirs) and ours == pytest.approx(theirs, rel=1e-5), tag
    for key, value in last(one)["state_dict"].items():
        assert torch.allclose(last(run)["state_dict"][key], value, rtol=0, atol=1e-4), key


def test_a_run_on_two_processes_goes_on_on_one(as_one):
    work, one = as_one
    words = arguments(work, "-n", "moved", *TWO, *PLAIN, "data.params.batch_size=2", "--max_steps", 5)
    assert command("main_dream_booth.py", *words).returncode == 0
    run = find_run(work, "moved")
    resume(run, "--devices", 1, "--max_steps", 8, "data.params.batch_size=4")
    for key, value in last(one)["state_dict"].items():
        assert torch.allclose(last(run)["state_dict"][key], value, rtol=0, atol=1e-4), key
    with pytest.raises(InputError, match="steps of 1 processes x batches of 4 .* now 1 x 3"):
        resume(run, "--max_steps", 9, "data.params.batch_size=3")


@pytest.mark.parametrize("victim", ["the second"])
def test_a_killed_process_ends_the_other(tmp_path, victim):
    how = ("--max_steps", "-1", "lightning.modelcheckpoint.params.every_n_train_steps=1")
    process = start("main_dream_booth.py", *arguments(tmp_path, "-n", "run", *TWO, *how))
    try:
        seen = ""
        while "epoch 0:" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        (second,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        began = time.monotonic()
        os.kill(process.pid if victim == "the first" else second, signal.SIGKILL)
        rest = process.communicate(timeout=30)[0]  # both have the pipe: it ends with the last of them
        assert time.monotonic() - began < 30
        assert "Traceback" not in rest, rest
        (line,) = [line for line in rest.splitlines() if "error:" in line]
        told = {"the first": "the first process was killed", "the second": "process 1 of 2 was killed by SIGKILL"}
        assert told[victim] in line
        assert f"go on with -r {find_run(tmp_path, 'run')}" in line
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_an_autoencoder_and_its_discriminator_train_in_two_processes(tmp_path):
    """Its two optimizers take turns, so that each backward pass leaves the other's parameters without a gradient."""
    pytest.importorskip("taming.modules.discriminator.model", reason="the discriminator needs the extra vq")
    noise = {"target": "tests.models.test_published_models.Batches"}
    config = {
        "model": {"base_learning_rate": 1e-3, **narrow(ROOT / "configs/autoencoder/autoencoder_kl_8x8x64.yaml")},
        "data": {
            "target": "ldm.train.datamodule.DataModuleFromConfig",
            "params": {"batch_size": 1, "num_workers": 0, "train": noise},
        },
    }
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    words = ["--base", tmp_path / "config.yaml", "-t", "-n", "run", "-l", tmp_path / "logs", "--max_steps", 4]
    done = command("scripts/train.py", *words, *TWO)
    assert done.returncode == 0, done.stderr
    assert last(find_run(tmp_path, "run"))["global_step"] == 4


@pytest.mark.parametrize("start", [0, 5])
def test_draws_are_disjoint_and_without_gaps(start):
    ranks = [list(ResumableBatches(3, start, batches_per_epoch=8, rank=rank, world_size=2)) for rank in range(2)]
    drawn = sorted(k for batches in ranks for batch in batches for k in batch)
    assert drawn == list(range(start * 6, 8 * 6))


@pytest.mark.parametrize("length", [1, 5, 8, 9])
def test_validation_is_shared_without_gaps(length):
    ranks = [SharedBatches(length, 2, rank, 3) for rank in range(3)]
    assert {len(list(batches)) for batches in ranks} == {len(ranks[0])}
    seen = {k for batches in ranks for batch in batches for k in batch}
    assert seen == set(range(length))
    for batches in ranks:
        for number, batch in enumerate(batches):
            first, whole = batches.rows(number)
            assert batch[0] == 6 * number + first and first + len(batch) <= whole <= 6
