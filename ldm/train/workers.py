"""Ends all processes of a run within seconds, with one line, if one of them dies."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies.launchers import subprocess_script

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between checks of the other processes
GRACE = 10.0  # seconds in which a process may save and end by itself after another one has died


class Workers:
    """The other processes of a run on this machine that Lightning's launcher started.

    torchrun and SLURM end the processes that they start. `kept` returns a phrase that says what is saved.
    """

    def __init__(self, kept: Callable[[], str]) -> None:
        self.kept, self.started, self.ending = kept, [], threading.Lock()
        self.parent: int | None = None

    @contextlib.contextmanager
    def watched(self, trainer: pl.Trainer) -> Iterator[None]:
        """Within this context, this process ends if another process of the run dies."""
        environment = trainer._accelerator_connector.cluster_environment
        if trainer.world_size == 1 or not isinstance(environment, LightningEnvironment):
            yield
            return
        usual = subprocess_script._launch_process_observer  # ends all by SIGKILL, the first process too, without a word
        subprocess_script._launch_process_observer = self._watch_children
        if environment.local_rank():
            self._watch(os.getppid())
        try:
            yield
        except (Exception, SystemExit):
            self._end_if_one_is_gone()
            raise
        finally:
            subprocess_script._launch_process_observer = usual
            self.started, self.parent = [], None

    def _watch_children(self, processes: list[subprocess.Popen]) -> None:
        self.started = processes
        self._start_thread()

    def _watch(self, parent: int) -> None:
        self.parent = parent
        self._start_thread()

    def _start_thread(self) -> None:
        threading.Thread(target=self._look, daemon=True, name="watches the other processes").start()

    def gone(self) -> str | None:
        """Says which process has died, and how."""
        if self.parent is not None and os.getppid() != self.parent:
            return "the first process was killed"
        for number, process in enumerate(self.started, 1):
            if code := process.poll():
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"process {number} of {len(self.started) + 1} {how}"
        return None

    def _look(self) -> None:
        while self.started or self.parent is not None:
            if self.gone():
                time.sleep(GRACE)  # a process that waits for the dead one gets an error from its connection
                self._end_if_one_is_gone()
            time.sleep(LOOK)

    def _end_if_one_is_gone(self) -> None:
        """If a process of the run has died, end this process and its children with one line."""
        until = time.monotonic() + 4 * LOOK
        while not (which := self.gone()) and time.monotonic() < until:
            time.sleep(LOOK / 5)
        if not which:
            return
        with self.ending:
            for process in self.started:
                if process.poll() is None:
                    process.kill()
            if int(os.environ.get("LOCAL_RANK", 0)) <= 1:  # only one process logs
                log.error("error: %s, which ends all others; %s", which, self.kept())
            sys.stdout.flush(), sys.stderr.flush()
            codes = [process.returncode for process in self.started if (process.returncode or 0) > 0]
            os._exit(codes[0] if codes else 1)


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process did not answer."""
    return isinstance(error, (RuntimeError, torch.distributed.DistError)) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection", "peer")
    )
