"""Trainings in the background: started, paused, resumed, stopped; what is told of their progress."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from torch.utils.tensorboard import SummaryWriter

from ldm.errors import InputError
from ldm.train import background
from ldm.train.progress import newest_run, read_progress
from scripts.sd_mini import background as command
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

COUNTING = """
import os, signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("threads", os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], flush=True)
for n in range(10**6):
    print("step", n, end="\\r", flush=True)
    time.sleep(0.01)
"""


def until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path):
    """A folder whose training, if any is left, is killed in the end."""
    yield tmp_path
    if (tmp_path / background.STATE).is_file():
        left = json.loads((tmp_path / background.STATE).read_text())
        if background.Background(**left).process is not None:
            os.killpg(left["pid"], 9)


@pytest.fixture
def counting(folder):
    """One that counts, on which SIGTERM acts already."""
    state = background.start(folder, [sys.executable, "-c", COUNTING], threads=3)
    until(lambda: background.last_line(folder).startswith("step"))
    return state


def test_it_is_nice_has_its_threads_and_a_session_of_its_own(folder, counting):
    process = counting.process
    assert process.nice() == 19
    assert os.getsid(counting.pid) == counting.pid != os.getsid(0)
    assert (folder / background.OUTPUT).read_text().startswith("threads 3 passive\n")
    assert counting.state == background.RUNNING and background.read(folder) == counting


def test_it_outlives_the_shell_that_started_it(folder):
    starter = """
import sys
from ldm.train import background
background.start(sys.argv[1], [sys.executable, "-c", sys.argv[2]], threads=1)
"""
    shell = ["sh", "-c", '"$@"; kill -HUP 0', "sh", sys.executable, "-c", starter, str(folder), COUNTING]
    subprocess.run(shell, cwd=ROOT, start_new_session=True, timeout=60)
    until(lambda: background.last_line(folder).startswith("step"))
    assert background.read(folder).state == background.RUNNING


def test_a_paused_one_stands_still_and_goes_on(folder, counting):
    background.pause(folder)
    until(lambda: counting.state == background.PAUSED)
    seen = background.last_line(folder)
    time.sleep(0.2)
    assert background.last_line(folder) == seen
    background.resume(folder)
    until(lambda: background.last_line(folder) != seen)
    assert counting.state == background.RUNNING


@pytest.mark.parametrize("paused", [False, True])
def test_stop_lets_it_save(folder, counting, paused):
    if paused:
        background.pause(folder)
    background.stop(folder, seconds=20)
    assert counting.state == background.ENDED and background.last_line(folder) == "saved"
    for act in (background.pause, background.resume, lambda where: background.stop(where, 1)):
        with pytest.raises(InputError, match="has ended"):
            act(folder)


def test_one_that_does_not_end_is_told(folder):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    background.start(folder, [sys.executable, "-c", deaf], 1)
    until(lambda: background.last_line(folder) == "deaf")
    with pytest.raises(InputError, match="has not ended within 0.2 s"):
        background.stop(folder, 0.2)


def test_a_second_one_is_refused_while_the_first_is_alive(folder, counting):
    with pytest.raises(InputError, match="training that is running"):
        background.start(folder, ["true"], 1)
    background.stop(folder, 20)
    assert background.start(folder, ["true"], 1).pid != counting.pid


def test_a_number_that_was_given_to_another_process_is_not_touched(folder):
    own = psutil.Process()
    other = {"pid": own.pid, "started": own.create_time() - 60, "threads": 1}
    (folder / background.STATE).write_text(json.dumps(other))
    assert background.read(folder).state == background.ENDED
    with pytest.raises(InputError, match="has ended"):
        background.pause(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "1", "started": 1.0, "threads": 1}',
                                     '{"pid": 0, "started": 1.0, "threads": 1}'])  # fmt: skip
def test_files_that_are_not_ours_are_refused(folder, content):
    (folder / "other").mkdir()
    (folder / "other" / background.STATE).write_text(content)
    with pytest.raises(InputError, match="does not describe a process"):
        background.read(folder / "other")


# --- progress


def make_run(folder, name, losses, max_steps=1000, pace=2.0):
    """A run as training leaves it: `losses` by logged step, `pace` seconds a step."""
    run = folder / name
    (run / "configs").mkdir(parents=True)
    (run / "configs" / "project.yaml").write_text(f"# a command\nlightning: {{trainer: {{max_steps: {max_steps}}}}}\n")
    for part in losses:
        writer = SummaryWriter(run / "tensorboard", filename_suffix=f".{len(part)}")
        for step, loss in part.items():
            writer.add_scalar("train/loss", loss, step - 1, walltime=1e9 + pace * step)
            writer.add_scalar("train/loss_vlb", 9.0, step - 1)
        writer.close()
        time.sleep(0.02)
    return run


def test_progress_of_a_run(folder):
    first = {step: 1.0 for step in range(10, 210, 10)}
    second = {step: 0.5 + 0.1 * (step % 20 == 0) for step in range(110, 310, 10)}
    progress = read_progress(make_run(folder, "2026-01-01T00-00-00_a", [first, second]))
    assert progress.step == 300 and progress.max_steps == 1000 and len(progress.losses) == 30
    (before, now) = progress.means(200)
    assert before[:2] == (0, 100) and before[2] == pytest.approx(1.0)
    assert now[:2] == (100, 300) and now[2] == pytest.approx(0.55)
    assert now[3] == pytest.approx(0.0513 / 20**0.5, rel=1e-2)
    assert progress.speed() == pytest.approx(0.5) and progress.seconds_left() == pytest.approx(1400)


def test_a_pause_does_not_change_the_speed(folder):
    run = make_run(folder, "2026-01-01T00-00-00_a", [{10: 1.0, 20: 1.0, 30: 1.0, 4000: 1.0, 4010: 1.0}], max_steps=-1)
    progress = read_progress(run)
    assert progress.speed() == pytest.approx(0.5) and progress.seconds_left() is None


def test_a_run_that_has_logged_nothing(folder):
    progress = read_progress(make_run(folder, "2026-01-01T00-00-00_a", []))
    assert progress.step == 0 and progress.speed() is None and progress.means(100) == []
    with pytest.raises(InputError, match="no folder of a run"):
        read_progress(folder)


def test_the_newest_run_is_the_one_begun_last(folder):
    assert newest_run(folder) is None
    make_run(folder, "2026-01-02T00-00-00_a", []), make_run(folder, "2026-01-01T00-00-00_b", [])
    assert newest_run(folder).name.endswith("_a")


# --- the command


def test_a_run_is_begun_and_gone_on_with(folder):
    begun = command.training(folder, ["configs/x.yaml"], ["--max_steps", "5"])
    assert begun[1:] == ["-m", "ldm", "fit", "-t", "--logdir", str(folder), "--name", "x", "--base", "configs/x.yaml",
                         "--max_steps", "5"]  # fmt: skip
    with pytest.raises(InputError, match="no run to go on with"):
        command.training(folder, [], [])
    run = make_run(folder, "2026-01-01T00-00-00_x", [])
    with pytest.raises(InputError, match="before its first checkpoint"):
        command.training(folder, [], [])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert command.training(folder, [], [])[4:] == ["-t", "-r", str(run)]


def test_report_and_signals_by_command(folder, counting, capsys):
    words = ["--folder", str(folder)]
    command.main(["report", *words])
    assert "no loss logged yet" in capsys.readouterr().out
    make_run(folder, "2026-01-01T00-00-00_x", [{step: 0.25 for step in range(10, 110, 10)}])
    command.main(["report", *words, "--window", "50"])
    told = capsys.readouterr().out
    assert told.startswith(f"running: process {counting.pid}, 3 threads")
    assert "step 100 of 1000" in told and "loss 0.25000 +- 0.00000 over steps 51 to 100" in told
    assert "0.500 steps/s, 0.5 h left" in told and "last output: step " in told
    command.main(["pause", *words])
    command.main(["resume", *words])
    command.main(["stop", *words])
    said = ["is paused", "is running", "has ended: saved"]
    assert capsys.readouterr().out.splitlines() == [f"process {counting.pid} {what}" for what in said]
    command.main(["report", *words])
    assert capsys.readouterr().out.startswith("ended: ")


@pytest.mark.parametrize("words,wrong", [
    (["pause"], "nothing was started in"),
    (["pause", "--max_steps", "5"], "pause does not take --max_steps 5"),
    (["start", "--threads", "0"], "expected a whole number of at least 1"),
])  # fmt: skip
def test_bad_input_is_told(folder, words, wrong):
    with pytest.raises(InputError, match=wrong):
        command.main([*words, "--folder", str(folder)])
    assert not list(folder.iterdir())


def test_bad_input_is_one_line_and_exit_code_2(folder):
    words = [sys.executable, "-m", "scripts.sd_mini.background", "report", "--folder", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing was started in")
    assert done.stderr.count("\n") == 1 and not done.stdout
