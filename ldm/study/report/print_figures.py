"""The figures of a report for print, as PNG and SVG: learning curves, fidelity against drift, those of the analysis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.checkpoints import atomic_write
from ldm.errors import InputError
from ldm.study import figures
from ldm.study.anova import Design
from ldm.study.report.facts import Facts, less_is_better
from ldm.study.report.plots import styles
from ldm.study.report.sweep_page import Report

DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3)),
          "longdashdot": (0, (8, 3, 2, 3))}  # fmt: skip
MARKS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "star": "*", "hexagon": "h",
         "triangle-down": "v", "x": "X", "pentagon": "p"}  # fmt: skip


def draw(report: Report, folder: Path) -> list[str]:
    """Write every figure that the results allow; what could not be drawn, as sentences."""
    facts = report.facts
    if "curves" in report.plots:
        save(folder, "curves", lambda axes: curves(axes, facts))
    if "front" in report.plots:
        save(folder, "front", lambda axes: front(axes, facts))
    if report.analysis is None:
        return ["figures of the analysis: not drawn, there is none"]
    found = report.analysis
    try:
        return figures.draw(Design(facts.last, found.metric, found.factors, found.block), folder)
    except InputError as error:
        return [f"figures of the analysis: not drawn, {error}"]


def save(folder: Path, name: str, plot: Callable[[Any], None]) -> None:
    """Draw on new axes and write them as PNG and SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure.add_subplot())
    for ending in ("png", "svg"):
        with atomic_write(folder / f"{name}.{ending}") as beside:
            figure.savefig(beside, format=ending, dpi=150)


def curves(axes: Any, facts: Facts) -> None:
    """The fidelity over steps, a line for each config, its interval as a band."""
    style = styles(facts.configs)
    for one in facts.configs:
        colour, dash, symbol = style[one.label]
        points = sorted(one.curves[facts.fidelity].items())
        steps = [step for step, _ in points]
        axes.plot(steps, [mean.mean for _, mean in points], color=colour, linestyle=DASHES[dash], marker=MARKS[symbol],
                  markersize=4, label=verbatim(one.label))  # fmt: skip
        if len(facts.configs) <= 4:
            bounds = [(step, mean.low, mean.high) for step, mean in points if mean.low is not None]
            axes.fill_between(*zip(*bounds, strict=True), color=colour, alpha=0.15) if bounds else None
    axes.set(xlabel="step", ylabel=verbatim(facts.fidelity))
    axes.legend(fontsize=7)


def front(axes: Any, facts: Facts) -> None:
    """Fidelity against drift with intervals, the Pareto front as a line through ringed points."""
    style, drift = styles(facts.configs), str(facts.drift)
    names = {one.label for one in facts.front}
    axes.plot([one.means[drift].mean for one in facts.front], [one.means[facts.fidelity].mean for one in facts.front],
              ":", color="#8a8f98", label="Pareto front", zorder=1)  # fmt: skip
    for one in (config for config in facts.configs if drift in config.means):
        colour, _, symbol = style[one.label]
        x, y = one.means[drift], one.means[facts.fidelity]
        bars = {name: [[mean.mean - mean.low], [mean.high - mean.mean]] for name, mean in (("xerr", x), ("yerr", y))
                if mean.low is not None and mean.high is not None}  # fmt: skip
        marked = one.label in names
        axes.errorbar(x.mean, y.mean, **bars, color=colour, marker=MARKS[symbol], markersize=9 if marked else 6,
                      markeredgecolor="black" if marked else colour, linestyle="none", elinewidth=0.8,
                      label=verbatim(one.label))  # fmt: skip
    better = "" if less_is_better(facts.fidelity) else " (more is better)"
    axes.set(xlabel=f"{verbatim(drift)} (less is better)", ylabel=f"{verbatim(facts.fidelity)}{better}")
    axes.legend(fontsize=7)


def verbatim(text: str) -> str:
    """A text without formulas: matplotlib takes what stands between dollars for one."""
    return text.replace("$", r"\$").lstrip("_")
