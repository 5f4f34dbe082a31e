"""The formats of files and folders, one row each, and opened files.

A format is a module with a `Codec`, and a row of `FORMATS`. This module does not import torch, so that command lines
list the rows quickly; a codec is imported when a file is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError, short
from ldm.models import bases

if TYPE_CHECKING:
    from torch import nn

    from ldm.interchange.base_choice import Choice


@dataclass(frozen=True)
class Opened:
    """An opened file: its content, and the metadata of a `.safetensors` file. For a folder, only its path.

    `given` is the path that the user named. `path` is the file that was read, e.g. PEFT's file in a folder.
    """

    given: Path
    path: Path
    content: Any = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Context:
    """What a format may need besides the file. The model of `config` is built only for formats that ask for it."""

    layers: nn.Module | None = None  # the model whose layers name a LoRA
    config: str | Path | None = None
    order: str | None = None  # the order of layers without names, one of `layers.ORDERS`
    words: Sequence[str] = ()  # names for words that have none in the file
    source: str = "the input"  # for messages
    finite: bool = True  # whether to refuse weights of a whole model that are not finite
    base: Mapping[str, Any] | None = None  # the base model's weights, for formats that hold differences from it
    bundles: bool = False  # whether to write words into the files of formats that can
    choice: Choice | None = None  # parts and weights that are chosen of a whole model

    @cached_property
    def model(self) -> nn.Module | None:
        """The model that names the layers; None if neither a model nor a config is given."""
        if self.layers is not None or self.config is None:
            return self.layers
        from ldm.interchange import layers

        return layers.skeleton(self._config)

    def checked(self, weights: Mapping[str, Any], source: Path) -> Mapping[str, Any]:
        """The weights of a whole model. Raises `InputError` for values that are not finite."""
        if self.finite:
            from ldm.checkpoints import refuse_not_finite

            refuse_not_finite(weights, str(source))
        return weights

    @property
    def ema(self) -> bool | None:
        """Which weights are chosen of a whole model, see `base_choice.Choice`."""
        return None if self.choice is None else self.choice.ema

    def completed(self, weights: Mapping[str, Any], source: Path) -> tuple[Mapping[str, Any], Collection[str]]:
        """The weights of a whole model with the chosen parts, and the names of these parts. Raises `InputError`."""
        if self.choice is None or not self.choice.paths:
            return weights, ()
        return self.choice.completed(weights, str(source), self._config)

    @property
    def params(self) -> Any:
        """`model.params` of the config."""
        return self._config.model.params

    @cached_property
    def _config(self) -> Any:
        from ldm.config import named_config

        return named_config(self.config)


@dataclass(frozen=True)
class Codec:
    """How a format is recognised, read and written.

    reads: for each form in it (of `CONTENTS`), a function of the opened file and a `Context`; without a model, layers
        keep their names in the file
        write: (path, value, context), with a value of the first of those forms; may return the written files
        file_in: the file within a folder of another program, or the path itself
        beside: other files that belong to an output
        notes: what `describe` says about a file besides its content
    """

    recognises: Callable[[Opened], bool]
    reads: Mapping[str, Callable[[Opened, Context], Any]]
    write: Callable[[Path, Any, Context], Sequence[Path] | None] | None = None
    file_in: Callable[[Path], Path] = lambda path: path
    beside: Callable[[Path], list[Path]] = lambda path: []
    notes: Callable[[Opened], dict[str, Any]] = lambda file: {}


@dataclass(frozen=True)
class Format:
    """A row: the name for commands and `identify`, a description, and the dotted name of the codec.

    `holds` are the forms that can be read from it. The first one is put into models and written.
    """

    name: str
    title: str
    target: str
    holds: tuple[str, ...]
    not_written: str = ""  # why no command writes it
    only_read: tuple[str, ...] = ()  # forms of `holds` that are not written beside the first one, unless asked
    bundles: bool = False  # whether it can have words when asked

    @property
    def codec(self) -> Codec:
        module, _, name = self.target.rpartition(".")
        return getattr(importlib.import_module(module), name)

    @property
    def form(self) -> str:
        """The form that is put into a model."""
        return self.holds[0]

    @property
    def keeps_words(self) -> bool:
        """Whether a written file has the words of what is written."""
        return "words" in self.holds and "words" not in self.only_read

    def read(self, form: str, file: Opened, context: Context | None = None) -> Any:
        """Read one of the forms from a file of this format. Raises `InputError`."""
        return self.codec.reads[form](file, context or Context())

    def write(self, path: Path, value: Any, context: Context) -> Sequence[Path]:
        """Write a value of the first form; returns the files. Raises `InputError` if the format cannot hold it."""
        return self.codec.write(path, value, context) or [path]


HERE = "ldm.interchange"

# The first format that recognises a file counts.
FORMATS = [
    Format(
        "cloneofsimo", "a LoRA of cloneofsimo's lora, .safetensors", f"{HERE}.cloneofsimo.SAFETENSORS",
        ("lora", "words"),
    ),
    Format("cloneofsimo-pt", "a LoRA of cloneofsimo's lora, .pt list", f"{HERE}.cloneofsimo.LIST", ("lora", "words")),
    Format("peft", "LoRA as a PEFT folder of each network", f"{HERE}.peft_networks.PLAIN", ("lora",)),
    Format(
        "peft-kinds", "PEFT folders of LoHa, LoKr, DoRA, OFT, BOFT or (IA)3", f"{HERE}.peft_networks.PEFT",
        ("kinds", "lora"),
    ),
    Format(
        "lycoris", "a file of LyCORIS or kohya's OFT: LoHa, LoKr, DoRA, OFT, GLoRA, (IA)3, norms, differences",
        f"{HERE}.lycoris.LYCORIS", ("kinds", "lora", "words"), only_read=("words",), bundles=True,
    ),
    Format(
        "comfyui", "a LoRA with the keys of ComfyUI", f"{HERE}.lora_keys.COMFYUI_FILE", ("lora", "words"),
        only_read=("words",), bundles=True,
    ),
    Format(
        "diffusers", "a LoRA with the keys of diffusers or PEFT", f"{HERE}.lora_keys.DIFFUSERS", ("lora", "words"),
        only_read=("words",),
    ),
    Format(
        "kohya", "a LoRA with the keys of kohya, which web UIs read", f"{HERE}.lora_keys.KOHYA_FILE",
        ("lora", "words"), only_read=("words",), bundles=True,
    ),
    Format("delta", "a Custom Diffusion delta, LDM layout", f"{HERE}.custom_diffusion.LDM", ("delta", "words")),
    Format(
        "delta-diffusers", "a Custom Diffusion delta, diffusers layout", f"{HERE}.custom_diffusion.DIFFUSERS",
        ("delta", "words"),
    ),
    Format(
        "delta-attn-procs", "a Custom Diffusion delta of diffusers' own script", f"{HERE}.attn_procs.CUSTOM",
        ("delta", "words"),
    ),
    Format("checkpoint", "the weights of a whole model", f"{HERE}.checkpoint.CHECKPOINT", ("model",)),
    Format("words", "learnt words (textual inversion)", f"{HERE}.embeddings.WORDS", ("words",)),
    Format("words-ldm", "learnt words in LDM's layout, read as words", f"{HERE}.embeddings.LDM", ("words",)),
    Format("diffusers-model", "a whole model as a diffusers folder", f"{HERE}.diffusers_model.FOLDER", ("model",)),
    Format(
        "adapter", "a folder that training wrote here: position adapters and/or other families",
        f"{HERE}.own_folder.FOLDER", ("adapters", "lora", "kinds", "delta", "words"),
        not_written="only training writes it",
    ),
]  # fmt: skip


def by_name(name: str) -> Format:
    """The format of a name."""
    return next(row for row in FORMATS if row.name == name)


def written(*forms: str) -> tuple[str, ...]:
    """The names of the formats that can be written, of some forms or of all."""
    return tuple(row.name for row in FORMATS if not row.not_written and (not forms or row.form in forms))


def open_file(path: str | Path | Opened) -> Opened:
    """Open a file, or a folder that holds one. Raises `InputError`, also for unsafe files."""
    if isinstance(path, Opened):
        return path
    given = path = Path(path)
    if path.is_dir():
        path = next((file for row in FORMATS if (file := row.codec.file_in(given)) != given), given)
    if path.is_dir():
        return Opened(given, path)
    from ldm.checkpoints import read_metadata, read_object

    return Opened(given, path, read_object(path), read_metadata(path))


def recognise(file: Opened) -> Format:
    """The format of an opened file. Raises `InputError` for an unknown format."""
    for row in FORMATS:
        if row.codec.recognises(file):
            return row
    if file.path.is_dir():
        raise InputError(f"{file.path} is a folder with neither model_index.json, adapter_config.json nor adapters")
    if isinstance(file.content, Mapping) and isinstance(found := bases.recognise(file.content), bases.Foreign):
        raise InputError(f"{file.path} is {found.what}: {found.instead}")
    held = list(file.content) if isinstance(file.content, Mapping) else file.content
    raise InputError(f"{file.path} is of no known kind; it holds {short(held)}")
