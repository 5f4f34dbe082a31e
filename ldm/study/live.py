"""What a sweep shows while it runs: a table that is drawn anew on a terminal, a line per group elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ldm.study.worker import Task

log = logging.getLogger(__name__)

SHOWN = 8  # of the last rows


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Progress:
    """Counts trials, knows how long the rest takes, and shows both."""

    def __init__(self, total: int, done: int, left: int, slots: int) -> None:
        self.total, self.before, self.left, self.slots = total, done, left, slots
        self.statuses: Counter[str] = Counter()
        self.running: dict[str, tuple[Task, float]] = {}
        self.start, self.trials_done = time.monotonic(), 0
        self.rows: list[dict[str, Any]] = []
        self.live: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            try:
                from rich.live import Live
            except ImportError:
                log.info("for a live table: pip install '.[sweep]'")
            else:
                self.live = Live(get_renderable=self.table, refresh_per_second=2)
                self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)

    def started(self, task: Task) -> None:
        self.running[task.name] = task, time.monotonic()

    def ended(self, task: Task, rows: Sequence[dict[str, Any]]) -> None:
        self.running.pop(task.name, None)
        last = {row["key"]: row for row in rows}
        self.statuses.update(row["status"] for row in last.values())
        self.trials_done += len(last)
        self.rows = [*self.rows, *last.values()][-SHOWN:]
        if self.live is None:
            log.info("%s", self.line())
        for row in last.values():
            if row["status"] == "failed":
                log.warning("trial %s failed: %s", row["trial"], row["reason"])

    def time_left(self) -> float | None:
        """Seconds, from what the trials of this run took; None before the first has ended."""
        if not self.trials_done:
            return None
        per_trial = (time.monotonic() - self.start) / self.trials_done
        return per_trial * (self.left - self.trials_done)

    def line(self) -> str:
        told = [f"{self.before + self.trials_done} of {self.total} trials"]
        told += [f"{count} {status}" for status, count in self.statuses.items() if status != "done"]
        left = self.time_left()
        return ", ".join(told + ([f"{duration(left)} left"] if left else []))

    def table(self) -> Any:
        from rich.table import Table

        table = Table(title=self.line(), title_justify="left")
        for column in ("trial", "route or family", "subject", "seed", "status", "CLIP-I", "CLIP-T", "seconds"):
            table.add_column(column)

        def cells(row: dict[str, Any], status: str) -> list[str]:
            scores = [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in ("clip_i", "clip_t")]
            seconds = f"{row['seconds']:.1f}" if row.get("seconds") else ""
            name = row.get("route") or row.get("family") or row.get("base") or ""
            return [str(row["trial"]), name, str(row["subject"]), str(row["seed"]), status, *scores, seconds]

        for row in self.rows:
            table.add_row(*cells(row, row["status"]))
        for task, since in list(self.running.values()):
            first, count = task.trials[0]["about"], len(task.trials)
            more = f" and {count - 1} more" if count > 1 else ""
            table.add_row(*cells(first, f"running{more}, {duration(time.monotonic() - since)}"))
        return table
