"""The analysis of a sweep as one object, in words, JSON, CSV, LaTeX and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.checkpoints import save_json, save_text
from ldm.errors import InputError
from ldm.study import anova
from ldm.study.anova import Design, Effect, Pair, Test

PAIRS_SHOWN = 15


@dataclass
class Analysis:
    """What `analyse` found."""

    metric: str
    factors: list[str]
    block: str | None
    design: list[str]  # sentences
    tables: dict[str, list[Effect]]  # heading -> lines of an ANOVA table
    tests: list[Test]  # mixed models, checks of assumptions, tests by ranks
    pairs: dict[str, list[Pair]] = field(default_factory=dict)  # factor -> pairs of its levels
    power: dict[str, dict[int, float]] = field(default_factory=dict)  # factor -> observations -> power
    notes: list[str] = field(default_factory=list)


def analyse(
    frame: pd.DataFrame, metric: str, factors: Sequence[str], block: str | None, with_power: bool = False
) -> Analysis:
    """The whole analysis of a metric: one-way, factorial, mixed, pairs, checks, ranks. Raises `InputError`."""
    design = Design(frame, metric, factors, block)
    within = f" within {block}" if design.blocks else ""
    tables, notes = {f"one-way{within}": anova.one_way(design)}, []
    if len(factors) == 2:
        for kind, name in ((2, "II"), (3, "III")):
            try:
                tables[f"factorial{within}, type {name}"] = anova.factorial(design, kind)
            except InputError as error:
                notes.append(f"factorial, type {name}: {error}")
    tests = anova.mixed(design) + anova.checks(design)
    for key in design.keys:
        tests += anova.by_ranks(design, key)
    found = Analysis(metric, list(factors), block, design.in_words(), tables, tests, notes=notes)
    for key, name in design.keys.items():
        found.pairs[name] = anova.pairs(design, key)
    if with_power:
        blocks = design.data["b"].nunique() if design.blocks else 0
        for effect, key in zip(next(iter(tables.values())), design.keys, strict=True):
            levels, count = design.data[key].nunique(), len(design.data)
            sizes = [count, 2 * count, 3 * count, 4 * count]
            found.power[effect.term] = {size: anova.power(effect, levels, size, blocks) for size in sizes}
    return found


# --- in words -------------------------------------------------------------------------------------------------------


def p_value(p: float | None) -> str:
    """A p value as papers print it."""
    if p is None or math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


EFFECT_COLUMNS = ("term", "SS", "df", "F", "p", "partial eta² [95 %]", "omega²")


def effect_row(one: Effect) -> list[str]:
    """A line of an ANOVA table as text, in the order of `EFFECT_COLUMNS`."""
    interval = f"{number(one.eta2)} [{number(one.interval[0])}, {number(one.interval[1])}]"
    return [one.term, f"{one.sum_sq:.4g}", f"{one.df}, {one.df_error}", number(one.f, 2), p_value(one.p), interval,
            number(one.omega2)]  # fmt: skip


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text that line up."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (columns, *rows)]  # fmt: skip


def conclusion(found: Analysis) -> list[str]:
    """What the first table says, a sentence for each factor."""
    lines = []
    for one in next(iter(found.tables.values())):
        if one.df < 1 or math.isnan(one.p):
            lines.append(f"{one.term}: nothing can be said of it")
            continue
        verdict = "differs" if one.p < 0.05 else "is not shown to differ"
        low, high = one.interval
        lines.append(
            f"{found.metric} {verdict} between the levels of {one.term}: F({one.df}, {one.df_error}) = {one.f:.2f}, "
            f"p {'' if one.p < 0.001 else '= '}{p_value(one.p)}, partial eta² {one.eta2:.2f} [{low:.2f}, {high:.2f}]"
        )
    return lines


def in_words(found: Analysis) -> str:
    """The analysis as plain text."""
    lines = [*conclusion(found), "", *found.design, *found.notes]
    for heading, effects in found.tables.items():
        lines += ["", heading, *text_table(EFFECT_COLUMNS, [effect_row(one) for one in effects])]
    rows = [[one.name, number(one.statistic), p_value(one.p), one.note] for one in found.tests]
    lines += ["", "other tests", *text_table(("test", "statistic", "p", ""), rows)]
    for name, pairs in found.pairs.items():
        best = sorted(pairs, key=lambda pair: pair.p_tukey)[:PAIRS_SHOWN]
        rows = [[f"{one.a} - {one.b}", f"{one.difference:+.4f}", p_value(one.p_tukey), p_value(one.p_holm)]
                for one in best]  # fmt: skip
        more = f" (the {len(best)} clearest of {len(pairs)})" if len(best) < len(pairs) else ""
        lines += ["", f"pairs of {name}{more}", *text_table(("pair", "difference", "p Tukey", "p Holm"), rows)]
    for name, powers in found.power.items():
        said = ", ".join(f"{power:.2f} with {count}" for count, power in powers.items())
        lines += ["", f"power for {name}, if its effect is as large as here: {said} observations"]
    return "\n".join(lines)


# --- files ----------------------------------------------------------------------------------------------------------

# What LaTeX gives a meaning, and how it is written as itself.
LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
         "²": r"\textsuperscript{2}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
         ">": r"\textgreater{}"}  # fmt: skip


def latex(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def as_latex(found: Analysis) -> str:
    """The ANOVA tables, each as a `tabular`."""
    parts = []
    for heading, effects in found.tables.items():
        rows = [EFFECT_COLUMNS, *(effect_row(one) for one in effects)]
        body = [" & ".join(latex(cell) for cell in row) + r" \\" for row in rows]
        parts.append("\n".join([f"% {found.metric}, {heading}".replace("\n", " "),
                                r"\begin{tabular}{lrrrrrr}", r"\hline", body[0], r"\hline", *body[1:], r"\hline",
                                r"\end{tabular}"]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def as_markdown(found: Analysis) -> str:
    """The conclusion, the design and the ANOVA tables."""
    lines = [f"# {found.metric} by {', '.join(found.factors)}", "", *(f"- {line}" for line in conclusion(found)), ""]
    lines += [f"{line}." for line in (*found.design, *found.notes)]
    for heading, effects in found.tables.items():
        rows = [list(EFFECT_COLUMNS), ["---"] * len(EFFECT_COLUMNS), *(effect_row(one) for one in effects)]
        lines += [
            "",
            f"## {heading}",
            "",
            *("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows),
        ]
    return "\n".join(lines) + "\n"


def as_dict(found: Analysis) -> dict[str, Any]:
    """The analysis as plain values; what is not a number is null."""
    return json.loads(json.dumps(asdict(found)).replace("NaN", "null").replace("Infinity", "null"))


def write(found: Analysis, folder: Path) -> None:
    """Write `anova.json`, `.csv`, `.tex` and `.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"analysis": heading, **asdict(one)} for heading, effects in found.tables.items() for one in effects]
    save_json(folder / "anova.json", as_dict(found))
    save_text(folder / "anova.csv", pd.DataFrame(rows).to_csv(index=False))
    save_text(folder / "anova.tex", as_latex(found))
    save_text(folder / "anova.md", as_markdown(found))
