"""What a page is made of: sections of sentences, plots, tables and a wall of pictures. Nothing here knows HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the value that it is sorted by, where that is another one."""

    text: str
    order: float | str | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column. `numeric` columns are set flush right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plot:
    """An interactive figure: plotly's `{data, layout}` for each choice, and the same numbers as a table."""

    name: str
    title: str
    text: str
    choices: Mapping[str, Mapping[str, Any]]
    table: Table
    first: str = ""  # the choice that is shown at first
    choose: str = "score"  # what is chosen


@dataclass(frozen=True)
class Filter:
    """A column of the big table by which it may be filtered, and its values."""

    column: int
    name: str
    values: Sequence[str]


@dataclass(frozen=True)
class BigTable:
    """The table of all rows. `earlier` are the numbers of rows of earlier checkpoints, hidden at first."""

    table: Table
    filters: Sequence[Filter] = ()
    earlier: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A part of a page. What it lacks is not shown."""

    name: str
    title: str
    text: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    more: tuple[str, Sequence[Table]] | None = None  # tables that are folded away, and how they are called
    big: BigTable | None = None
    wall: Mapping[str, Any] | None = None  # see `pictures.Wall.as_json`
    code: Sequence[tuple[str, str]] = ()  # (heading, text)


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    kind: str  # "sweep" or "run"
    headline: str  # the sentence to read first
    lead: Sequence[str]  # the rest of the summary in words
    tiles: Sequence[tuple[str, str]]  # (what, how much)
    sections: Sequence[Section] = field(default_factory=list)


def plain(text: object) -> str:
    """A text as plotly shows it: it reads tags of HTML, which names of ours are not."""
    return html.escape(str(text), quote=False)


def as_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numeric: int = 1) -> Table:
    """A table of texts, the columns from number `numeric` on flush right."""
    cells = [[one if isinstance(one, Cell) else Cell(str(one)) for one in row] for row in rows]
    return Table(caption, columns, cells, frozenset(range(numeric, len(columns))))
