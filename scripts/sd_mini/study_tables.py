"""The tables of docs/study.md, from the scores in docs/study.

    python -m scripts.sd_mini.study_tables

writes every table between its marks again: the mean over all trainings of a row, and its standard error over subjects.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from ldm.checkpoints import save_text
from ldm.errors import InputError
from ldm.study.observations import read_results

PAGE = Path(__file__).parents[2] / "docs" / "study.md"
SCORES = {"clip_i": "CLIP-I", "efficientnet_i": "EfficientNet", "clip_t": "CLIP-T", "clip_prior_shift": "prior drift"}
FAMILIES = {
    "position": "position adapters attn2o-ffni", "unet": "full UNet", "lora": "LoRA, rank 4",
    "cross-attention+modifier-tokens": "Custom Diffusion", "textual-inversion": "textual inversion",
}  # fmt: skip


def scored(rows: pd.DataFrame) -> list[str]:
    """Each score of some trainings as text: the mean, and its standard error over the subjects."""
    of_subjects = rows.groupby("subject")[list(SCORES)].mean()
    errors = of_subjects.std(ddof=1) / len(of_subjects) ** 0.5
    return [f"{rows[name].mean():.3f} ± {errors[name]:.3f}" for name in SCORES]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by(rows: pd.DataFrame, keys: list[str], named: Callable[..., list[str]], columns: Sequence[str]) -> str:
    """A row for each value of the keys, best CLIP-I first."""
    groups = sorted(rows.groupby(keys), key=lambda group: -group[1]["clip_i"].mean())
    lines = [[*named(*key), f"{own['parameters'].iloc[0]:,}", *scored(own)] for key, own in groups]
    return markdown([*columns, "weights", *SCORES.values()], lines)


def routes(rows: pd.DataFrame) -> str:
    return by(rows, ["route"], lambda route: [f"`{route}`"], ["route"])


def baselines(rows: pd.DataFrame) -> str:
    return by(rows, ["family", "lr"], lambda family, lr: [FAMILIES[family], f"{lr:g}"], ["family", "learning rate"])


def forms(rows: pd.DataFrame) -> str:
    """A row for each adapter: what differs from the usual one of its route."""
    usual = ["scale", "method", "mid_dim"]
    return by(rows, ["route", *usual], lambda route, *values: [f"`{route}`", *_short(values)],
              ["route", "scale", "activation", "width"])  # fmt: skip


def _short(values: Sequence[float | str]) -> list[str]:
    scale, method, width = values
    return [f"{scale:g}", {"default": "ReLU", "ident": "none", "sig": "sigmoid", "silu": "SiLU"}[method], f"{width:g}"]


TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "positions": routes, "positions-fast": routes, "baselines": baselines, "forms": forms,
}  # fmt: skip


def filled(page: str, folder: Path) -> str:
    """The page with every table between `<!-- name -->` and `<!-- end -->` made from `<name>.csv`."""
    for name, table in TABLES.items():
        text = table(read_results(folder / f"{name}.csv"))
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = place.subn(rf"\g<1>\n{text}\n\n\g<2>", page)
        if count != 1:
            raise InputError(f"the page has {count} places for the table {name}: expected one after <!-- {name} -->")
    return page


if __name__ == "__main__":
    save_text(PAGE, filled(PAGE.read_text(), PAGE.with_suffix("")))
    sys.exit(0)
