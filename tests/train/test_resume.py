"""A run that stops and goes on is the run that never stopped: bit for bit, after signals, kills and bad losses."""

import os
import signal
import textwrap
from types import SimpleNamespace

import pytest
import torch

from ldm.checkpoints import read_object
from ldm.errors import InputError
from ldm.train.saving import SaveRun
from tests.runs import arguments, command, differences, find_run, last, main_dream_booth, resume, start, train

pytestmark = pytest.mark.slow

# The tiny config has 4 photographs, shown 3 times: 12 batches in an epoch.
VARIANTS = {
    "plain": [],
    "accumulated": ["--accumulate_grad_batches", "2"],
    "two workers": ["data.params.num_workers=2"],
    "averaged": ["model.params.use_ema=true"],
    "scheduled": [
        "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler",
        *(
            f"model.params.scheduler_config.params.{key}=[{value}]"
            for key, value in {
                "warm_up_steps": 20, "cycle_lengths": 100, "f_start": 0.1, "f_max": 1.0, "f_min": 0.5,
            }.items()
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopping_within_an_epoch_leaves_no_trace(tmp_path, variant):
    more = VARIANTS[variant]
    whole = train(tmp_path, "whole", "--max_steps", 10, *more)
    parts = train(tmp_path, "parts", "--max_steps", 5, *more)
    resume(parts, "--max_steps", 10)
    assert last(parts)["global_step"] == 10
    assert differences(last(whole), last(parts)) == []


@pytest.mark.parametrize("end", [("--max_steps",), ("--max_steps", "-1", "--max_epochs")], ids=("steps", "epochs"))
def test_stopping_at_the_end_of_an_epoch_leaves_no_trace(tmp_path, end):
    """Lightning's counts of epochs and validations included, so that `--max_epochs` means the same."""
    *words, unit = end
    once, more = ("12", "16") if "epochs" not in unit else ("1", "2")
    whole = train(tmp_path, "whole", *words, unit, more)
    parts = train(tmp_path, "parts", *words, unit, once)
    resume(parts, unit, more)
    assert last(parts)["epoch"] == 1
    assert last(parts)["global_step"] == (16 if more == "16" else 24)
    assert differences(last(whole), last(parts)) == []


@pytest.mark.parametrize("limit", ["3", "0.25"])
def test_short_epochs_go_on_with_new_draws(tmp_path, limit):
    """Batches are counted over the run: how many make an epoch decides when it validates, not what it sees."""
    free = train(tmp_path, "free", "--max_steps", 8)
    parts = train(tmp_path, "parts", "--max_steps", 4, "--limit_train_batches", limit)
    resume(parts, "--max_steps", 8)
    assert last(parts)["epoch"] == 2
    assert differences(last(free)["state_dict"], last(parts)["state_dict"]) == []


def test_a_run_may_be_resumed_by_its_checkpoint_and_with_another_learning_rate(tmp_path, caplog):
    run = train(tmp_path, "run", "--max_steps", 2)
    before = last(run)["state_dict"]
    with caplog.at_level("INFO"):
        resume(run / "checkpoints" / "last.ckpt", "--max_steps", 3, "model.base_learning_rate=1e-30")
    assert "the learning rate has changed: from step 2 on at 1e-30" in caplog.text
    assert last(run)["global_step"] == 3
    moved = [(last(run)["state_dict"][name] - value).abs().max() for name, value in before.items()]
    assert max(moved) < 1e-7  # AdamW's weight decay is of that size too
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-30
    assert "base_learning_rate: 1.0e-30" in (run / "configs" / "project.yaml").read_text()


def test_a_schedule_keeps_its_factor_at_another_learning_rate_and_may_be_another(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 3, *VARIANTS["scheduled"])
    rate = last(run)["optimizer_states"][0]["param_groups"][0]["lr"]
    base = last(run)["configured"]["rates"][0][0]
    assert rate == pytest.approx(base * (0.1 + 0.9 * 3 / 20))
    resume(run, "--max_steps", 4, f"model.base_learning_rate={base / 10}")
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(base / 10 * (0.1 + 0.9 * 4 / 20))
    resume(run, "--max_steps", 5, "model.params.scheduler_config.params.f_start=[0.5]")
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(base / 10 * (0.5 + 0.5 * 5 / 20))
    resume(run, "--max_steps", 6, "model.params.scheduler_config=null")
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == base / 10


def test_a_schedule_that_has_ended_is_not_gone_on_with(tmp_path):
    quiet = "lightning.callbacks.image_logger=null"
    run = train(tmp_path, "run", "--max_steps", 3, "schedule=cosine", quiet)
    stored = (run / "configs" / "project.yaml").read_text()
    with pytest.raises(InputError, match="schedule of this run has ended: from step 3 on the learning rate would be 0"):
        resume(run, "--max_steps", 6)
    assert (run / "configs" / "project.yaml").read_text() == stored
    before = last(run)["state_dict"]
    resume(run, "--max_steps", 4, "schedule.steps=6")
    [rate] = [group["lr"] for group in last(run)["optimizer_states"][0]["param_groups"]]
    assert rate == pytest.approx(last(run)["configured"]["rates"][0][0] * 0.25)  # half a cosine at 4 of 6
    assert differences(before, last(run)["state_dict"])


def test_options_of_the_optimizer_are_those_of_the_config_and_another_optimizer_is_refused(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 1)
    stored = (run / "configs" / "project.yaml").read_text()
    with pytest.raises(InputError, match="was trained with torch.optim.adamw.AdamW, the config now names torch.optim"):
        resume(run, "--max_steps", 2, "model.params.optimizer_config.target=torch.optim.SGD")
    assert (run / "configs" / "project.yaml").read_text() == stored
    how = "model.params.optimizer_config"
    resume(run, "--max_steps", 2, f"{how}.target=torch.optim.AdamW", f"{how}.params.weight_decay=0.5")
    assert last(run)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize("end", [("--max_steps", "2"), ("--max_epochs", "0")])
def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys, end):
    run = train(tmp_path, "run", "--max_steps", 2)
    content = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    main_dream_booth("-t", "-r", run, "--max_steps", *(end[1:] if end[0] == "--max_steps" else ("-1", *end)))
    done = "step 2 of 2" if end[0] == "--max_steps" else "epoch 0 of 0"
    assert f"already at {done}, nothing to do in {run}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == content


def test_another_run_is_refused(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 1)
    width = (
        "model.params.unet_config.params.adapter_config.transformer_adp_config=[{din: attn2o, dout: ffni, mid_dim: 5}]"
    )
    with pytest.raises(InputError, match="the checkpoint is of another run: it differs in 12 tensors"):
        resume(run, "--max_steps", 2, width)


def test_the_end_by_epochs_is_saved_too(tmp_path):
    run = train(
        tmp_path,
        "run",
        "--max_epochs",
        1,
        "--max_steps",
        -1,
        "lightning.modelcheckpoint.params.every_n_train_steps=500",
    )
    assert last(run)["global_step"] == 12
    assert (run / "checkpoints" / "12-adapters").is_dir()


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(tmp_path):
    from ldm.checkpoints import save_torch
    from tests.runs import tiny_model

    base = tmp_path / "base.ckpt"
    save_torch(base, tiny_model().state_dict())
    runs = [train(tmp_path, f"run{i}", "--actual_resume", base, "-s", seed) for i, seed in enumerate((1, 1, 2))]
    first, again, other = (last(run) for run in runs)
    assert differences(first, again) == []
    assert all(
        not torch.equal(a, b) for a, b in zip(first["state_dict"].values(), other["state_dict"].values(), strict=True)
    )


def test_looking_on_changes_nothing(tmp_path):
    """Sample pictures have noise of their own, validation its own draws; a frozen stage has no dropout."""
    logger = "lightning.callbacks.image_logger.params"
    busy = [f"{logger}.batch_frequency=2", f"{logger}.log_first_step=true", "--val_check_interval", 5]
    quiet = ["lightning.callbacks.image_logger=null", "--limit_val_batches", 0]
    dropout = ["model.params.unet_config.params.dropout=0.1", "model.params.train_level=[unet]", "--max_steps", 8]
    seen, unseen = train(tmp_path, "seen", *busy, *dropout), train(tmp_path, "unseen", *quiet, *dropout)
    assert len(list((seen / "images").iterdir())) == 5 and not list((unseen / "images").iterdir())
    for part in ("state_dict", "optimizer_states", "random_states"):
        assert differences(last(seen)[part], last(unseen)[part]) == []


# --- interruptions, each in a process of its own


def test_a_kill_in_the_middle_of_a_save_costs_nothing_but_the_steps_since(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys, torch
        save, saves = torch.save, []
        def killed(content, path, *args, **kwargs):
            saves.append(path)
            if len(saves) == 2:
                with open(path, "wb") as file:
                    file.write(b"PK half a checkpoint")
                os.kill(os.getpid(), 9)
            save(content, path, *args, **kwargs)
        torch.save = killed
        from main_dream_booth import main
        main(sys.argv[1:])
        """
    )
    accelerator = ("--accelerator", "cpu", "--max_steps", "10")
    done = command("-c", script, *arguments(tmp_path, "-n", "killed", *accelerator))
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed, whole = find_run(tmp_path, "killed"), train(tmp_path, "whole", "--max_steps", 10)
    assert last(killed)["global_step"] == 4  # every 4 steps: the save at step 8 was cut off
    resume(killed)
    assert differences(last(whole), last(killed)) == []


def wait_for(process, text: str) -> str:
    """Read what the process writes until a line has `text`; all of it."""
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"the process ended before it wrote {text!r}:\n{seen}"
        seen += line
    return seen


def running(tmp_path, *more):
    """A training without end whose first step is done, and its folder."""
    process = start(
        "main_dream_booth.py", *arguments(tmp_path, "-n", "run", "--accelerator", "cpu", "--max_steps", -1, *more)
    )
    wait_for(process, "epoch 0:")
    return process, find_run(tmp_path, "run")


ENDLESS = ("lightning.modelcheckpoint.params.every_n_train_steps=1000000",)


@pytest.mark.parametrize("number", [signal.SIGINT], ids=lambda n: n.name)
def test_asked_to_stop_it_saves_and_leaves_cleanly(tmp_path, number):
    process, run = running(tmp_path, "data.params.num_workers=1", *ENDLESS)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert f"stopped by {number.name} at step" in output and f"go on with -r {run}" in output
    step = last(run)["global_step"]
    resume(run, "--max_steps", step + 1)
    assert last(run)["global_step"] == step + 1


def test_sigusr1_saves_and_goes_on(tmp_path):
    process, run = running(tmp_path, *ENDLESS)
    process.send_signal(signal.SIGUSR1)
    wait_for(process, "epoch 1:")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert len(list((run / "checkpoints").glob("*-adapters"))) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    words = arguments(tmp_path, "-n", "run", "--accelerator", "cpu", "--max_steps", 30, "model.base_learning_rate=1e18")
    done = command(
        "main_dream_booth.py",
        *words,
        "lightning.modelcheckpoint.params.every_n_train_steps=1",
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "the loss is nan near step" in line and "learning rate 1e+18" in line and "Traceback" not in done.stderr
    run = find_run(tmp_path, "run")
    assert f"the last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}" in line
    assert all(value.isfinite().all() for value in last(run)["state_dict"].values())
    kept = max(int(path.name.split("-")[0]) for path in (run / "checkpoints").glob("*-adapters"))
    assert kept == last(run)["global_step"]


def test_weights_that_are_not_finite_are_not_kept_either(tmp_path, monkeypatch):
    """A first stage steps its optimizers itself and gives no loss to look at."""
    model = torch.nn.Linear(2, 2)
    saver = SaveRun(tmp_path, 1)
    trainer = SimpleNamespace(
        world_size=1, global_step=1, optimizers=[torch.optim.SGD(model.parameters(), lr=0.1)],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    monkeypatch.setattr(saver, "save", lambda *_: None)
    saver.step = trainer.global_step
    saver.on_train_end(trainer, model)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="a loss or a weight is not finite near step 1"):
        saver.on_train_end(trainer, model)


def test_before_the_first_checkpoint_it_says_that_there_is_none(tmp_path):
    with pytest.raises(InputError, match="no checkpoint had been written"):
        train(tmp_path, "run", "model.base_learning_rate=1.0e+30", "--max_steps", 3)


def test_checkpoints_hold_no_code(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 1)
    assert set(read_object(run / "checkpoints" / "last.ckpt")) >= {
        "state_dict",
        "optimizer_states",
        "loops",
        "random_states",
    }
