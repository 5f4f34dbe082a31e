"""Child processes that get ready side by side and then work one at a time, each within a time of its own.

A child says `{"ready": seconds, "about": the machine}` as soon as it could begin. Each line that it reads is one more
go; it answers each with one line of JSON. What it prints beside that goes into its log. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Lost(Exception):
    """A child process that no longer answers; the text says why."""


class Child:
    """A child process in a session of its own, so that ending it also ends the processes that it started."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log, self.started = log, time.monotonic()
        self.answers: queue.Queue[dict | None] = queue.Queue()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                start_new_session=True, env=environment,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            try:
                self.answers.put(json.loads(line))
            except ValueError:
                continue  # cut off by its end
        self.answers.put(None)

    def go(self) -> None:
        """Ask for the next answer."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except OSError:
            pass  # its end is what `answer` finds

    def answer(self, until: float) -> dict[str, Any] | None:
        """The next answer, or None if there is none by then (of `time.monotonic`). Raises `Lost` if it has ended."""
        try:
            found = self.answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None
        if found is None:
            self.process.wait()
            raise Lost(f"ended with {self.process.returncode}: {last_line(self.log)}")
        return found

    def pause(self) -> None:
        """Stop the child and its own children until `go_on`, so that they do not disturb a timing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End the child and its own children."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass  # it has ended by itself


def last_line(log: Path) -> str:
    """The last line that a program wrote, which in Python is the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def serve(make: Callable[[], tuple[Callable[[], dict[str, Any]], dict[str, Any]]]) -> None:
    """The main loop of a child: prepare by `make`, then call the result once for each line read.

    `make` also answers what the machine is.
    """
    start = time.perf_counter()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work, about = make()
    answers.write(json.dumps({"ready": time.perf_counter() - start, "about": about}) + "\n")
    answers.flush()
    for _ in sys.stdin:
        answers.write(json.dumps(work()) + "\n")
        answers.flush()
