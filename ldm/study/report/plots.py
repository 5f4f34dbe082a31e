"""The interactive figures of a sweep as plotly's plain values. Colours of text and axes are the page's, by its theme.

Colour says where an adapter reads, dashes and symbols where it writes: what the paper asks is seen at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.evaluate.intervals import Interval
from ldm.study.figures import in_order
from ldm.study.report.content import Cell, Plot, as_table, plain
from ldm.study.report.facts import Config, Facts, less_is_better
from ldm.study.report.summary import value

# Of one lightness (OKLCH 0.6): each has a contrast of 3:1 or more to the white and to the dark page.
COLOURS = ("#3280dd", "#d16022", "#19966e", "#ca488f", "#9163d5", "#a0881e", "#db4241", "#0090a9", "#679725", "#b243ba")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down", "x", "pentagon")


def styles(configs: Sequence[Config]) -> dict[str, tuple[str, str, str]]:
    """(colour, dash, symbol) of each config by its label."""
    reads = in_order({one.reads for one in configs if one.reads})
    writes = in_order({one.writes for one in configs if one.writes})
    by_route = len({(one.reads, one.writes) for one in configs}) == len(configs) and len(reads) > 1
    found = {}
    for number, one in enumerate(configs):
        if by_route and one.reads and one.writes:
            colour, other = reads.index(one.reads), writes.index(one.writes)
        else:
            colour, other = number, number // len(COLOURS)
        found[one.label] = (COLOURS[colour % len(COLOURS)], DASHES[other % len(DASHES)], SYMBOLS[other % len(SYMBOLS)])
    return found


def plots(facts: Facts) -> dict[str, Plot]:
    """Every figure that the results allow, by name."""
    makers = {"heat-map": heat_map, "curves": curves, "front": front}
    made = {name: make(facts) for name, make in makers.items()}
    return {name: plot for name, plot in made.items() if plot is not None}


# --- input x output


def heat_map(facts: Facts) -> Plot | None:
    """The mean of a score for each input (rows) and output (columns) of the adapters; None without routes."""
    if not facts.has_routes:
        return None
    routed = [one for one in facts.configs if one.reads and one.writes]
    rows, columns = in_order({one.reads for one in routed}), in_order({one.writes for one in routed})
    cells = {metric: route_means(facts, metric) for metric in facts.metrics}
    choices = {metric: _heat(metric, rows, columns, table) for metric, table in cells.items()}
    pairs = sorted(cells[facts.fidelity], key=lambda pair: (rows.index(pair[0]), columns.index(pair[1])))
    table = as_table(
        "Means by input and output", ["reads", "writes", *facts.metrics],
        [[*pair, *(_number(cells[metric].get(pair)) for metric in facts.metrics)] for pair in pairs], 2,
    )  # fmt: skip
    several = len(routed) > len(cells[facts.fidelity])
    return Plot(
        "heat-map", "Input × output", "The mean over subjects and seeds of the last checkpoints. An empty field is a "
        "route that was not run or cannot be: nothing is written before it is read."
        + (" Configs of one route that differ in something else are averaged." if several else "")
        + " A click on a field shows its trials in the table.", choices, table, facts.fidelity,
    )  # fmt: skip


def _heat(
    metric: str, rows: Sequence[str], columns: Sequence[str], table: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    routes = [[(row, column) for column in columns] for row in rows]
    values = [[table.get(route) for route in line] for line in routes]
    texts = [
        [
            f"{plain(' → '.join(route))}<br>{plain(metric)} {table[route]:.3f}" if route in table else ""
            for route in line
        ]
        for line in routes
    ]
    trace = {
        "type": "heatmap", "z": values, "x": [plain(one) for one in columns], "y": [plain(one) for one in rows],
        "customdata": [["-".join(route) for route in line] for line in routes], "hovertext": texts, "hoverinfo": "text",
        "texttemplate": "%{z:.3f}", "xgap": 3, "ygap": 3, "hoverongaps": False, "colorscale": "Viridis",
        "reversescale": less_is_better(metric),
        "colorbar": {"thickness": 12, "outlinewidth": 0, "title": {"text": plain(metric), "side": "right"}},
    }  # fmt: skip
    axis = {"showgrid": False, "type": "category"}
    layout = {
        "xaxis": {"title": {"text": "writes to"}, **axis},
        "yaxis": {"title": {"text": "reads from"}, "autorange": "reversed", **axis},
    }
    return {"data": [trace], "layout": layout}


def route_means(facts: Facts, metric: str) -> dict[tuple[str, str], float]:
    """The mean of a score by input and output."""
    scored = facts.last.dropna(subset=["reads", "writes", metric])
    means = scored.groupby(["reads", "writes"])[metric].mean()
    return {(str(reads), str(writes)): float(mean) for (reads, writes), mean in means.items()}


# --- learning curves


def curves(facts: Facts) -> Plot | None:
    """A score over steps, a line for each config; None with one checkpoint per trial."""
    if not any(len(one.curves[facts.fidelity]) > 1 for one in facts.configs):
        return None
    style = styles(facts.configs)
    choices = {metric: {"data": [_curve(one, metric, style[one.label]) for one in facts.configs if one.curves[metric]],
                        "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": plain(metric)}},
                                   "hovermode": "closest"}} for metric in facts.metrics}  # fmt: skip
    rows = [
        [one.label, Cell(str(step), step), *(_interval(one.curves[metric].get(step)) for metric in facts.metrics)]
        for one in facts.configs
        for step in sorted(one.curves[facts.fidelity])
    ]
    return Plot(
        "curves", "Each config over the steps", "Means over the trials of a config that have this checkpoint, with "
        "95 % intervals in the hover. A click on a name of the legend hides it; two show it alone.", choices,
        as_table("Means by config and step", ["config", "step", *facts.metrics], rows), facts.fidelity,
    )  # fmt: skip


def _curve(one: Config, metric: str, style: tuple[str, str, str]) -> dict[str, Any]:
    colour, dash, symbol = style
    points = sorted(one.curves[metric].items())
    return {
        "type": "scatter", "mode": "lines+markers", "name": plain(one.label), "hoverinfo": "text",
        "x": [step for step, _ in points], "y": [mean.mean for _, mean in points],
        "hovertext": [f"{plain(one.label)}<br>step {step}<br>{plain(metric)} {value(mean)}" for step, mean in points],
        "line": {"color": colour, "dash": dash, "width": 2}, "marker": {"symbol": symbol, "size": 7},
    }  # fmt: skip


# --- fidelity against drift


def front(facts: Facts) -> Plot | None:
    """Fidelity against drift, a point for each config with intervals, the Pareto front marked."""
    if facts.drift is None or not facts.front:
        return None
    style, names = styles(facts.configs), {one.label for one in facts.front}
    line = {
        "type": "scatter", "mode": "lines", "name": "Pareto front", "hoverinfo": "skip",
        "x": [one.means[facts.drift].mean for one in facts.front],
        "y": [one.means[facts.fidelity].mean for one in facts.front],
        "line": {"color": "#8a8f98", "width": 2, "dash": "dot"},
    }  # fmt: skip
    points = [
        _point(facts, one, style[one.label], one.label in names) for one in facts.configs if facts.drift in one.means
    ]
    rows = [[one.label, _interval(one.means[facts.fidelity]), _interval(one.means.get(facts.drift)),
             "yes" if one.label in names else "no"] for one in facts.configs]  # fmt: skip
    layout = {"xaxis": {"title": {"text": f"{plain(facts.drift)} (less is better)"}, "zeroline": True},
              "yaxis": {"title": {"text": plain(facts.fidelity)}}, "hovermode": "closest"}  # fmt: skip
    return Plot(
        "front", "Each config in both", "Up and to the left is better. No other config is better in both than those "
        "on the front (ringed). Bars are 95 % intervals.",
        {facts.fidelity: {"data": [line, *points], "layout": layout}},
        as_table("Fidelity and drift of each config", ["config", facts.fidelity, facts.drift, "on the front"], rows),
        facts.fidelity,
    )  # fmt: skip


def _point(facts: Facts, one: Config, style: tuple[str, str, str], marked: bool) -> dict[str, Any]:
    colour, _, symbol = style
    fidelity, drift = one.means[facts.fidelity], one.means[facts.drift or ""]
    told = "<br>".join(
        [plain(one.label), f"{plain(facts.fidelity)} {value(fidelity)}", f"{plain(facts.drift)} {value(drift)}"]
    )
    return {
        "type": "scatter", "mode": "markers", "name": plain(one.label), "hoverinfo": "text",
        "hovertext": [told + ("<br>on the Pareto front" if marked else "")],
        "x": [drift.mean], "y": [fidelity.mean], "error_x": _bars(drift, colour), "error_y": _bars(fidelity, colour),
        "marker": {"color": colour, "symbol": symbol, "size": 13 if marked else 9,
                   "line": {"width": 3 if marked else 0, "color": "ring"}},
    }  # fmt: skip


def _bars(interval: Interval, colour: str) -> Mapping[str, Any]:
    if interval.low is None or interval.high is None:
        return {"visible": False}
    return {"type": "data", "array": [interval.high - interval.mean], "arrayminus": [interval.mean - interval.low],
            "color": colour, "thickness": 1, "width": 3}  # fmt: skip


def _interval(interval: Interval | None) -> Cell:
    return Cell("–") if interval is None else Cell(value(interval), interval.mean)


def _number(number: float | None) -> Cell:
    return Cell("–") if number is None else Cell(f"{number:.3f}", number)
