"""Base models by path: a checkpoint, a diffusers folder, or the name of one on the hub, which the hub's cache holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import read_weights
from ldm.errors import InputError
from ldm.interchange import diffusers_json, diffusers_model
from ldm.models.bases import Base, base_of, recognise

# What a folder must hold to be read; a repository on the hub holds other copies of its weights, too.
PARTS = ("model_index.json", "unet/*", "vae/*", "text_encoder/*", "text_encoder_2/*")


def base_weights(path: str | Path, config: Any = None) -> dict[str, Tensor]:
    """The weights of a base by the names of the model here.

    path: a checkpoint, a diffusers folder, or `owner/name` of one in the hub's cache; nothing is downloaded
    config: the config of the model that the weights are for, with which the JSON of a folder is compared

    Raises `InputError`.
    """
    found = folder_of(path)
    if found is None:
        return read_weights(path)
    params = None if config is None else config["model"]["params"]
    if params is not None:
        diffusers_json.check(found, params, path)
    return diffusers_model.read_folder(found, params)


def known_base(path: str | Path) -> Base:
    """The base that a checkpoint or folder is of. Raises `InputError` for another file, named if it is known."""
    weights = base_weights(path)
    if (base := base_of(weights)) is not None:
        return base
    what = recognise(weights)
    raise InputError(
        f"{path} is {what.what}: {what.instead}" if what else f"{path} is of no base that is known: name its config"
    )


def reader(config: Any) -> Callable[[str | Path], dict[str, Tensor]]:
    """`base_weights` for the model of a config."""
    return partial(base_weights, config=config)


def folder_of(path: str | Path) -> Path | None:
    """The diffusers folder of a base; None for files. Raises `InputError` for a hub's name that is not in its cache."""
    given = Path(path)
    if given.exists() or not is_hub_name(str(path)):
        return given if given.is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True, allow_patterns=list(PARTS)))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        raise InputError(
            f"{path} is neither a file or folder here nor a model in the hub's cache; fetch it with "
            f"'hf download {path}', or name a checkpoint"
        ) from None


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist can be a name on the hub: `owner/name` without a suffix of weights."""
    parts = path.split("/")
    weights = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~")) and not path.lower().endswith(weights)
