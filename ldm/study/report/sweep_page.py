"""The report of a sweep: facts, analyses and pictures put into the sections of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.errors import InputError
from ldm.files import read_text
from ldm.study import analysis
from ldm.study.analysis import Analysis
from ldm.study.observations import read_results
from ldm.study.report import plots, summary
from ldm.study.report.content import BigTable, Cell, Filter, Page, Plot, Section, Table, as_table
from ldm.study.report.facts import BLOCKS, Config, Facts, absent, look_at, short
from ldm.study.report.pictures import Album, Wall, parsed, wall_of

FACTORS = ("reads", "writes")
FILTERED = ("route", "family", "subject", "seed", "status")  # if they vary; and all other settings
VALUES = 40  # more different ones are searched, not chosen from
PAIRS = 10  # of levels, the clearest
COMMAND_BYTES = 2**20


@dataclass
class Report:
    """What is reported of a sweep, for the page and for print."""

    source: Path
    facts: Facts
    sentences: list[str]
    analysis: Analysis | None
    plots: dict[str, Plot]
    wall: Wall | None
    notes: list[str] = field(default_factory=list)


def report_on(
    path: str | Path,
    album: Album,
    fidelity: str | None = None,
    drift: str | None = None,
    photographs: str | None = None,
) -> Report:
    """Look at a table of results and at the folder that it lies in. Raises `InputError`."""
    path = Path(path)
    source = path / "results.parquet" if path.is_dir() else path
    facts = look_at(read_results(source), fidelity, drift)
    notes = list(facts.notes)
    found = _analysis(facts, notes)
    sentences = summary.sentences(facts)
    if found is not None:
        sentences[2:2] = [f"{line}." for line in analysis.conclusion(found)]
    wall = wall_of(facts, source.parent, album, photographs)
    if wall is None:
        notes.append("There are no pictures beside the table: the sweep kept none, or only the table was copied.")
    return Report(source, facts, sentences, found, plots.plots(facts), wall, notes)


def _analysis(facts: Facts, notes: list[str]) -> Analysis | None:
    """The analysis of variance of the fidelity by the factors that vary; None, with a note, where there is none."""
    factors = [name for name in FACTORS if name in facts.last and facts.last[name].nunique() > 1]
    if not factors:
        factors = [name for name in facts.settings if facts.last[name].nunique() > 1][:1]
    if not factors:
        notes.append("No analysis of variance: there is one config.")
        return None
    block = "subject" if facts.last["subject"].nunique() > 1 else None
    try:
        return analysis.analyse(facts.last, facts.fidelity, factors, block, with_power=True)
    except (InputError, ValueError, np.linalg.LinAlgError) as error:
        notes.append(f"No analysis of variance: {error}.")
        return None


def page_of(report: Report) -> Page:
    """The page of a sweep."""
    facts, made = report.facts, report.plots
    sections = [
        Section("configs", "Configs", _about_means(facts), [made["heat-map"]] if "heat-map" in made else [],
                [config_table(facts)]),
    ]  # fmt: skip
    if report.analysis is not None:
        sections.append(_anova_section(report.analysis))
    for name, title in (("curves", "Learning curves"), ("front", "Fidelity against drift")):
        if name in made:
            sections.append(Section(name, title, plots=[made[name]]))
    if report.wall is not None:
        sections.append(Section("wall", "Pictures", [
            "A row for each config, a column for each prompt and seed: what stands in a column differs in its config "
            "alone. A click or Enter enlarges a picture beside a photograph and what the base draws.",
            *report.wall.notes], wall=report.wall.as_json()))  # fmt: skip
    sections += [
        Section("trials", "Trials", big=all_rows(facts)),
        Section("source", "Source", report.notes, tables=[_versions(facts)], code=_commands(report)),
    ]
    title = report.source.resolve().parent.name if report.source.name == "results.parquet" else report.source.stem
    headline, *lead = report.sentences
    return Page(title, "sweep", headline, lead, _tiles(facts), sections)


def _about_means(facts: Facts) -> list[str]:
    """What the means are of, and whether they compare."""
    several = facts.last["subject"].nunique() > 1
    over = ", bootstrapped over subjects, then over the trials of each" if several else ""
    found = [f"Means of the last checkpoints with 95 % intervals{over}."]
    met = {frozenset(zip(own["subject"], own["seed"], strict=True)) for _, own in facts.last.groupby("config_label")}
    if len(met) > 1:
        found.append("The configs did not meet the same subjects and seeds: their means do not quite compare.")
    elif len(facts.configs) > 1:
        found.append(
            "All configs met the same subjects and seeds, so that a difference between two of them is known better "
            "than either mean: see the analysis."
        )
    return found


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    first = facts.configs[0]
    found = [("trials", f"{len(facts.last):,}"), ("configs", f"{len(facts.configs):,}"),
             ("subjects", f"{facts.last['subject'].nunique():,}"), ("seeds", f"{facts.last['seed'].nunique():,}"),
             (f"best {facts.fidelity}", summary.signed(first.means[facts.fidelity].mean))]  # fmt: skip
    if facts.seconds is not None:
        found.append(("of training and scoring", summary.duration(facts.seconds)))
    return found


# --- tables


def config_table(facts: Facts) -> Table:
    """A row for each config, the best first."""
    rows = [[Cell(one.label), Cell(str(one.trials), one.trials), *_means(facts, one), *_cost(one)]
            for one in facts.configs]  # fmt: skip
    columns = ["config", "trials", *facts.metrics, "parameters", "seconds", "memory"]
    empty = {number for number in range(len(columns)) if all(row[number].text == "–" for row in rows)}
    rows = [[cell for number, cell in enumerate(row) if number not in empty] for row in rows]
    columns = [name for number, name in enumerate(columns) if number not in empty]
    return Table("Means of each config", columns, rows, frozenset(range(1, len(columns))))


def _means(facts: Facts, one: Config) -> list[Cell]:
    means = [one.means.get(metric) for metric in facts.metrics]
    return [Cell("–") if mean is None else Cell(summary.value(mean), mean.mean) for mean in means]


def _cost(one: Config) -> list[Cell]:
    return [
        Cell("–") if one.parameters is None else Cell(f"{one.parameters:,}", one.parameters),
        Cell("–") if one.seconds is None else Cell(summary.duration(one.seconds), one.seconds),
        _memory(one.memory),
    ]


def _memory(number: float | None) -> Cell:
    return Cell("–") if number is None else Cell(f"{number / 2**30:.2f} GiB", number)


def all_rows(facts: Facts) -> BigTable:
    """Every row of the results, with what they may be filtered by; earlier checkpoints are hidden at first."""
    frame = facts.frame
    settings = [*facts.settings]
    others = [name for name in ("family", "parameters", "seconds", "peak_memory", "status") if name in frame]
    names = list(dict.fromkeys([*settings, *BLOCKS, "step", *facts.metrics, *others]))
    rows = [[_cell(name, row) for name in names] for row in frame.to_dict("records")]
    final = {*facts.last.index, *frame.index[frame["status"] == "failed"]}
    filters = []
    for number, name in enumerate(names):
        values = sorted({row[number].text for row in rows})
        if 1 < len(values) <= VALUES and (name in settings or name in FILTERED):
            filters.append(Filter(number, name, values))
    numeric = {number for number, name in enumerate(names) if pd.api.types.is_numeric_dtype(frame[name])}
    earlier = frozenset(place for place, index in enumerate(frame.index) if index not in final)
    return BigTable(Table("All trials", names, rows, frozenset(numeric)), filters, earlier)


def _cell(name: str, row: Mapping[str, Any]) -> Cell:
    value = row[name]
    if absent(value):
        return Cell("–")
    if name == "status":
        reason = row.get("reason")
        return Cell(str(value), note="" if absent(reason) else str(reason))
    if name == "peak_memory":
        return _memory(float(value))
    if name == "step":
        return Cell(f"{value:.0f}", float(value))
    if isinstance(value, float):
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        note = "" if absent(low) or absent(high) else f"[{low:.3f}, {high:.3f}]"
        return Cell(f"{value:.3f}" if f"{name}_low" in row else short(value), value, note)
    if isinstance(value, (int, np.integer)):
        return Cell(f"{value:,}" if name == "parameters" else str(value), int(value))
    return Cell(str(value))


# --- the analysis


def _anova_section(found: Analysis) -> Section:
    tables = [
        as_table(heading, analysis.EFFECT_COLUMNS, [analysis.effect_row(one) for one in effects])
        for heading, effects in found.tables.items()
    ]
    rows = [[one.name, analysis.number(one.statistic), analysis.p_value(one.p), one.note] for one in found.tests]
    more = [as_table("other tests", ["test", "statistic", "p", "note"], rows)]
    for name, pairs in found.pairs.items():
        best = sorted(pairs, key=lambda pair: pair.p_tukey)[:PAIRS]
        which = f", the {len(best)} clearest of {len(pairs)}" if len(best) < len(pairs) else ""
        more.append(as_table(
            f"pairs of {name}{which}", ["pair", "difference", "p Tukey", "p Holm"],
            [[f"{one.a} − {one.b}", summary.signed(one.difference, 4), analysis.p_value(one.p_tukey),
              analysis.p_value(one.p_holm)] for one in best],
        ))  # fmt: skip
    if found.power:
        rows = [[name, str(count), f"{power:.2f}"] for name, powers in found.power.items()
                for count, power in powers.items()]  # fmt: skip
        more.append(as_table("power, if the effects are as large as here", ["factor", "observations", "power"], rows))
    design = ". ".join(line[0].upper() + line[1:] for line in (*found.design, *found.notes))
    text = [*(f"{line}." for line in analysis.conclusion(found)), f"{design}."]
    folded = "Mixed model, checks, ranks, pairs of levels, power"
    return Section("anova", "Analysis of variance", text, tables=tables, more=(folded, more))


# --- where it comes from


COLUMNS = ("commit", "code", "device", "threads", "finished", "batch_size")  # of results, on how they were made


def _versions(facts: Facts) -> Table:
    """What the rows say about how they were made: each value once."""
    rows = [(name, text) for name in COLUMNS if (text := _span(name, _different(facts, name)))]
    rows += [row for text in _different(facts, "versions") for row in _named(text)]
    rows += [(f"{name}, network", said) for text in _different(facts, "networks") for name, said in _named(text)]
    return as_table("Versions", ["what", "which"], list(dict.fromkeys(rows)), 2)


def _different(facts: Facts, column: str) -> list[str]:
    return sorted({str(value) for value in facts.frame.get(column, ()) if not absent(value)})


def _span(name: str, values: list[str]) -> str:
    """The values in words; of points in time, the first and the last."""
    return " to ".join((values[0], values[-1])) if name == "finished" and len(values) > 1 else ", ".join(values)


def _named(text: str) -> list[tuple[str, str]]:
    """The names and values of a mapping in JSON; what is a mapping itself as its values."""
    found = parsed(text)
    pairs = found.items() if isinstance(found, dict) else ()
    return [(name, " ".join(map(str, one.values())) if isinstance(one, dict) else str(one)) for name, one in pairs]


def _commands(report: Report) -> list[tuple[str, str]]:
    """The commands that made the results, and what all configs have in common."""
    found = []
    path = report.source.parent / "commands.txt"
    if path.is_file():
        found.append(("Commands", read_text(path, COMMAND_BYTES).strip()))
    configs = [parsed(text) for text in report.facts.frame.get("config", ()) if not absent(text)]
    if configs and (common := shared([one for one in configs if isinstance(one, dict)])):
        found.append(("What all configs have in common", as_yaml(common)))
    return found


def shared(values: Sequence[Any]) -> Any:
    """What mappings have in common, level by level; None where nothing is."""
    first = values[0] if values else None
    if all(isinstance(one, dict) for one in values) and values:
        keys = [key for key in first if all(key in one for one in values[1:])]
        found = {key: shared([one[key] for one in values]) for key in keys}
        return {key: value for key, value in found.items() if value is not None} or None
    return first if all(one == first for one in values[1:]) else None


def as_yaml(value: Any) -> str:
    """Plain values as YAML."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True, width=110).strip()
