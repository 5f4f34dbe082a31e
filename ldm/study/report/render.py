"""A page as one HTML file that needs nothing else: scripts, styles, numbers and pictures are in it.

Whatever comes from files is data here. Jinja escapes it in HTML; in JSON within the page `<`, `>`, `&` and `'` are
written as escapes; the page's script sets texts, never HTML. A content security policy lets nothing run but the two
scripts whose digests it has, and lets nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from ldm.study.report.content import Page


@cache
def _part(name: str) -> str:
    return (files("ldm.study.report") / "page" / name).read_text(encoding="utf-8")


@cache
def plotly() -> tuple[str, str]:
    """plotly.js as gzip in base64, less than half its size, and the digest of what it unpacks to."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode(), digest(source)


def digest(script: bytes) -> str:
    """A script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode()


def render(page: Page) -> str:
    """The HTML of a page; the same page gives the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = _part("page.js")
    plots = [plot for section in page.sections for plot in section.plots]
    library, library_digest = plotly() if plots else ("", "")
    walls = [section.wall for section in page.sections if section.wall]
    data = {"plots": {plot.name: dict(plot.choices) for plot in plots}, "wall": walls[0] if walls else None}
    return environment.from_string(_part("page.html")).render(
        page=page, style=Markup(_part("page.css")), script=Markup(script), library=library,
        data=htmlsafe_json_dumps(finite(data), dumps=_dumps),
        script_digest=digest(script.encode()), library_digest=library_digest,
    )  # fmt: skip


def _dumps(value: Any, **more: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, **more)


def finite(value: Any) -> Any:
    """Plain values with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
