"""LoRAs and learnt words in diffusers' pipelines."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import save_torch
from ldm.compat.lora_diffusion.files import (
    load_safeloras_both,
    monkeypatch_or_replace_safeloras,
    read_words,
    save_lora_weight,
    save_safeloras_with_embeds,
)
from ldm.compat.lora_diffusion.layers import (
    DEFAULT_TARGET_REPLACE,
    TEXT_ENCODER_DEFAULT_TARGET_REPLACE,
    injected,
)
from ldm.errors import InputError
from ldm.interchange import cloneofsimo as cs

log = logging.getLogger(__name__)


@torch.no_grad()
def apply_learned_embed_in_clip(
    learned_embeds: Mapping[str, Tensor],
    text_encoder: nn.Module,
    tokenizer: Any,
    token: str | Sequence[str] | None = None,
    idempotent: bool = False,
) -> str | None:
    """Add learnt words to the tokenizer and their vectors [d] or [v, d] to the text encoder.

    token: other names for the words, in order. idempotent: a word that the tokenizer knows gets the new vector; without
    it, the new word gets the first free name `<word-1>`, ... A word of several vectors becomes the tokens `<word>`,
    `<word>_1`, ..., and a prompt must name all of them. Returns the name of the last token.
    Raises `InputError` for another number of names than of words, and for vectors of another width.
    """
    names = list(learned_embeds) if token is None else [token] if isinstance(token, str) else list(token)
    if len(names) != len(learned_embeds):
        raise InputError(f"{len(names)} names for {len(learned_embeds)} learnt words")
    rows = [
        (f"{name}_{number}" if number else name, vector)
        for name, vectors in zip(names, learned_embeds.values(), strict=True)
        for number, vector in enumerate(vectors.reshape(-1, vectors.shape[-1]))
    ]
    width = text_encoder.get_input_embeddings().weight.shape[1]
    for name, vector in rows:
        if len(vector) != width:
            raise InputError(f"the word {name} has a vector of width {len(vector)}, this text encoder one of {width}")
    last = None
    for name, vector in rows:
        last = _added(name, tokenizer, idempotent)
        if len(tokenizer) > len(text_encoder.get_input_embeddings().weight):
            text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = text_encoder.get_input_embeddings().weight
        weight[tokenizer.convert_tokens_to_ids(last)] = vector.to(weight)
    return last


def _added(name: str, tokenizer: Any, idempotent: bool) -> str:
    """The name of the word in the tokenizer."""
    free, number = name, 0
    while tokenizer.add_tokens(free) == 0 and not idempotent:
        number += 1
        free = f"{name[:-1]}-{number}>" if name.endswith(">") else f"{name}-{number}"
    if free != name:
        log.warning("the tokenizer has the word %s already; the new one is %s", name, free)
    return free


def load_learned_embed_in_clip(
    learned_embeds_path: str | Path,
    text_encoder: nn.Module,
    tokenizer: Any,
    token: str | Sequence[str] | None = None,
    idempotent: bool = False,
) -> str | None:
    """`apply_learned_embed_in_clip` of a `.pt` file {word: vector}."""
    return apply_learned_embed_in_clip(read_words(learned_embeds_path), text_encoder, tokenizer, token, idempotent)


def _words_beside(path: str | Path) -> Path:
    """The file with the words of a `.pt` LoRA: `name.ti.pt` beside `name.pt`."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.pt')}.ti.pt")


def patch_pipe(
    pipe: Any,
    maybe_unet_path: str | Path,
    token: str | None = None,
    r: int = 4,
    patch_unet: bool = True,
    patch_text: bool = True,
    patch_ti: bool = True,
    idempotent_token: bool = True,
    unet_target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE,
    text_target_replace_module: Collection[str] = TEXT_ENCODER_DEFAULT_TARGET_REPLACE,
) -> dict[str, Tensor]:
    """Put a `.safetensors` or `.pt` LoRA into a pipeline, with its text encoder's part and its learnt words.

    For `name.pt`, these are in `name.text_encoder.pt` and `name.ti.pt`. Ranks are those of the tensors; `r` is unused.
    Set the strengths with `tune_lora_scale(pipe.unet, ...)` and `(pipe.text_encoder, ...)`. Returns the learnt words.
    Raises `InputError` for a LoRA that does not fit.
    """
    path = Path(maybe_unet_path)
    wanted = {"unet": patch_unet, "text_encoder": patch_text}
    if path.suffix == ".pt":
        words = read_words(_words_beside(path)) if patch_ti and _words_beside(path).is_file() else {}
        content = cs.read_pt(path)
        classes = {"unet": unet_target_replace_module, "text_encoder": text_target_replace_module}
        parsed = {
            part: ([tensor for one in factors for tensor in (one.up, one.down)], [], list(classes[part]))
            for part, factors in content.factors.items()
        }
    elif path.suffix == ".safetensors":
        parsed, words = load_safeloras_both(path)
    else:
        raise InputError(f"{path}: expected a LoRA as .safetensors or .pt")
    monkeypatch_or_replace_safeloras(pipe, {part: one for part, one in parsed.items() if wanted[part]})
    if patch_ti and words:
        apply_learned_embed_in_clip(words, pipe.text_encoder, pipe.tokenizer, token, idempotent_token)
    return words


def save_all(
    unet: nn.Module,
    text_encoder: nn.Module,
    save_path: str | Path,
    placeholder_token_ids: Sequence[int] | None = None,
    placeholder_tokens: Sequence[str] | None = None,
    save_lora: bool = True,
    save_ti: bool = True,
    target_replace_module_text: Collection[str] = TEXT_ENCODER_DEFAULT_TARGET_REPLACE,
    target_replace_module_unet: Collection[str] = DEFAULT_TARGET_REPLACE,
    safe_form: bool = True,
) -> None:
    """Save the LoRAs of both models and the vectors of learnt words; with `safe_form` as one `.safetensors`.

    Without it, the files are `name.pt`, `name.text_encoder.pt` and `name.ti.pt`. Raises `InputError` for a `save_path`
    with the wrong suffix, and for words without ids.
    """
    path, suffix = Path(save_path), ".safetensors" if safe_form else ".pt"
    if path.suffix != suffix:
        raise InputError(f"save_path: expected a name that ends in {suffix} with safe_form={safe_form}, got {path}")
    words = _vectors_of(text_encoder, placeholder_tokens or (), placeholder_token_ids or ()) if save_ti else {}
    found = {
        "unet": (unet, target_replace_module_unet),
        "text_encoder": (text_encoder, target_replace_module_text),
    }
    found = {part: one for part, one in found.items() if save_lora and injected(*one)}
    if not found and not words:
        raise InputError(f"{path}: nothing to save; no LoRA is in the models, and no learnt word is named")
    if safe_form:
        save_safeloras_with_embeds(found, words, path)
        return
    for part, (model, classes) in found.items():
        save_lora_weight(model, path if part == "unet" else cs.text_beside(path), classes)
    if words:
        save_torch(_words_beside(path), words)


def _vectors_of(text_encoder: nn.Module, words: Sequence[str], ids: Sequence[int]) -> dict[str, Tensor]:
    """The vectors [d] of words by their ids. Raises `InputError` if the numbers of words and ids differ."""
    if len(words) != len(ids):
        raise InputError(f"{len(words)} placeholder_tokens and {len(ids)} placeholder_token_ids; expected as many")
    table = text_encoder.get_input_embeddings().weight.detach().cpu()
    return {word: table[number].clone() for word, number in zip(words, ids, strict=True)}


class LoRAManager:
    """Several `.safetensors` LoRAs in a pipeline at once. Their changes add up, each with its own strength.

    Their words become `<s0-0>`, `<s0-1>`, ... for the first file, `<s1-0>`, ... for the second. Raises `InputError` for
    files that change different layers, and for one whose layers have different ranks.
    """

    def __init__(self, lora_paths_list: Sequence[str | Path], pipe: Any) -> None:
        self.lora_paths_list, self.pipe = list(lora_paths_list), pipe
        if not self.lora_paths_list:
            raise InputError("LoRAManager: expected at least one file")
        contents = [cs.read_safetensors(path) for path in self.lora_paths_list]
        self.ranklist = [self._rank(content, path) for content, path in zip(contents, lora_paths_list, strict=True)]
        self.token_size_list = [len(content.tokens) for content in contents]
        joined = cs.joined(contents)
        parsed = {
            part: ([tensor for one in factors for tensor in (one.up, one.down)], [], joined.classes[part])
            for part, factors in joined.factors.items()
        }
        monkeypatch_or_replace_safeloras(pipe, parsed)
        self.parts = list(parsed)
        if joined.tokens:
            apply_learned_embed_in_clip(joined.tokens, pipe.text_encoder, pipe.tokenizer, None, idempotent=True)

    @staticmethod
    def _rank(content: cs.Published, path: str | Path) -> int:
        ranks = {one.rank for factors in content.factors.values() for one in factors}
        if len(ranks) != 1:
            raise InputError(f"{path}: expected a LoRA of one rank, got the ranks {sorted(ranks)}")
        return ranks.pop()

    def tune(self, scales: Sequence[float], text_scales: Sequence[float] | None = None) -> None:
        """Set the strength of each LoRA in the UNet and, if given, in the text encoder; one number for each file.

        As published, without `text_scales` the text encoder keeps its strengths, which are 1 at first.
        """
        for part, given in (("unet", scales), ("text_encoder", text_scales)):
            if given is None or part not in self.parts:
                continue
            if len(given) != len(self.ranklist):
                raise InputError(f"expected {len(self.ranklist)} strengths, one for each LoRA, got {len(given)}")
            diag = torch.tensor([s for s, rank in zip(given, self.ranklist, strict=True) for _ in range(rank)])
            for one in injected(getattr(self.pipe, part)).values():
                one.set_selector_from_diag(diag)

    def prompt(self, prompt: str | None) -> str | None:
        """Replace `<1>`, `<2>`, ... in a prompt by the words of the first, second, ... file."""
        for index, size in enumerate(self.token_size_list if prompt is not None else ()):
            prompt = prompt.replace(f"<{index + 1}>", "".join(f"<s{index}-{j}>" for j in range(size)))
        return prompt
