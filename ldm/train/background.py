"""Start, pause, resume and stop a training that runs in the background at the lowest priority.

Its folder holds `background.json`, which identifies the process, and `output.log`, which has its output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ldm.checkpoints import atomic_write
from ldm.errors import InputError, explain

RUNNING, PAUSED, ENDED = "running", "paused", "ended"
STATE, OUTPUT = "background.json", "output.log"


@dataclass(frozen=True)
class Background:
    """A process, identified by its number and its start time, because the system reuses numbers."""

    pid: int
    started: float  # seconds since the epoch, as psutil has it
    threads: int

    @property
    def process(self) -> psutil.Process | None:
        """The process; None once it has ended."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None

    @property
    def state(self) -> str:
        """`RUNNING`, `PAUSED` or `ENDED`."""
        process = self.process
        if process is None:
            return ENDED
        return PAUSED if process.status() == psutil.STATUS_STOPPED else RUNNING


def read(folder: str | Path) -> Background:
    """Read the training of a folder. Raises `InputError` if none was started or the file is malformed."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise InputError(f"nothing was started in {folder}: expected {path}; begin with start, or name its --folder")
    with explain(f"{path} does not describe a process; delete it and start again", ValueError, TypeError, OSError):
        state = Background(**json.loads(path.read_text()))
        if [type(value) for value in asdict(state).values()] != [int, float, int] or state.pid < 2:
            raise ValueError(f"its values are {state}")
    return state


def start(folder: str | Path, command: Sequence[str], threads: int) -> Background:
    """Start a command at nice 19 in its own session, so that it survives the terminal.

    Its output is appended to `output.log` in the folder. Raises `InputError` if the folder's last command still runs.
    """
    folder = Path(folder)
    if (folder / STATE).is_file() and (old := read(folder)).state != ENDED:
        raise InputError(f"{folder} has a training that is {old.state} (process {old.pid}); stop it first")
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # At low priority a thread may wait long for another one. Spinning would cost several times the work of a step.
    waiting = {"OMP_WAIT_POLICY": "passive"}
    with explain(f"{folder} cannot be written to", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        output = (folder / OUTPUT).open("ab")
    with output, explain(f"{command[0]} cannot be started", OSError):
        process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**waiting, **os.environ, **counts},
        )
    state = Background(process.pid, psutil.Process(process.pid).create_time(), threads)
    with atomic_write(folder / STATE) as beside:
        beside.write_text(json.dumps(asdict(state)) + "\n")
    return state


def pause(folder: str | Path) -> Background:
    """Pause the training and its children (SIGSTOP); they keep their memory. Raises `InputError`."""
    return _signalled(_alive(folder), signal.SIGSTOP)


def resume(folder: str | Path) -> Background:
    """Continue a paused training (SIGCONT). Raises `InputError`."""
    return _signalled(_alive(folder), signal.SIGCONT)


def stop(folder: str | Path, seconds: float) -> Background:
    """Ask the training to save and end (SIGTERM), and wait for it; it may be paused. Raises `InputError`.

    Only the first process gets the signal; it tells its children.
    """
    state = _alive(folder)
    with suppress(ProcessLookupError):
        os.kill(state.pid, signal.SIGTERM)
    _signalled(state, signal.SIGCONT)  # a paused process would not hear it
    deadline = time.monotonic() + seconds
    while state.state != ENDED:
        if time.monotonic() > deadline:
            raise InputError(
                f"process {state.pid} has not ended within {seconds:g} s; it will end after its current step: "
                "wait, and ask report"
            )
        time.sleep(0.1)
    return state


def last_line(folder: str | Path, limit: int = 200) -> str:
    """The last line of the output; for a progress bar, its latest state."""
    path = Path(folder) / OUTPUT
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:limit] for line in reversed(lines) if line.strip()), "")


def _alive(folder: str | Path) -> Background:
    state = read(folder)
    if state.state == ENDED:
        raise InputError(f"the training in {folder} has ended (process {state.pid}); start goes on with it")
    return state


def _signalled(state: Background, number: signal.Signals) -> Background:
    with suppress(ProcessLookupError):  # it has ended this moment
        os.killpg(state.pid, number)  # `start` made it the leader of a group
    return state
