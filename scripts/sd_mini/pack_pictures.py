"""Pack the captioned pictures that a training draws most into one small file, for a machine without a network.

    python -m scripts.sd_mini.pack_pictures --out build/packed.tar.gz --megabytes 30

Drawings are taken as they are, those first that the config draws most; photographs are encoded again, with losses.
The weights in the packed file are those of the config, so that its reader needs no emphasis. Held-out pictures come
along.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ldm.cli import Parser, count, run_command
from ldm.config import load_config, plain
from ldm.data.captioned import read_records, row_weights
from scripts.sd_mini.build.archive import write_records

HELD_OUT = ("val_known", "val_unseen")
MEGABYTE = 10**6


def smaller(encoded: bytes, quality: int) -> bytes:
    """A picture as lossy WebP."""
    out = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(out, "webp", quality=quality, method=6)
    return out.getvalue()


def chosen(options, parameters) -> Iterator[tuple[dict, bytes]]:
    """Records and pictures that fit, the held-out ones first."""
    left = options.megabytes * MEGABYTE
    for record, encoded in read_records(options.data, set(HELD_OUT)):
        left -= len(encoded)
        yield record, encoded
    rows = list(read_records(options.data, {"train"}))
    weights = row_weights(
        [record for record, _ in rows], parameters.get("shares"), {}, parameters.get("group_emphasis") or {}
    ).tolist()
    photos = [i for i, (record, _) in enumerate(rows) if record["kind"] == "photo"][: options.photos]
    for i in photos:
        record, encoded = rows[i][0], smaller(rows[i][1], options.quality)
        left -= len(encoded)
        yield record | {"weight": parameters["shares"]["photo"] / len(photos)}, encoded
    drawings = sorted((i for i, (record, _) in enumerate(rows) if record["kind"] != "photo"), key=lambda i: -weights[i])
    for i in drawings:
        left -= len(rows[i][1])
        if left < 0:
            break
        yield rows[i][0] | {"weight": weights[i]}, rows[i][1]


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="build/captioned/captioned.tar.gz")
    parser.add_argument("--draws_config", default="configs/sd-mini/train/balanced.yaml", help="what is drawn how often")
    parser.add_argument("--out", type=Path, default=Path("build/packed.tar.gz"))
    parser.add_argument("--megabytes", type=count, default=30, help="of encoded pictures")
    parser.add_argument("--photos", type=count, default=8000)
    parser.add_argument("--quality", type=count, default=95, help="of the photographs")
    options = parser.parse_args(arguments)
    parameters = plain(load_config(options.draws_config).data.params.train.params)
    total = write_records(options.out, chosen(options, parameters))
    print(f"{options.out}: {total} pictures, {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
