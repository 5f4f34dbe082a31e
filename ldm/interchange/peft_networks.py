"""PEFT's folders of one network, or of several: `unet/`, `text_encoder/`, `text_encoder_2/`, as in PEFT's examples.

Each of these is a folder of its own (`peft_folder`), so each may hold another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from ldm.checkpoints import atomic_write
from ldm.errors import InputError
from ldm.interchange import kinds as neutral
from ldm.interchange import lora_keys, lycoris, peft_folder
from ldm.interchange.formats import Codec, Context, Opened, open_file
from ldm.interchange.kinds import Kinds, Part
from ldm.interchange.layers import dialects
from ldm.interchange.lora import Lora
from ldm.interchange.peft_config import CONFIG

NETWORKS = ("unet", "text_encoder", "text_encoder_2")


def folders(path: Path) -> dict[str, Path]:
    """The folders of single networks in a folder, by their names."""
    places = {name: path / name for name in NETWORKS}
    return {
        name: place for name, place in places.items()
        if (place / CONFIG).is_file() and lora_keys.file_of(place) != place
    }  # fmt: skip


def _opened(file: Opened) -> dict[str, Opened]:
    return {name: open_file(place) for name, place in folders(file.path).items()} if file.path.is_dir() else {}


def _is_plain(file: Opened) -> bool:
    found = _opened(file)
    return bool(found) and not any(map(peft_folder.is_peft, found.values()))


def _is_kinds(file: Opened) -> bool:
    return peft_folder.is_peft(file) or any(map(peft_folder.is_peft, _opened(file).values()))


# --- reading


def _lora(file: Opened, context: Context) -> Lora:
    """The plain LoRAs of several networks."""
    found = {
        f"{network}.{lora_keys.plain_name(layer)}": factors
        for network, one in _opened(file).items()
        for layer, factors in lora_keys.read_factors(one).items()
    }
    return Lora(found) if context.model is None else lora_keys.named(found, context.model, str(file.given))


def _kinds(file: Opened, context: Context) -> Kinds:
    """The changes of one network or of several."""
    names = None if context.model is None else lycoris.lookup(context.model)
    if not file.path.is_dir():
        return peft_folder.read(file, names)
    found = [_of_network(network, one, names) for network, one in _opened(file).items()]
    return neutral.joined(found, str(file.given))


def _of_network(network: str, file: Opened, names: Mapping[str, str] | None) -> Kinds:
    start = f"{network}."
    if names is None:
        return Kinds({start + layer: part for layer, part in peft_folder.read(file).layers.items()})
    own = {name.removeprefix(start): ours for name, ours in names.items() if name.startswith(start)}
    return peft_folder.read(file, own)


def _kinds_as_lora(file: Opened, context: Context) -> Lora:
    return neutral.as_lora(_kinds(file, context), str(file.given))


# --- writing


def write(path: Path, kinds: Kinds, context: Context) -> None:
    """Write a folder for `PeftModel.from_pretrained(network, path)`; for several networks a folder with one for each.

    Raises `InputError` for what PEFT cannot hold, see `peft_folder.written`.
    """
    names = dialects(context.model)["diffusers"]
    foreign = next((name for name in kinds.layers if name not in names), None)
    if foreign:
        raise InputError(
            f"{context.source}: {foreign} is no linear layer or convolution, which is all that PEFT changes"
        )
    parts: dict[str, dict[str, tuple[str, Part]]] = {}
    for layer, part in kinds.layers.items():
        network, _, name = names[layer].partition(".")
        parts.setdefault(network, {})[_in_module(network, name)] = (layer, part)
    contents = {network: peft_folder.content(own, context) for network, own in parts.items()}
    with atomic_write(path) as beside:
        beside.mkdir()
        for network, held in contents.items():
            peft_folder.save(beside if len(contents) == 1 else beside / network, *held)


def _in_module(network: str, name: str) -> str:
    """A layer's name in the class of the installed transformers, by which PEFT finds it.

    `CLIPTextModel` has no level `text_model` from version 5 on; `CLIPTextModelWithProjection` keeps it.
    """
    is_flat = network == "text_encoder" and int(version("transformers").partition(".")[0]) >= 5
    return name.removeprefix("text_model.") if is_flat else name


PEFT = Codec(_is_kinds, {"kinds": _kinds, "lora": _kinds_as_lora}, write, file_in=lora_keys.file_of)
PLAIN = Codec(  # a folder of one network is read as `diffusers`
    _is_plain, {"lora": _lora}, lambda path, lora, context: write(path, neutral.of_lora(lora), context)
)
