"""Folders of models by path, or by their name on the hub, whose cache holds them. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import InputError

# What a folder must hold to be read; a repository on the hub holds other copies of its weights, too.
PARTS = ("model_index.json", "unet/*", "vae/*", "text_encoder/*", "text_encoder_2/*")


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
