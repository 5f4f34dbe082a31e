"""Train in the background at nice 19; pause while something is measured; continue after any end.

    python -m scripts.sd_mini.background start --base configs/sd-mini/train/ldm-balanced.yaml --threads 2
    python -m scripts.sd_mini.background report     # step, loss, steps per second, time left
    python -m scripts.sd_mini.background pause      # SIGSTOP: keeps its memory, takes no time
    python -m scripts.sd_mini.background resume     # SIGCONT
    python -m scripts.sd_mini.background stop       # SIGTERM: saves and ends
    python -m scripts.sd_mini.background start      # goes on with the newest run: ldm fit -t -r <run>

`start` passes options that it does not know on to `ldm fit` (--max_steps 20000, a.b.c=value).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ldm.cli import Parser, count, run_command
from ldm.errors import InputError
from ldm.train import background
from ldm.train.progress import newest_run, read_progress


def training(folder: Path, base: list[str], more: list[str]) -> list[str]:
    """The command that starts a run with the configs `base` in the folder or, without any, resumes the newest run."""
    command = [sys.executable, "-m", "ldm", "fit", "-t"]
    if base:
        return [*command, "--logdir", str(folder), "--name", Path(base[0]).stem, "--base", *base, *more]
    run = newest_run(folder)
    if run is None:
        raise InputError(f"{folder} has no run to go on with; name a config with --base to begin one")
    if not (run / "checkpoints" / "last.ckpt").is_file():
        raise InputError(f"{run} ended before its first checkpoint; name its config with --base to begin again")
    return [*command, "-r", str(run), *more]


def report(folder: Path, window: int) -> str:
    """Lines that describe the training in a folder."""
    state = background.read(folder)
    lines = [f"{state.state}: process {state.pid}, {state.threads} threads; output in {folder / background.OUTPUT}"]
    run = newest_run(folder)
    progress = read_progress(run) if run else None
    if progress is None or not progress.losses:
        lines.append("no loss logged yet")
    else:
        ago = time.time() - progress.losses[-1].time
        lines.append(f"{run}: step {progress.step} of {progress.max_steps or 'no end'}, logged {ago:.0f} s ago")
        for first, last, mean, error in progress.means(window):
            lines.append(f"loss {mean:.5f} +- {error:.5f} over steps {first + 1} to {last}")
        if (speed := progress.speed()) is not None:
            left = progress.seconds_left()
            lines.append(f"{speed:.3f} steps/s" + ("" if left is None else f", {left / 3600:.1f} h left"))
    if said := background.last_line(folder):
        lines.append(f"last output: {said}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=("start", "pause", "resume", "report", "stop"))
    parser.add_argument("--folder", type=Path, default=Path("logs/background"), help="of its runs, state and output")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="start: begin a run with these configs")
    parser.add_argument("--threads", type=count, default=2, help="start: threads that it computes with")
    parser.add_argument("--window", type=count, default=500, help="report: steps over which losses are averaged")
    parser.add_argument("--wait", type=count, default=120, help="stop: seconds to wait for its end")
    options, more = parser.parse_known_args(arguments)
    if more and options.action != "start":
        raise InputError(f"{options.action} does not take {' '.join(more)}; see --help")
    folder = options.folder
    if options.action == "start":
        command = training(folder, options.base, more)
        state = background.start(folder, command, options.threads)
        print(f"started process {state.pid}; output in {folder / background.OUTPUT}")
    elif options.action == "report":
        print(report(folder, options.window))
    elif options.action == "stop":
        state = background.stop(folder, options.wait)
        print(f"process {state.pid} has ended: {background.last_line(folder)}")
    else:
        act, done = {"pause": (background.pause, "paused"), "resume": (background.resume, "running")}[options.action]
        print(f"process {act(folder).pid} is {done}")


if __name__ == "__main__":
    run_command(main)
