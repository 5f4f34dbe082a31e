"""Programs in processes that are forked after every import, so that starting one costs milliseconds."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GiB = 2**30
WRONG = "wrong: "  # begins the line of a child that found a wrong result

class Failed(Exception):
    """The attack did harm: a traceback, a hang, a wrong result, something half-written. The message says what."""


@dataclass
class Outcome:
    """How a process ended: its exit code (negative: the signal that killed it), what it wrote, what it used."""

    code: int
    text: str
    seconds: float
    memory: int  # bytes beyond those that it began with
    hung: bool = False

    @property
    def line(self) -> str:
        """The last line that it wrote."""
        return (self.text.strip().splitlines() or [""])[-1]


class Process:
    """A forked child that calls `act`. It leads a process group of its own, and both of its streams go to a file."""

    def __init__(self, act: Callable[[], int | None], folder: Path | None = None, memory: int = 6 * GiB) -> None:
        self.log = tempfile.TemporaryFile()
        self.before, self.start = resident(), time.monotonic()
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._child(act, folder, memory))

    def _child(self, act: Callable[[], int | None], folder: Path | None, memory: int) -> int:
        try:
            os.setsid()
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            for stream in (1, 2):
                os.dup2(self.log.fileno(), stream)
            if folder is not None:
                os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + memory,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = act() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Failed as failure:
            print(f"{WRONG}{failure}", flush=True)
            code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            return code  # noqa: B012 (whatever a stream says, the child ends here)

    def send(self, number: int) -> None:
        """Send a signal to the process, if it still runs."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Outcome:
        """Wait for the end; whoever takes longer is killed with all of its children."""
        hung = False
        while True:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if not hung and time.monotonic() - self.start > seconds:
                hung = True
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # workers that outlived it
        except (ProcessLookupError, PermissionError):
            pass
        self.log.seek(0)
        with self.log as log:
            text = log.read().decode(errors="replace")
        grown = max(0, used.ru_maxrss * 1024 - self.before)
        return Outcome(os.waitstatus_to_exitcode(status), text, time.monotonic() - self.start, grown, hung)


def forked(act: Callable[[], int | None], folder: Path | None = None, seconds: float = 120, **options) -> Outcome:
    """Call `act` in a child and wait for its end."""
    return Process(act, folder, **options).wait(seconds)


def program(name: str, *words: object) -> Callable[[], None]:
    """A call of a program of this repository by its file, such as `sample.py`, with a command line, to be forked."""

    def act() -> None:
        from ldm.cli import run_command

        sys.argv = [name, *map(str, words)]
        run_command(main_of(name))

    return act


def main_of(name: str) -> Callable:
    """The `main` of a program by its file."""
    import importlib

    return importlib.import_module(name.removesuffix(".py").replace("/", ".")).main


def resident() -> int:
    """Bytes of memory that this process has in use; a forked child begins with as many."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
