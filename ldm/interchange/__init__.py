"""The files of other programs, read and written: LoRA, Custom Diffusion, learnt words, whole models.

`load_any` puts any of them into a model by looking at the file. Every format is read into a neutral form (`lora.Lora`,
`custom_diffusion.Delta`, words with vectors) and written from it; `docs/formats.md` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor, nn

from ldm.checkpoints import read_object
from ldm.errors import InputError, short
from ldm.interchange import apply, cloneofsimo, custom_diffusion, diffusers_model, embeddings, lora_keys
from ldm.interchange.lora import Lora
from ldm.modules.folders import names_adapter

KINDS = {
    "adapter": "a folder that training wrote here: position adapters and/or other families",
    "diffusers-model": "a whole model as a diffusers folder",
    "checkpoint": "the weights of a whole model",
    "cloneofsimo": "a LoRA of cloneofsimo's lora, .safetensors",
    "cloneofsimo-pt": "a LoRA of cloneofsimo's lora, .pt list",
    "diffusers": "a LoRA with the keys of diffusers or PEFT",
    "kohya": "a LoRA with the keys of kohya, which web UIs read",
    "delta": "a Custom Diffusion delta, LDM layout",
    "delta-diffusers": "a Custom Diffusion delta, diffusers layout",
    "words": "learnt words (textual inversion)",
}
LORAS = ("cloneofsimo", "cloneofsimo-pt", "diffusers", "kohya")
DELTAS = ("delta", "delta-diffusers")


def identify(path: str | Path) -> str:
    """What a file or folder is, one of `KINDS`. Raises `InputError` for anything else; unsafe files too."""
    path = lora_keys.file_of(path)
    if path.is_dir():
        if diffusers_model.is_folder(path):
            return "diffusers-model"
        published = any(names_adapter(f"{file.stem}.") for file in path.glob("*.pt"))
        if published or (path / "adapter_config.json").is_file():
            return "adapter"
        raise InputError(f"{path} is a folder with neither model_index.json, adapter_config.json nor adapters")
    content = read_object(path)
    if isinstance(content, list):
        return "cloneofsimo-pt"
    if isinstance(content, Mapping):
        if cloneofsimo.is_published(path):
            return "cloneofsimo"
        if lora_keys.is_keyed(content):
            return lora_keys.kind(content)
        if kind := custom_diffusion.kind_of(content):
            return "delta" if kind == "ldm" else "delta-diffusers"
        state = content.get("state_dict", content)
        if isinstance(state, Mapping) and any(str(key).startswith("model.diffusion_model.") for key in state):
            return "checkpoint"
        if embeddings.looks_like(content):
            return "words"
    held = list(content) if isinstance(content, Mapping) else content
    raise InputError(f"{path} is of no known kind; it holds {short(held)}")


def read_lora(path: str | Path, model: nn.Module, order: str | None = None) -> Lora:
    """A LoRA of any format, by the names of a model's layers. Raises `InputError`, also for another base model.

    `order` is one of `layers.ORDERS` and only matters for nameless formats whose shapes do not tell it.
    """
    kind = identify(path)
    if kind == "adapter":
        from ldm.interchange import own

        return own.lora(path)
    if kind in ("diffusers", "kohya"):
        return lora_keys.read(path, model)
    if kind not in LORAS:
        raise InputError(f"{path} is {KINDS[kind]}; expected a LoRA")
    content = cloneofsimo.read_safetensors(path) if kind == "cloneofsimo" else cloneofsimo.read_pt(path)
    return cloneofsimo.to_lora(content, model, str(path), order)


def load_any(
    model: nn.Module, path: str | Path, scale: float = 1.0, add: bool = False, words: Sequence[str] = ()
) -> None:
    """Put whatever a file or folder holds into a `LatentDiffusion`, at a strength.

    A file's changes are added to the weights, those of several files each with its own scale: a delta's change is what
    it is against the weights that the model had before the first file. Words have no strength. `add` lets the position
    adapters of a folder come beside those that the model has; `words` are other names for the words of a file.

    Raises `InputError` for what does not fit the model. A file that does not leaves the model as it was.
    """
    kind = identify(path)
    if kind in ("checkpoint", "diffusers-model"):
        raise InputError(f"{path} is {KINDS[kind]}, not something to add to one; give it as the model's checkpoint")
    if kind == "adapter":
        from ldm.tuning import files

        files.load(model, path, scale, add)
    elif kind == "words":
        teach(model, embeddings.read(path), words)
    elif kind in LORAS:
        lora = read_lora(path, model)
        changes = apply.lora_changes(lora, model, str(path))
        model.tuning.remember(changes)
        teach(model, lora.tokens, words)
        apply.add(model, changes, scale)
    else:
        delta = custom_diffusion.read(path)
        changes = custom_diffusion.changes(delta, model.tuning.remember(delta.weights), str(path))
        teach(model, delta.tokens, words)
        apply.add(model, changes, scale)


def dealt(words: Sequence[str], paths: Sequence[str | Path]) -> list[list[str]]:
    """Names for the words of several LoRAs and deltas: to each file, in turn, as many as it holds words.

    Our folders and files of words keep the names they have. Raises `InputError` for too few and too many.
    """
    kinds = [identify(path) if words else "" for path in paths]
    held = [words_in(path, k) if k in (*DELTAS, *LORAS) else {} for path, k in zip(paths, kinds, strict=True)]
    theirs = [word for some in held for word in some]
    if len(theirs) != len(words):
        raise InputError(
            f"{len(words)} words are named ({'+'.join(words)}), the LoRAs and deltas hold {len(theirs)}: "
            f"{'+'.join(theirs) or 'none'}"
        )
    names = iter(words)
    return [list(islice(names, len(some))) for some in held]


def words_in(path: str | Path, kind: str, names: Sequence[str] = ()) -> Mapping[str, Tensor]:
    """The learnt words in a file or folder of a kind, with their vectors [v, d]; `names` are for those of a delta."""
    from ldm.interchange import own

    readers = {"words": embeddings.read, "adapter": own.words}
    readers |= {delta: lambda path: custom_diffusion.read(path, names).tokens for delta in DELTAS}
    readers["cloneofsimo"] = lambda path: cloneofsimo.read_safetensors(path).tokens
    return readers[kind](path) if kind in readers else {}


def teach(model: nn.Module, tokens: Mapping[str, Tensor], words: Sequence[str] = ()) -> None:
    """Add learnt words to a model's text encoder, under other names if some are given."""
    if words and len(words) != len(tokens):
        held = "+".join(tokens) or "none"
        raise InputError(f"{len(words)} words are named ({'+'.join(words)}), the file holds {len(tokens)}: {held}")
    for word, vectors in zip(words or tokens, tokens.values(), strict=True):
        model.cond_stage_model.add_token(word, vectors)
