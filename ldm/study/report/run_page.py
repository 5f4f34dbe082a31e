"""The report of one run of `ldm train`: its losses, sample pictures, config, and scores where it has some."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.pictures import find_pictures
from ldm.errors import InputError, first_line
from ldm.evaluate.sources import read_run, subject_of
from ldm.files import read_json, read_text
from ldm.study.report import plots
from ldm.study.report.content import Cell, Page, Plot, Section, Table, as_table, plain
from ldm.study.report.pictures import PHOTOGRAPHS, Album, shown
from ldm.study.report.summary import duration, plural, signed

STEP = re.compile(r"(\d{1,9})\.png")
SMOOTHING = 0.9  # of the line through a loss: exponential mean, corrected for its start
POINTS = 2000  # of a curve; longer ones are thinned
LOSS = re.compile(r"(^|/)(train/)?loss|loss")
SCALARS_BYTES = 2**28


def is_run(path: Path) -> bool:
    """Whether a path is the folder of one training."""
    return (path / "configs" / "project.yaml").is_file()


def page_of(folder: Path, album: Album) -> Page:
    """The page of a run. Raises `InputError` for a folder that is none."""
    scalars = read_scalars(folder)
    scores = read_scores(folder)
    samples = samples_of(folder)
    sections, notes = [], []
    losses = {name: values for name, values in scalars.items() if LOSS.search(name)}
    others = {name: values for name, values in scalars.items() if name not in losses}
    if losses:
        sections.append(Section("loss", "Loss", plots=[
            curves_of("loss", "Loss over steps", losses, f"Points are what was logged, the line is their exponential "
                      f"mean ({SMOOTHING:g})." )]))  # fmt: skip
    else:
        notes.append("No losses were found: the run has no TensorBoard files.")
    if others:
        sections.append(Section("logged", "What else was logged", plots=[
            curves_of("logged", "Logged values over steps", others, "Learning rates and other values.", smooth=False)
        ]))  # fmt: skip
    if scores:
        sections.append(Section("scores", "Scores", ["Means over prompts and pictures with 95 % intervals."],
                                _score_plots(scores), [score_table(scores)]))  # fmt: skip
    wall = _wall(folder, samples, album, notes)
    if wall:
        sections.append(Section("wall", "Sample pictures", [
            "What the run drew while it trained, always from the same seeds.", *notes], wall=wall))  # fmt: skip
        notes = []
    sections.append(Section("source", "Source", notes, tables=[_checkpoints(folder)], code=_code(folder)))
    headline, *lead = _sentences(losses, scores, samples)
    return Page(folder.resolve().name, "run", headline, lead, _tiles(folder, losses, scores), sections)


# --- what is in the folder


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of what TensorBoard was given. Files that it cannot read count as absent."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        if sum(path.stat().st_size for path in place.glob("events.out.tfevents.*")) > SCALARS_BYTES:
            raise InputError(f"{place} has more than {SCALARS_BYTES} bytes of TensorBoard files")
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((one.step, one.value) for one in events.Scalars(name))
    return {name: sorted(dict(values).items()) for name, values in sorted(found.items()) if name != "epoch"}


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """What `scores.json` holds, by step; nothing where there is none. Raises `InputError` for another kind of file."""
    path = folder / "scores.json"
    if not path.is_file():
        return []
    found = read_json(path)
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) and isinstance(one.get("scores"), dict) for one in found):
        raise InputError(f"{path} has no scores; expected what ldm evaluate writes")
    for one in found:
        for name, value in one["scores"].items():
            if not (isinstance(value, dict) and isinstance(value.get("mean"), (int, float))):
                raise InputError(f"{path}: {name} has no mean; expected what ldm evaluate writes")
    return sorted(found, key=lambda one: one.get("step") or 0)


def samples_of(folder: Path) -> list[tuple[int, Path]]:
    """(step, grid of sample pictures) in their order."""
    found = [
        (int(match[1]), path) for path in (folder / "images").glob("*.png") if (match := STEP.fullmatch(path.name))
    ]
    return sorted(found)


def _prompt_of(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return str(getattr(picture, "text", {}).get("prompt") or "samples")
    except Exception:  # Pillow's decoders raise a dozen kinds
        return "samples"


def _wall(
    folder: Path, samples: Sequence[tuple[int, Path]], album: Album, notes: list[str]
) -> Mapping[str, Any] | None:
    try:
        subject = subject_of(read_run(folder))
        photographs = find_pictures(subject.data_root)[:PHOTOGRAPHS] if subject.data_root else []
    except InputError as error:
        photographs = []
        notes.append(f"The photographs are not shown: {first_line(error)}.")
    numbers = shown(photographs, album)
    trials = [{
        "config": f"step {step}", "subject": "the subject", "seed": 0, "step": step, "told": [("step", str(step))],
        "pictures": [{"prompt": _prompt_of(path), "seed": "", "told": [], "drawn": number, "base": None}],
    } for step, path in samples if (number := album.add(path)) is not None]  # fmt: skip
    if album.left_out:
        notes.append(
            f"{plural(album.left_out, 'picture')} left out: the limit is {album.limit / 2**20:g} MB (--max_mb)."
        )
    return (
        {"subjects": {"the subject": numbers}, "trials": trials, "uris": album.uris, "grids": True} if trials else None
    )


# --- figures and tables


def curves_of(
    name: str, title: str, curves: Mapping[str, Sequence[tuple[int, float]]], text: str, smooth: bool = True
) -> Plot:
    """What was logged, a choice for each name."""
    choices = {}
    for number, (label, values) in enumerate(curves.items()):
        values = values[:: max(1, len(values) // POINTS)]
        steps, own = [step for step, _ in values], [value for _, value in values]
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        traces: list[dict[str, Any]] = [{
            "type": "scatter", "mode": "markers" if smooth else "lines+markers", "x": steps, "y": own,
            "showlegend": False, "marker": {"color": colour, "size": 5, "opacity": 0.55}, "line": {"color": colour},
        }]  # fmt: skip
        if smooth:
            traces.append({"type": "scatter", "mode": "lines", "x": steps, "y": smoothed(own), "showlegend": False,
                           "line": {"color": colour, "width": 2.5}})  # fmt: skip
        axis: dict[str, Any] = {"title": {"text": plain(label)}}
        if len(set(own)) == 1 and own[0] > 0:
            axis["range"] = [0, 2 * own[0]]  # plotly would show 0.001 between -1 and 1
        choices[label] = {"data": traces, "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": axis}}
    rows = []
    for label, values in curves.items():
        told = (values[0][1], min(value for _, value in values), values[-1][1])
        rows.append([label, Cell(str(len(values)), len(values)), *(Cell(f"{value:.5g}", value) for value in told)])
    table = as_table(title, ["value", "times logged", "first", "least", "last"], rows)
    return Plot(name, title, text, choices, table, next(iter(choices)), "value")


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """The exponential mean of values, corrected for its start (Kingma and Ba, arXiv 1412.6980, section 3)."""
    mean, found = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        found.append(mean / (1 - weight**count))
    return found


def _score_plots(scores: Sequence[Mapping[str, Any]]) -> list[Plot]:
    if len(scores) < 2:
        return []
    choices = {}
    for name in scores[0]["scores"]:
        own = [(one.get("step") or 0, one["scores"][name]) for one in scores if name in one["scores"]]
        bars = [[_reach(value, end) for _, value in own] for end in ("high", "low")]
        choices[name] = {
            "data": [{"type": "scatter", "mode": "lines+markers", "x": [step for step, _ in own],
                      "y": [value["mean"] for _, value in own], "line": {"color": plots.COLOURS[0], "width": 2},
                      "error_y": {"type": "data", "array": bars[0], "arrayminus": bars[1], "thickness": 1}}],
            "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": plain(name)}}},
        }  # fmt: skip
    return [
        Plot(
            "scores", "Scores over steps", "Bars are 95 % intervals.", choices, score_table(scores), next(iter(choices))
        )
    ]


def _reach(value: Mapping[str, Any], end: str) -> float:
    """How far the interval of a score goes from its mean to one end."""
    return 0.0 if value.get(end) is None else abs(value[end] - value["mean"])


def score_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each score, a column for each checkpoint."""
    names = list(dict.fromkeys(name for one in scores for name in one["scores"]))
    columns = ["score", *(f"step {one.get('step')}" for one in scores)]
    rows = [[name, *(_score(one["scores"].get(name)) for one in scores)] for name in names]
    return as_table("Scores", columns, rows)


def _score(value: Mapping[str, Any] | None) -> Cell:
    if value is None:
        return Cell("–")
    mean, low, high = value["mean"], value.get("low"), value.get("high")
    interval = f" [{signed(low)}, {signed(high)}]" if low is not None and high is not None else ""
    return Cell(signed(mean) + interval, mean)


def _checkpoints(folder: Path) -> Table:
    rows = []
    for path in sorted((folder / "checkpoints").glob("*-adapters"), key=lambda path: (len(path.name), path.name)):
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        rows.append([path.name, Cell(f"{size / 1024:,.0f} KiB", size)])
    return as_table("Saved checkpoints", ["folder", "size"], rows or [["none", "–"]])


def _code(folder: Path) -> list[tuple[str, str]]:
    config = read_text(folder / "configs" / "project.yaml").strip()
    head = [line.removeprefix("#").strip() for line in config.splitlines() if line.startswith("#")]
    command = [("Command", "\n".join(head))] if head else []
    return [*command, ("Config", config)]


def _sentences(
    losses: Mapping[str, Sequence[tuple[int, float]]], scores: Sequence[Mapping[str, Any]], samples: Sequence[Any]
) -> list[str]:
    found = []
    if losses:
        name, values = next(iter(losses.items()))
        smooth = smoothed([value for _, value in values])
        tenth = max(1, len(values) // 10)
        start, end = (sum(v for _, v in part) / len(part) for part in (values[:tenth], values[-tenth:]))
        found.append(
            f"{name} was logged {plural(len(values), 'time')} up to step {values[-1][0]}: {start:.4g} on average "
            f"over the first tenth, {end:.4g} over the last; its exponential mean ends at {smooth[-1]:.4g}."
        )
    if scores:
        last = scores[-1]
        shown = [f"{name} {_score(value).text}" for name, value in list(last["scores"].items())[:4]]
        found.append(f"Scores at step {last.get('step')}: {', '.join(shown)}.")
    else:
        found.append("The run has no scores: ldm evaluate, with --out scores.json in its folder, adds them.")
    if samples:
        found.append(f"Sample pictures of {plural(len(samples), 'step')}, from {samples[0][0]} to {samples[-1][0]}.")
    return found


def _tiles(
    folder: Path, losses: Mapping[str, Sequence[tuple[int, float]]], scores: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    found = []
    if losses:
        name, values = next(iter(losses.items()))
        found += [
            ("last logged step", f"{values[-1][0]:,}"),
            (f"{name}, smoothed", f"{smoothed([v for _, v in values])[-1]:.4g}"),
        ]
    if scores:
        found += [(name, signed(value["mean"])) for name, value in list(scores[-1]["scores"].items())[:3]]
        if isinstance(scores[-1].get("seconds"), (int, float)):
            found.append(("of scoring", duration(scores[-1]["seconds"])))
    count = len(list((folder / "checkpoints").glob("*-adapters")))
    return [*found, ("checkpoints", f"{count:,}")]
