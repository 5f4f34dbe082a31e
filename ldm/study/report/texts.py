"""The summary of a sweep as Markdown and its tables as LaTeX, to be put into a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ldm.study.analysis import as_latex as analysis_as_latex
from ldm.study.analysis import as_markdown as analysis_as_markdown
from ldm.study.analysis import latex
from ldm.study.report.content import Table
from ldm.study.report.sweep_page import Report, config_table

# What Markdown gives a meaning, or HTML within it.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!])")
SIGNS = {"\N{MINUS SIGN}": "$-$", "–": "--", "·": r"\textperiodcentered{}", "→": r"$\rightarrow$"}


def markdown_text(text: str) -> str:
    """A text as Markdown prints it, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(one if one == "---" else markdown_text(one) for one in line) + " |" for line in lines]


def as_markdown(report: Report) -> str:
    """Summary, table of configs, analysis of variance, notes."""
    table = config_table(report.facts)
    lines = [f"# {markdown_text(report.source.resolve().parent.name)}", ""]
    lines += [f"- {markdown_text(sentence)}" for sentence in report.sentences]
    lines += ["", "## Configs", "", *markdown_table(table.columns, _texts(table)), ""]
    if report.analysis is not None:
        lines += [analysis_as_markdown(report.analysis).replace("\n## ", "\n### ").replace("# ", "## ", 1)]
    lines += [f"- {markdown_text(note)}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def as_latex(report: Report) -> str:
    """The table of configs and the tables of the analysis, each a `tabular`."""
    table = config_table(report.facts)
    rows = [list(table.columns), *_texts(table)]
    body = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in rows]
    aligned = "l" + "r" * (len(table.columns) - 1)
    lines = [rf"\begin{{tabular}}{{{aligned}}}", r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"]
    text = "% means of each config over subjects and seeds, 95 % intervals\n" + "\n".join(lines) + "\n"
    return text if report.analysis is None else f"{text}\n{analysis_as_latex(report.analysis)}"


def _latex(text: str) -> str:
    text = latex(" ".join(text.split()))
    for sign, written in SIGNS.items():
        text = text.replace(sign, written)
    return text


def _texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]
