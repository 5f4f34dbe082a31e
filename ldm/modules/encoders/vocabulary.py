"""CLIP's vocabulary, which the package includes, for Stable Diffusion v1, 2.x and SDXL (arXiv 2103.00020)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

SHIPPED = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SIZE = 49408

Merges = list[tuple[str, str]]


def letters_of_bytes() -> dict[int, str]:
    """The printable character for each byte, in the order of the vocabulary.

    Bytes that are printable in Latin-1 map to themselves; the others map to U+0100 and following (GPT-2's table).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def clip_vocabulary() -> tuple[dict[str, int], Merges]:
    """Ids by piece, and the merges in their order. 512 pieces of a byte, a piece for each merge, and two markers."""
    lines = gzip.decompress(SHIPPED.read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1:] if line]
    letters = list(letters_of_bytes().values())
    pieces = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {piece: number for number, piece in enumerate(pieces)}, merges


@contextmanager
def shipped_folder() -> Iterator[Path]:
    """Within this context: a temporary folder with `vocab.json` and `merges.txt` for transformers."""
    vocabulary, _ = clip_vocabulary()
    markers = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    with TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (place / "merges.txt").write_bytes(gzip.decompress(SHIPPED.read_bytes()))
        (place / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, **markers}))
        yield place
