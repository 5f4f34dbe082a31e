"""The tokenizer of OpenCLIP: CLIP's vocabulary with other cleaning, other markers, and zeros as padding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.files import read_json, read_text
from ldm.modules.encoders.claims import building, check_tokenizer
from ldm.modules.encoders.cleaning import open_clip_text
from ldm.modules.encoders.vocabulary import END, START, WORD_END, Merges, clip_vocabulary, letters_of_bytes

# The spellings of the markers in a prompt; CLIP's spellings are ordinary text here.
MARKERS = {"<start_of_text>": START, "<end_of_text>": END}
# Words: the markers, English endings, letters, single digits, and other characters except white space.
WORDS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class OpenCLIPTokenizer:
    """Prompts to ids. `folder` has a vocab.json and merges.txt; without a folder, CLIP's vocabulary is used.

    Raises `InputError` for a folder that has no vocabulary.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        import regex
        from tokenizers.models import BPE

        vocabulary, merges = clip_vocabulary() if folder is None else read_vocabulary(Path(folder))
        with building(Path(folder or ".")):
            self._pieces = BPE(vocabulary, merges, end_of_word_suffix=WORD_END)
        self._words = regex.compile(WORDS, regex.IGNORECASE)
        self._letters = letters_of_bytes()
        self._ids = lru_cache(maxsize=2**16)(self._look_up)
        self.bos_token_id, self.eos_token_id = vocabulary[START], vocabulary[END]
        self.pad_token_id = 0
        self._markers = {spelt: vocabulary[name] for spelt, name in MARKERS.items()}
        self._next_id, self._added = len(vocabulary), {}

    def add_tokens(self, names: Sequence[str]) -> None:
        """Add names; each one gets the next id."""
        for name in names:
            self._added[name] = self._next_id + len(self._added)

    def convert_tokens_to_ids(self, names: Sequence[str]) -> list[int]:
        """The ids of names that `add_tokens` added."""
        return [self._added[name] for name in names]

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, without markers around it."""
        ids: list[int] = []
        for number, piece in enumerate(self._around_added(text)):
            if number % 2:
                ids.append(self._added[piece])
                continue
            for word in self._words.findall(open_clip_text(piece)):
                ids += [self._markers[word]] if word in self._markers else self._ids(word)
        return ids

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> Any:
        """`input_ids` of one or several prompts, as transformers returns them: without padding or truncation."""
        from transformers import BatchEncoding

        frame = self._framed if add_special_tokens else list
        ids = frame(self.encode(text)) if isinstance(text, str) else [frame(self.encode(one)) for one in text]
        return BatchEncoding({"input_ids": ids})

    def padded(self, texts: Sequence[str], length: int) -> Tensor:
        """Ids [b, length]: longer prompts are cut and their last id is the end marker, shorter ones end in zeros."""
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = self._framed(self.encode(text))
            if len(ids) > length:
                ids = [*ids[: length - 1], self.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _framed(self, ids: list[int]) -> list[int]:
        return [self.bos_token_id, *ids, self.eos_token_id]

    def _around_added(self, text: str) -> list[str]:
        """The text split into pieces; every second piece is an added name."""
        names = "|".join(re.escape(name) for name in sorted(self._added, key=len, reverse=True))
        return re.split(f"({names})", text) if names else [text]

    def _look_up(self, word: str) -> tuple[int, ...]:
        letters = "".join(self._letters[byte] for byte in word.encode("utf-8"))
        return tuple(piece.id for piece in self._pieces.tokenize(letters))


def read_vocabulary(folder: Path) -> tuple[dict[str, int], Merges]:
    """`vocab.json` and `merges.txt` of a folder. Raises `InputError`."""
    check_tokenizer(folder)
    vocabulary = read_json(folder / "vocab.json")
    known = isinstance(vocabulary, dict) and all(isinstance(number, int) for number in vocabulary.values())
    if not known or not {START, END} <= vocabulary.keys():
        raise InputError(f"{folder / 'vocab.json'} is no vocabulary of CLIP: expected ids by word, {START} among them")
    lines = read_text(folder / "merges.txt").splitlines()
    pairs = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    return vocabulary, [pair for pair in pairs if len(pair) == 2]
