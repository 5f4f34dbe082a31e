"""New words for a frozen text encoder. Their vectors are stored beside the embedding table, which does not change."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints import read_metadata, read_object, refuse_not_finite, weights_in
from ldm.errors import InputError, short

log = logging.getLogger(__name__)

Vectors = Tensor | tuple[Tensor, ...]  # [v, d] of a word; for several text encoders, one tensor for each
TOWERS = ("clip_l", "clip_g")  # names of the two text encoders in files of SDXL's words, in order
EMBEDDED = "<embed>"  # marks word tensors in the metadata of cloneofsimo's files
SCRIPT = re.compile(r"learned_embeds(_2)?((?:-steps-\d+)?\.(?:safetensors|bin))")  # of diffusers' script for SDXL
NAMELESS = ("*", "emb_params")  # the word in files of LDM and web UIs; there, the file's name is the word
WILDCARD = NAMELESS[0]  # LDM's word for what is learnt, although the vocabulary has it


class FileWord(str):
    """A word with the name of its file, `<foo>` for foo.pt. It answers to `foo`, too, as in web UIs."""

    @classmethod
    def of(cls, path: str | Path) -> FileWord:
        """The word of a file."""
        return cls.of_name(Path(path).stem)

    @classmethod
    def of_name(cls, name: str) -> FileWord:
        """The word of a name that is spelt without brackets."""
        return cls(name if is_bracketed(name) else f"<{name}>")


def is_bracketed(word: str) -> bool:
    """Whether a word is spelt `<word>`, so that no letters can belong to it beside those."""
    return word.startswith("<") and word.endswith(">")


class NewTokens(nn.Module):
    """Vectors of new tokens. Their ids begin at `first_id`; a word of several vectors has several ids."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.first_id = embedding.num_embeddings
        self.vectors = nn.ParameterDict()  # one row [1, d] for each id, by its name in the tokenizer
        self.words: dict[str, str] = {}  # word in a prompt -> the names of its ids as the tokenizer reads them
        embedding.register_forward_pre_hook(self._hide)
        embedding.register_forward_hook(self._fill_in)

    def add(self, word: str, vectors: Tensor) -> list[str]:
        """Register a word with its vectors [v, d]. Returns the names to add to the tokenizer, in the order of ids."""
        stem = "new" + str(len(self.words))
        names = [f"<{stem}-{i}>" for i in range(len(vectors))]
        for name, row in zip(names, vectors, strict=True):
            self.vectors[name] = nn.Parameter(row[None].clone(), requires_grad=False)
        self.words[word] = " ".join(names)
        return names

    def ids_of(self, word: str) -> list[int]:
        """The ids of a word."""
        names = list(self.vectors)
        return [self.first_id + names.index(name) for name in self.words[word].split()]

    def spell(self, text: str) -> str:
        """Replace each new word in a prompt by the names of its ids: longer words first, whole words only.

        Case does not count, as for all words of CLIP, unless two new words differ by it alone.
        """
        return self._pattern().sub(lambda found: self.words[self._word(found[0])], text) if self.words else text

    def used_in(self, text: str) -> list[str]:
        """The new words that a prompt uses."""
        found = self._pattern().findall(text) if self.words else []
        return list(dict.fromkeys(map(self._word, found)))

    def _pattern(self) -> re.Pattern[str]:
        words = sorted(self.words, key=len, reverse=True)
        spelt = (re.escape(w) if is_bracketed(w) else rf"(?<!\w){re.escape(w)}(?!\w)" for w in words)
        return re.compile("|".join(spelt), re.IGNORECASE)

    def _word(self, found: str) -> str:
        return found if found in self.words else next(word for word in self.words if word.lower() == found.lower())

    def _hide(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.ids = args[0]
        return (args[0].clamp(max=self.first_id - 1),)

    def _fill_in(self, _module: nn.Module, _args: tuple[Tensor], output: Tensor) -> Tensor:
        if not self.words:
            return output
        table = torch.cat(list(self.vectors.values())).to(output.dtype)
        new = F.embedding((self.ids - self.first_id).clamp(min=0), table)
        return torch.where((self.ids >= self.first_id)[..., None], new, output)


class LearnsWords(nn.Module):
    """A text encoder that takes new words. It has `new_tokens`, a `tokenizer` and a `token_embedding`."""

    new_tokens: NewTokens
    tokenizer: Any
    token_embedding: nn.Embedding

    def ids_in(self, text: str) -> list[int]:
        """The ids of a text's tokens without its start and end; for a new word those of its vectors."""
        return self.tokenizer(self.new_tokens.spell(text), add_special_tokens=False)["input_ids"]

    def add_token(self, word: str, vectors: Tensor, also: str = "") -> None:
        """Add a word with its vectors [v, d] to the encoder, and another name for it if one is given.

        Raises `InputError` for a wrong width and for a word that was added before.
        """
        table = self.token_embedding
        if vectors.dim() != 2 or vectors.shape[1] != table.embedding_dim:
            raise InputError(
                f"token {word!r}: its vectors have shape {list(vectors.shape)}, this text encoder takes "
                f"[n, {table.embedding_dim}]"
            )
        for name in filter(None, (word, also)):
            if name in self.new_tokens.words:
                raise InputError(f"token {name!r} exists already; give the new one another name")
        names = self.new_tokens.add(word, vectors.to(table.weight.device))
        self.tokenizer.add_tokens(names)
        if (ids := self.tokenizer.convert_tokens_to_ids(names)) != self.new_tokens.ids_of(word):
            raise InputError(f"the tokenizer belongs to another text encoder: it gives new words the ids {ids}")
        if also:
            self.new_tokens.words[also] = self.new_tokens.words[word]

    def load_embeddings(self, path: str | Path) -> list[str]:
        """Add the words of a textual-inversion file. Returns the words. Raises `InputError`."""
        embeddings = read_embeddings(path)
        for word, vectors in embeddings.items():
            teach({"": self}, word, vectors)
        return list(embeddings)


def readers(model: nn.Module) -> dict[str, nn.Module]:
    """The text encoders of a model that take new words, by their names in its state dict."""
    encoders = getattr(model, "text_encoders", dict)()
    return {name: encoder for name, encoder in encoders.items() if isinstance(encoder, LearnsWords)}


def teach(encoders: Mapping[str, nn.Module], word: str, vectors: Vectors) -> None:
    """Add a word to all text encoders of a model.

    Raises `InputError` for vectors of another number of encoders, and for a word of the vocabulary.
    """
    parts = vectors if isinstance(vectors, tuple) else (vectors,)
    if len(parts) != len(encoders):
        raise InputError(
            f"token {word!r} has vectors for {len(parts)} text encoder(s), this model has {len(encoders)}: "
            "it was learnt on a model of another kind"
        )
    also = word[1:-1] if isinstance(word, FileWord) and f"<{word[1:-1]}>" == word else ""
    if also and _is_known(encoders, also):
        log.warning("%s is a word of the vocabulary; in prompts it means the learnt one now, as in web UIs", also)
    elif word != WILDCARD and _is_known(encoders, word):
        raise InputError(f"the text encoder knows {word!r} already; give the learnt word another name, e.g. <{word}>")
    for encoder, own in zip(encoders.values(), parts, strict=True):
        encoder.add_token(word, own, also)


def _is_known(encoders: Mapping[str, nn.Module], word: str) -> bool:
    """Whether a word is one token of the released vocabulary."""
    return any(
        len(ids := encoder.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
        and ids[0] < encoder.new_tokens.first_id
        for encoder in encoders.values()
    )


def load_words(model: nn.Module, path: str | Path, option: str) -> list[str]:
    """Add the words of a file that `option` named to a model. Returns the words. Raises `InputError`.

    A nameless word answers to `*`, as in LDM, if it is the first one, and to the name of its file.
    """
    encoders = readers(model)
    if not encoders:
        raise InputError(f"{option}: this model has no text encoder that could learn words")
    embeddings = named_after(read_embeddings(path), path)
    for word, vectors in embeddings.items():
        teach(encoders, word, vectors)
        for encoder in encoders.values() if isinstance(word, FileWord) else ():
            encoder.new_tokens.words.setdefault(WILDCARD, encoder.new_tokens.words[word])
    return list(embeddings)


def named_after(words: Mapping[str, Vectors], path: str | Path) -> dict[str, Vectors]:
    """Words with those that have no name called after their file."""
    return {FileWord.of(path) if word in NAMELESS else word: vectors for word, vectors in words.items()}


def read_embeddings(path: str | Path) -> dict[str, Vectors]:
    """Words and their vectors [v, d] from a textual-inversion file.

    `path` may be the folder of diffusers' script.

    Reads the LDM layout (`string_to_param`, arXiv 2208.01618), a plain mapping from words to vectors (diffusers), the
    two tensors `clip_l` and `clip_g` of one word of SDXL, whose name is then that of the file (`<name>`), and the words
    in a file of cloneofsimo's lora. Raises `InputError`.
    """
    path = words_file(path)
    return embeddings_in(read_object(path), read_metadata(path), path)


def words_file(path: str | Path) -> Path:
    """The file with the words in a folder of diffusers' script for learnt words; else the path itself."""
    path = Path(path)
    files = [path / f"learned_embeds.{suffix}" for suffix in ("safetensors", "bin")]
    is_model = (path / "model_index.json").is_file()  # which that script may write into its folder, too
    return path if is_model else next((file for file in files if file.is_file()), path)


def embeddings_in(content: Any, metadata: Mapping[str, str], path: str | Path) -> dict[str, Vectors]:
    """The same from the content of a file and its metadata."""
    if EMBEDDED in metadata.values():
        held = {name: content[name] for name, kind in metadata.items() if kind == EMBEDDED and name in content}
        refuse_not_finite(held, str(path))
        return grouped(held)
    found: Any = content.get("string_to_param", content) if isinstance(content, Mapping) else None
    found = getattr(found, "_parameters", found)
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(v, Tensor) and v.dim() in (1, 2) for v in found.values())
    ):
        raise InputError(f"{path} holds no token embeddings: expected words with vectors, got {short(content)}")
    refuse_not_finite(found, str(path))
    rows = {word: value.detach().float().reshape(-1, value.shape[-1]) for word, value in found.items()}
    if set(rows) & set(TOWERS):
        return {FileWord.of(path): towers(rows, path)}
    return _of_both(rows, Path(path))


def _of_both(rows: dict[str, Tensor], path: Path) -> dict[str, Vectors]:
    """The words with the vectors of both text encoders, if the file is one of the two of diffusers' script for SDXL.

    `learned_embeds.safetensors` is for the first encoder, `learned_embeds_2.safetensors` for the second one, also with
    `-steps-500` at the end of the name; either may be given. Raises `InputError` if they do not hold the same words.
    """
    name = SCRIPT.fullmatch(path.name)
    pair = [path.with_name(f"learned_embeds{number}{name[2]}") for number in ("", "_2")] if name else []
    if not all(file.is_file() for file in pair) or not pair:
        if name and name[1]:
            raise InputError(f"{path} holds the words of SDXL's second text encoder; {pair[0].name} is not beside it")
        return rows
    other = pair[0] if name[1] else pair[1]
    held = weights_in(read_object(other), other)
    refuse_not_finite(held, str(other))
    theirs = {word: value.detach().float().reshape(-1, value.shape[-1]) for word, value in held.items()}
    one, two = (theirs, rows) if name[1] else (rows, theirs)
    if {word: len(v) for word, v in one.items()} != {word: len(v) for word, v in two.items()}:
        raise InputError(f"{pair[0]} and {pair[1].name} are not of one training: they hold {short(list(one))} and "
                         f"{short(list(two))}, or other numbers of vectors")  # fmt: skip
    return {word: (vectors, two[word]) for word, vectors in one.items()}


def towers(rows: Mapping[str, Tensor], path: str | Path) -> tuple[Tensor, ...]:
    """The vectors of one word for the text encoders of SDXL. Raises `InputError` if one is missing or differs."""
    if set(rows) != set(TOWERS) or len({len(vectors) for vectors in rows.values()}) != 1:
        raise InputError(
            f"{path}: expected one word of SDXL, {' and '.join(TOWERS)} with equally many vectors, "
            f"got {', '.join(f'{name} {list(v.shape)}' for name, v in rows.items())}"
        )
    return tuple(rows[name] for name in TOWERS)


def grouped(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group vectors by word, [v, d] each; `<s>_1`, `<s>_2`, ... are further vectors of `<s>`, as in diffusers."""
    words: dict[str, list[Tensor]] = {}
    for name in sorted(tokens, key=lambda name: (len(name), name)):
        stem, _, number = name.rpartition("_")
        words.setdefault(stem if number.isdigit() and stem in words else name, []).append(tokens[name].float())
    return {word: torch.cat([v.reshape(-1, v.shape[-1]) for v in words[word]]) for word in sorted(words)}
