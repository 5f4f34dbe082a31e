"""Figures of an analysis for print: heat map of routes, boxes per factor, interaction, critical differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.checkpoints import atomic_write
from ldm.errors import InputError
from ldm.study import anova
from ldm.study.anova import Design

# The order of the data path in a block (the paper's figure 3), which heat maps keep.
POSITIONS = ("attn1i", "attn1o", "attn2i", "attn2c", "attn2o", "ffni", "ffno", "transo", "resi", "reso")


def in_order(levels: Any) -> list[str]:
    """Levels in the order of the data path where they are positions, else by name."""
    known = {name: place for place, name in enumerate(POSITIONS)}
    return sorted(map(str, levels), key=lambda level: (known.get(level, len(known)), level))


def heat_map(axes: Any, design: Design) -> None:
    """Mean of the metric for each pair of levels of two factors, rows the first, columns the second."""
    frame = _named(design)
    table = frame.pivot_table(index="f0", columns="f1", values="y", aggfunc="mean")
    table = table.reindex(index=in_order(table.index), columns=in_order(table.columns))
    image = axes.imshow(table.to_numpy(), cmap="viridis")
    middle = np.nanmean([np.nanmin(table), np.nanmax(table)])
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=7,
                      color="black" if value > middle else "white")  # fmt: skip
    axes.set_xticks(range(table.shape[1]), table.columns, rotation=45, ha="right")
    axes.set_yticks(range(table.shape[0]), table.index)
    axes.set(xlabel=design.factors[1], ylabel=design.factors[0])
    axes.figure.colorbar(image, ax=axes, label=design.metric)


def boxes(axes: Any, design: Design, key: str = "f0") -> None:
    """The metric by the levels of a factor, differences from the mean of the block where there are blocks."""
    frame = _named(design)
    values = frame["y"]
    if design.blocks:
        values = values - frame.groupby("b")["y"].transform("mean") + values.mean()
    levels = in_order(frame[key].unique())
    axes.boxplot([values[frame[key] == level] for level in levels], tick_labels=levels)
    axes.tick_params(axis="x", rotation=45)
    within = f", adjusted for {design.block}" if design.blocks else ""
    axes.set(xlabel=design.keys[key], ylabel=design.metric + within)


def interaction(axes: Any, design: Design) -> None:
    """Means of the metric over the first factor, a line for each level of the second."""
    frame = _named(design)
    table = frame.pivot_table(index="f0", columns="f1", values="y", aggfunc="mean")
    table = table.reindex(index=in_order(table.index), columns=in_order(table.columns))
    for level in table.columns:
        axes.plot(range(len(table)), table[level], marker="o", label=level)
    axes.set_xticks(range(len(table)), table.index, rotation=45, ha="right")
    axes.set(xlabel=design.factors[0], ylabel=design.metric)
    axes.legend(title=design.factors[1], fontsize=7)


def critical_differences(axes: Any, design: Design, key: str = "f0") -> None:
    """Mean ranks over blocks; levels that a bar joins are not shown to differ (Demšar 2006, figure 1)."""
    ranks, critical, blocks = anova.mean_ranks(design, key)
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    for place, (level, rank) in enumerate(ordered):
        axes.plot([rank], [-place], "o", color="black")
        axes.annotate(f"{level}  {rank:.2f}", (rank, -place), xytext=(6, 0), textcoords="offset points", va="center")
    drawn, last = 0, -1.0
    for start, (_, rank) in enumerate(ordered):
        inside = [other for _, other in ordered[start:] if other - rank <= critical]
        if len(inside) > 1 and inside[-1] > last:
            axes.plot([rank, inside[-1]], [0.8 + 0.4 * drawn] * 2, color="tab:red", linewidth=3)
            drawn, last = drawn + 1, inside[-1]
    axes.set_yticks([])
    axes.set(xlabel=f"mean rank of {design.metric} over {blocks} {design.block}s (1: best); "
                    f"critical difference {critical:.2f} at 5 %")  # fmt: skip
    axes.set_xlim(0.5, len(ordered) + 1.5)


def _named(design: Design) -> pd.DataFrame:
    return design.data.assign(**{key: design.data[key].map(labels) for key, labels in design.labels.items()})


def draw(design: Design, folder: Path) -> list[str]:
    """Write every figure that the design allows as PNG and SVG; what could not be drawn, as sentences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots: dict[str, Callable[[Any], None]] = {}
    if len(design.factors) == 2:
        plots["heat-map"] = lambda axes: heat_map(axes, design)
        plots["interaction"] = lambda axes: interaction(axes, design)
    for key, name in design.keys.items():
        plots[f"boxes-{name}"] = lambda axes, key=key: boxes(axes, design, key)
        plots[f"critical-differences-{name}"] = lambda axes, key=key: critical_differences(axes, design, key)
    notes = []
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 5), layout="constrained")
        FigureCanvasAgg(figure)
        try:
            plot(figure.add_subplot())
        except InputError as error:
            notes.append(f"{name}: not drawn, {error}")
            continue
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
        for ending in ("png", "svg"):
            with atomic_write(folder / f"{safe}.{ending}") as beside:
                figure.savefig(beside, format=ending, dpi=150)
    return notes
