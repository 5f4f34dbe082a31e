"""Early stopping, the best weights, saving by time, and how many folders of weights are kept."""

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.folders import read_folder
from ldm.train import monitor
from tests.runs import differences, events, last, resume, train

pytestmark = pytest.mark.slow

QUIET = "lightning.callbacks.image_logger=null"
OFTEN = ("--val_check_interval", 2, QUIET)  # 12 batches in an epoch


@pytest.fixture
def losses(monkeypatch):
    """Replaces the values of a metric, in the order in which they are compared."""

    def replace(*values):
        left = iter(values)
        monkeypatch.setattr(monitor.BestSoFar, "value", lambda self, trainer: next(left))

    return replace


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_run_ends_when_it_no_longer_improves_and_keeps_the_best(tmp_path, capsys, caplog, losses):
    losses(0.5, 0.3, 0.4, 0.31, 0.2)
    with caplog.at_level("INFO"):
        run = train(tmp_path, "run", "--max_steps", 100, *OFTEN, "--early_stopping", 2, "--save_best")
    assert last(run)["global_step"] == 8
    assert "stopped early at step 8: val/loss is no better after 2 more values (best at step 4: 0.3000)" in caplog.text
    assert folders(run) == ["4-adapters", "8-adapters", "best-adapters", "last.ckpt"]
    best, at4 = (read_folder(run / "checkpoints" / name) for name in ("best-adapters", "4-adapters"))
    assert best.config["step"] == 4 and best.config["val/loss"] == 0.3
    assert differences(dict(best.adapters), dict(at4.adapters)) == []
    told = capsys.readouterr().out
    assert f"adapters and checkpoints are in {run / 'checkpoints'}" in told
    assert f"the best of them are {run / 'checkpoints' / 'best-adapters'}" in told


def test_a_resumed_run_counts_on(tmp_path, losses):
    values = (0.5, 0.3, 0.4, 0.31, 0.2)
    losses(*values)
    whole = train(tmp_path, "whole", "--max_steps", 100, *OFTEN, "--early_stopping", 2)
    losses(*values)
    parts = train(tmp_path, "parts", "--max_steps", 6, *OFTEN, "--early_stopping", 2)
    assert last(parts)["callbacks"]["BestSoFar"] == {"metric": "val/loss", "best": 0.3, "best_step": 4, "without": 1}
    resume(parts, "--max_steps", 100)
    assert differences(last(whole), last(parts)) == []


def test_another_metric_of_the_log_decides_too(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 100, *OFTEN, "--early_stopping", 1, "--monitor", "train/loss",
                "--monitor_mode", "max", "lightning.monitor.min_delta=100")  # fmt: skip
    assert last(run)["global_step"] == 4  # no second value is better by 100
    logged = {event.step + 1: event.value for event in events(run).Scalars("train/loss")}
    assert last(run)["callbacks"]["BestSoFar"]["best"] == pytest.approx(logged[2])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--monitor", "val/los"], "nothing logs 'val/los'; did you mean val/loss"),
        (["data.params.validation=null"], "val/loss needs validation pictures: set data.params.validation"),
        (["lightning.monitor.patience=3"], "lightning.monitor.patience is unknown"),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path, "run", *OFTEN, "--early_stopping", 1, *words)


def test_the_newest_folders_are_kept(tmp_path):
    every = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    run = train(tmp_path, "run", "--max_steps", 5, QUIET, every, "--checkpoints_total_limit", 2)
    assert folders(run) == ["4-adapters", "5-adapters", "last.ckpt"]
    resume(run, "--max_steps", 11, "lightning.modelcheckpoint.params.total_limit=3")
    assert folders(run) == ["10-adapters", "11-adapters", "9-adapters", "last.ckpt"]


def test_averages_of_what_learns_have_folders_of_their_own(tmp_path):
    """The moving average of last.ckpt, beside the weights of the last step."""
    every = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    words = [every, "--checkpoints_total_limit", 1, *OFTEN, "model.params.use_ema=true", "--save_best"]
    run = train(tmp_path, "run", "--max_steps", 3, *words, "--monitor", "val/loss_ema")
    assert folders(run) == ["3-adapters", "3-averaged", "best-adapters", "last.ckpt"]
    learnt, mean, best = (read_folder(run / "checkpoints" / name) for name in folders(run)[:3])
    state, prefix = last(run)["state_dict"], "model.diffusion_model."
    for name, value in mean.adapters.items():
        shadow = state["model_ema." + (prefix + name).removeprefix("model.").replace(".", "")]
        assert torch.equal(value, shadow) and torch.equal(learnt.adapters[name], state[prefix + name])
    assert any(not torch.equal(value, learnt.adapters[name]) for name, value in mean.adapters.items())
    assert best.config["step"] == 2  # the only validation: its averages, not the weights of that step
    again = train(tmp_path, "again", "--max_steps", 2, *words)
    assert differences(dict(best.adapters), dict(read_folder(again / "checkpoints" / "2-averaged").adapters)) == []


def test_a_run_saves_by_time(tmp_path):
    rare = "lightning.modelcheckpoint.params.every_n_train_steps=1000"
    run = train(tmp_path, "run", "--max_steps", 3, QUIET, rare, "--save_every_minutes", 1e-9)
    assert folders(run) == ["1-adapters", "2-adapters", "3-adapters", "last.ckpt"]
    run = train(tmp_path, "later", "--max_steps", 3, QUIET, rare, "--save_every_minutes", 60)
    assert folders(run) == ["3-adapters", "last.ckpt"]
