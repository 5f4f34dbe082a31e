"""The networks that compare pictures, and the table that recognises them.

A network is named by the name of a row, by a folder in Hugging Face's format, or by a name on the hub, which is looked
up in the hub client's cache. A new kind is a row of `NETWORKS`: how to recognise it and how to load it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints import read_weights
from ldm.config import find_file
from ldm.errors import InputError, short
from ldm.evaluate.efficientnet import load_lite0, weights_file
from ldm.files import read_json
from ldm.models.building import load_weights
from ldm.modules.encoders.claims import building, read_clip
from ldm.modules.encoders.tokenizers import refuse_code

log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
HUB_FILES = ("config.json", PREPROCESSOR, *WEIGHTS, "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of pictures for a network: resize (bicubic by default), centre crop, normalise.

    resize: the shorter side in pixels; crop: the side of the central square; None: squeeze the picture into `resize`
    mean, std: of the channels, for values in 0 .. 1
    """

    resize: int
    crop: int | None
    mean: Sequence[float]
    std: Sequence[float]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, picture: Image.Image) -> Tensor:
        """An RGB picture as [3, h, w]."""
        if self.crop is None:
            picture = picture.resize((self.resize, self.resize), self.resample)
        else:
            width, height = picture.size
            factor = self.resize / min(width, height)
            picture = picture.resize((round(width * factor), round(height * factor)), self.resample)
            left, top = (picture.width - self.crop) // 2, (picture.height - self.crop) // 2
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        values = torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255  # h w c -> c h w
        mean, std = (torch.tensor(list(numbers)).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (values - mean) / std


@dataclass
class Network:
    """Maps pictures to vectors, and captions to vectors of the same space if the network has a text tower.

    embed: normalised pictures [b, 3, h, w] to [b, d]
    embed_captions: texts to [b, d]; None for networks without text
    label: the prefix of the columns of its scores
    """

    name: str
    label: str
    module: nn.Module
    preprocess: Preprocessing
    embed: Callable[[Tensor], Tensor]
    embed_captions: Callable[[Sequence[str]], Tensor] | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        self.digest = _digest(self.module, str(self.preprocess))

    @torch.inference_mode()
    def vectors(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures as [b, d], on the CPU. Raises `InputError` for numbers that are not finite."""
        device = next(iter(self.module.state_dict().values())).device
        found = self.embed(torch.stack([self.preprocess(picture) for picture in pictures]).to(device)).float().cpu()
        if not torch.isfinite(found).all():
            raise InputError(f"the network {self.name} gave numbers that are not finite; check its weights")
        return found


def _digest(module: nn.Module, how: str) -> str:
    """A SHA-256 of all weights and of the preprocessing, so vectors of different networks are never mixed."""
    digest = hashlib.sha256(f"{type(module).__name__} {how}".encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Kind:
    """A row: a title, and two functions of (name, folder or None): one recognises a network, one loads it."""

    title: str
    recognises: Callable[[str, Path | None], bool]
    load: Callable[[str, Path | None], Network]


# --- CLIP


def load_clip(name: str, folder: Path) -> Network:
    """A CLIP of OpenAI's architecture with its tokenizer (arXiv 2103.00020)."""
    from ldm.models.clip import CLIP

    file = _weights_of(folder)
    clip = CLIP(str(folder))
    if file.name != WEIGHTS[0]:
        load_weights(clip.clip, read_weights(file), str(file))
    return Network(name, "clip", clip, read_preprocessing(folder), clip.embed_pictures, clip.embed_captions)


# --- ViT and DINO

VIT_NUMBERS = {"mlp_ratio": (int, 1, 16), "layerscale_value": (float, 0, 10)}
VIT_SWITCHES = ("qkv_bias", "use_swiglu_ffn")
VITS = {"vit": ("ViTConfig", "ViTModel"), "dinov2": ("Dinov2Config", "Dinov2Model")}


def load_vit(name: str, folder: Path) -> Network:
    """A vision transformer, DINO (arXiv 2104.14294) or DINOv2 (arXiv 2304.07193); its features are the [CLS] token."""
    import transformers

    stored = read_json(folder / "config.json")
    kind = stored["model_type"]
    config_class, model_class = (getattr(transformers, part) for part in VITS[kind])
    file = _weights_of(folder)
    with building(refuse_code(folder)), quiet():
        config = config_class(**read_clip(folder), **_vit_extras(stored, folder))
        more = {"add_pooling_layer": False} if kind == "vit" else {}
        module, report = model_class.from_pretrained(
            None, config=config, state_dict=dict(read_weights(file)), output_loading_info=True, **more
        )
    if lacking := sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"])):
        raise InputError(f"{file} does not fit its config.json: {len(lacking)} weights are absent or of another shape, "
                         f"e.g. {lacking[0]}; get an undamaged copy")  # fmt: skip
    return Network(
        name, "dino", module, read_preprocessing(folder), lambda x: module(pixel_values=x).last_hidden_state[:, 0]
    )


def _vit_extras(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Check the keys of a ViT's config that CLIP's config does not have."""
    for key in VIT_SWITCHES:
        if key in stored and not isinstance(stored[key], bool):
            raise InputError(f"{folder}/config.json: {key} must be true or false, got {short(stored[key])}")
    for key, (kind, least, most) in VIT_NUMBERS.items():
        value = stored.get(key, least)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value <= most:
            raise InputError(f"{folder}/config.json: {key} must be from {least} to {most}, got {short(value)}")
    return {key: stored[key] for key in (*VIT_SWITCHES, *VIT_NUMBERS) if key in stored}


class quiet:
    """Within this context, transformers shows no progress bar and does not report unused weights."""

    def __enter__(self) -> None:
        from transformers.utils import logging as theirs

        self.theirs, self.level = theirs, theirs.get_verbosity()
        theirs.set_verbosity_error(), theirs.disable_progress_bar()

    def __exit__(self, *_: Any) -> None:
        self.theirs.set_verbosity(self.level), self.theirs.enable_progress_bar()


# --- EfficientNet

LITE0 = "efficientnet-lite0"


def load_efficientnet(name: str, _folder: Path | None) -> Network:
    """EfficientNet-Lite0 with the preprocessing of its validation: the central 224 of 256 pixels, (0 .. 255 - 127) /
    128."""
    module = load_lite0()
    preprocess = Preprocessing(256, 224, [127 / 255] * 3, [128 / 255] * 3)
    return Network(name, "efficientnet", module, preprocess, module.features)


# --- the table


def _is(*kinds: str) -> Callable[[str, Path | None], bool]:
    def recognises(_name: str, folder: Path | None) -> bool:
        config = read_json(folder / "config.json") if folder else None
        return isinstance(config, Mapping) and config.get("model_type") in kinds

    return recognises


NETWORKS = [
    Kind(f"{LITE0} (extra `metrics`)", lambda name, folder: name == LITE0, load_efficientnet),
    Kind("a CLIP: a folder, or a name on the hub", _is("clip"), load_clip),
    Kind("a ViT, DINO or DINOv2: a folder, or a name on the hub", _is(*VITS), load_vit),
]

# The default networks of each base. The first one must be available; others are left out with a warning.
DEFAULTS = {
    "sd-mini": ("models/sd-mini/clip", LITE0),
    None: ("openai/clip-vit-base-patch32", "facebook/dino-vits16", LITE0),  # the networks of DreamBooth, Sec. 4.2
}


def default_networks(base: str | None) -> list[str]:
    """The available networks of a base (`ldm.models.bases`)."""
    first, *others = DEFAULTS.get(base, DEFAULTS[None])
    there = [name for name in others if is_there(name)]
    if absent := [name for name in others if name not in there]:
        log.warning("%s left out, not on this machine; --network names others", ", ".join(absent))
    return [first, *there]


def is_there(name: str) -> bool:
    """Whether a network can be loaded without a download."""
    return weights_file() is not None if name == LITE0 else folder_of(name) is not None


@cache
def load_network(name: str, device: str = "cpu", download: bool = False) -> Network:
    """A network by name, loaded once for each device. Raises `InputError` if it is unknown or not available."""
    folder = folder_of(name, download)
    kind = next((kind for kind in NETWORKS if kind.recognises(name, folder)), None)
    if kind is None and folder is None:
        raise InputError(
            f"no network {name}: it is no folder with config.json and not in the hub's cache; name a folder, "
            f"{LITE0}, or fetch it with --download"
        )
    if kind is None:
        raise InputError(f"{name} is of no known kind; expected {'; '.join(kind.title for kind in NETWORKS)}")
    network = kind.load(name, folder)
    network.module.to(device)
    return network


def folder_of(name: str, download: bool = False) -> Path | None:
    """The folder of a name: the name itself, or a folder in the hub's cache (with `download`, filled first); else
    None."""
    folder = find_file(name)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    found = {file: _cached(name, file, download) for file in HUB_FILES[:2]}
    weights = any(_cached(name, file, download) for file in WEIGHTS)
    if not weights or None in found.values():
        return None
    for file in HUB_FILES[4:]:
        _cached(name, file, download)
    return found["config.json"].parent


def _cached(name: str, file: str, download: bool) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, local_files_only=not download))
    except Exception as error:  # the client raises many types; all mean that the file is not available
        log.debug("%s of %s: %s", file, name, error)
        return None


def _weights_of(folder: Path) -> Path:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder} has no weights: expected {' or '.join(WEIGHTS)}")
    return file


def read_preprocessing(folder: Path) -> Preprocessing:
    """The preprocessing in `preprocessor_config.json`. Raises `InputError` if it is absent or not supported."""
    file = folder / PREPROCESSOR
    if not file.is_file():
        raise InputError(f"{folder} lacks {PREPROCESSOR}, which says how pictures are resized and normalised")
    stored = read_json(file)
    try:
        resize, crop = _side(stored["size"]), _side(stored.get("crop_size"))
        crop = crop if stored.get("do_center_crop") else None
        mean, std = ([float(number) for number in stored[key]] for key in ("image_mean", "image_std"))
        resample = Image.Resampling(stored.get("resample", Image.Resampling.BICUBIC))
        good = len(mean) == len(std) == 3 and min(std) > 0 and 1 <= (crop or resize) <= resize <= 4096
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} cannot be used ({error!r}); expected size, image_mean and image_std") from None
    if not good:
        raise InputError(f"{file} cannot be used: expected three means, three deviations and crop_size <= size <= 4096")
    return Preprocessing(resize, crop, mean, std, resample)


def _side(size: Any) -> int | None:
    """A side in pixels from `224`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}`."""
    if isinstance(size, Mapping):
        if size.get("height") != size.get("width"):
            raise ValueError("pictures must be square")
        size = size.get("shortest_edge", size.get("height"))
    return None if size is None else int(size)
