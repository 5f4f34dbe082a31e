"""Report on a sweep or a run: one self-contained HTML page with plots, tables and pictures.

    ldm report sweeps/first/results.parquet --out page.html
    ldm report logs/<run> --out run.html

The page needs no network: plots, numbers and pictures are in it. Of a sweep also --figures DIR (PNG and SVG),
--latex FILE and --markdown FILE; see docs/reports.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser, count
from ldm.errors import InputError

MB = 2**20


def add_arguments(p: Parser) -> None:
    p.add_argument("path", type=Path, metavar="RESULTS|RUN",
                   help="results.parquet (or .csv) of a sweep, its folder, or the folder of a run")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="HTML", help="the page (default: report.html beside what it is about)")
    p.add_argument("--metric", help="score that ranks the configs (default: clip_i, or the first that there is)")
    p.add_argument("--drift", metavar="SCORE", help="score that the front sets against it (default: a prior drift)")
    p.add_argument("--photographs", metavar="DIR",
                   help="where a folder of photographs for each subject lies (default: where they were)")  # fmt: skip
    p.add_argument(
        "--size", type=count, metavar="PIXELS", help="of pictures, at most (default 256; grids of a run: 1024)"
    )
    p.add_argument("--max_mb", type=count, default=12, help="of pictures in the page, at most (default 12)")
    p.add_argument("--figures", type=Path, metavar="DIR", help="also write the figures as PNG and SVG there")
    p.add_argument("--latex", type=Path, metavar="FILE", help="also write the tables as LaTeX")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="also write the summary as Markdown")


def run(options: argparse.Namespace) -> None:
    try:
        import plotly  # noqa: F401 (its script is put into the page)

        from ldm.study.report import print_figures, render, run_page, sweep_page, texts
        from ldm.study.report.pictures import Album
    except ImportError as error:
        raise InputError(f"ldm report needs {error.name}: pip install 'position-adapters-ldm[report]'") from None
    from ldm.checkpoints import save_text

    is_run = run_page.is_run(options.path)
    album = Album(options.max_mb * MB, options.size or (1024 if is_run else 256))
    written: list[Path] = []
    if is_run:
        for option in ("metric", "drift", "photographs", "figures", "latex", "markdown"):
            if getattr(options, option):
                raise InputError(f"--{option} is for the results of a sweep; {options.path} is a run")
        page = run_page.page_of(options.path, album)
    else:
        report = sweep_page.report_on(options.path, album, options.metric, options.drift, options.photographs)
        page = sweep_page.page_of(report)
        if options.figures:
            for note in print_figures.draw(report, options.figures):
                print(note)
            written.append(options.figures)
        for path, text in ((options.latex, texts.as_latex), (options.markdown, texts.as_markdown)):
            if path:
                save_text(path, text(report))
                written.append(path)
    folder = options.path if options.path.is_dir() else options.path.parent
    out = options.out or folder / "report.html"
    save_text(out, render.render(page))
    print("\n".join([page.headline, *page.lead]))
    for path in (*written, out):
        print(path)
