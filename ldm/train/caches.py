"""Encode every picture and every caption of a DreamBooth run once, before it begins.

The result is exact. The cache holds the autoencoder's posterior of each picture, flipped and not, and each step samples
from it. A frozen text encoder gives the same encoding every time. Pictures are encoded one by one, so the numbers are
those of a batch of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoints import fingerprint, read_weights, refuse_not_finite, save_safetensors
from ldm.data.dreambooth import PersonalizedBase
from ldm.data.encoded import EncodedSamples
from ldm.data.folder import CaptionedFolder
from ldm.errors import InputError, short
from ldm.modules.cached_encoders import CachedPosteriors, CachedPrompts, Encoding, each
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.prompts import cut_words
from ldm.train.datamodule import DataModuleFromConfig

log = logging.getLogger(__name__)

CACHED = (PersonalizedBase, CaptionedFolder)  # without random changes of pictures other than flips


@contextmanager
def encoded(models: Sequence[Any], data: DataModuleFromConfig, where: str, device: torch.device) -> Iterator[None]:
    """Within this context, cached encodings replace the encoders of `models` and the pictures of `data`.

    The models belong to one training, or to several trainings side by side, which share a base.

    `where`: `off`, `memory`, or a folder that keeps the encodings for later runs. Datasets with random augmentations
    are not cached, and neither is a text encoder that is trained.
    """
    data.setup()
    refuse_cut_captions(models, data)
    if where == "off":
        yield
        return
    stages = [(model.first_stage_model, model.text_encoders()) for model in models]
    datasets, workers = dict(data.datasets), data.num_workers
    if all(type(dataset) in CACHED for dataset in data.datasets.values()):
        _encode_pictures(models, data, None if where == "memory" else Path(where), device)
        _encode_prompts(models, data, device)
    try:
        yield
    finally:
        for model, (first_stage, text_encoders) in zip(models, stages, strict=True):
            model.first_stage_model = first_stage
            for name, encoder in text_encoders.items():
                model.replace_text_encoder(name, encoder)
        data.datasets, data.num_workers = datasets, workers


def refuse_cut_captions(models: Sequence[Any], data: DataModuleFromConfig) -> None:
    """Raises `InputError` if a caption is so long that the text encoder cuts off an identifier or a learnt word.

    The log says how many captions lose other words.
    """
    encoders = getattr(models[0], "text_encoders", dict)().values()
    encoder = next((one for one in encoders if hasattr(one, "tokens_of")), None)  # SDXL's have one vocabulary
    sets = [one for one in data.datasets.values() if hasattr(one, "all_captions")]
    if encoder is None or not sets:
        return
    words = {_identifier(one) for one in sets} | set(getattr(encoder.new_tokens, "words", ()))
    captions = sorted({caption for one in sets for caption in one.all_captions()})
    cut = {caption: lost for caption in captions if (lost := cut_words(encoder, caption))}
    for caption, lost in cut.items():
        seen = caption.removesuffix(lost).split()
        if unseen := words & set(lost.split()) - set(seen):
            raise InputError(
                f"the caption {caption[:60]!r}... is too long: the text encoder does not see {min(unseen)!r} in it; "
                "put the word nearer to the beginning"
            )
    if cut:
        lost = next(iter(cut.values()))
        log.warning("%d captions are too long for the text encoder, which does not see their end: %s", len(cut), lost)


def _identifier(dataset: Any) -> str | None:
    return getattr(dataset, "identifier", None) or getattr(dataset, "placeholder_token", None)


def _encode_pictures(
    models: Sequence[Any], data: DataModuleFromConfig, folder: Path | None, device: torch.device
) -> None:
    model = models[0]
    if not hasattr(model.first_stage_model, "downsampling_factor"):
        return  # this model has no autoencoder
    for name, dataset in data.datasets.items():
        data.datasets[name] = EncodedSamples(dataset, pictures(model, dataset, folder, device, name))
    for model in models:
        model.first_stage_model = CachedPosteriors(model.first_stage_model.cpu())
    data.num_workers = 0  # an encoded picture is read faster than it is sent between processes


def _encode_prompts(models: Sequence[Any], data: DataModuleFromConfig, device: torch.device) -> None:
    sets = [getattr(dataset, "dataset", dataset) for dataset in data.datasets.values()]
    if any(pictures.captions.vary for pictures in sets):
        log.info("captions have other tags at each draw, so they are encoded in every step; pictures only once")
        return
    captions = sorted({caption for pictures in sets for caption in pictures.all_captions()} | {""})
    for name in models[0].text_encoders():
        frozen = [one for one in models if not any(key.startswith(f"{name}.") for key in one.trainable_parameters())]
        if not frozen:
            continue
        known = prompts(frozen[0].text_encoders()[name], captions, device)
        for model in frozen:
            model.replace_text_encoder(name, CachedPrompts(model.text_encoders()[name].cpu(), known))


@torch.no_grad()
def pictures(model: Any, dataset: PersonalizedBase, folder: Path | None, device: torch.device, name: str) -> Tensor:
    """The posteriors' parameters [pictures, 2, 2c, h, w] of a dataset; read from `folder` if they are there and fit."""
    key = _key(model.first_stage_model, dataset) if folder else ""
    file = folder / f"pictures-{key}.safetensors" if folder else None
    if file is not None and file.is_file():
        try:
            return _fitting(read_weights(file), model, dataset)
        except InputError as error:
            log.warning("%s is rebuilt: %s", file, error)
    elif folder is not None and any(folder.glob("pictures-*.safetensors")):
        log.info("%s holds encodings of other pictures or of another autoencoder; new ones are added", folder)
    first_stage = model.first_stage_model.to(device).eval()
    moments = []
    for number in tqdm(range(len(dataset.paths)), desc=f"encoding pictures ({name})"):
        both = [dataset.picture(number, flipped).permute(2, 0, 1)[None].to(device) for flipped in (False, True)]
        encoded = [first_stage.encode(picture) for picture in both]
        if not isinstance(encoded[0], DiagonalGaussianDistribution):
            raise InputError(f"{type(first_stage).__name__} has no posterior to keep: train with --cache off")
        moments.append(torch.cat([posterior.parameters.cpu() for posterior in encoded]))
    stacked = torch.stack(moments)
    if file is not None:
        save_safetensors(file, {"moments": stacked})
    return stacked


def _fitting(kept: dict[str, Tensor], model: Any, dataset: PersonalizedBase) -> Tensor:
    """The posteriors of a cache. Raises `InputError` if they do not fit these pictures."""
    moments = kept.get("moments")
    side = dataset.size // model.first_stage_model.downsampling_factor
    wanted = (len(dataset.paths), 2, side, side)
    shape = () if moments is None else tuple(moments.shape)
    kind = next(model.first_stage_model.parameters()).dtype
    fits = len(kept) == 1 and (*shape[:2], *shape[3:]) == wanted and shape[2] % 2 == 0 and moments.dtype == kind
    if not fits:
        found = {name: [str(value.dtype), *value.shape] for name, value in kept.items()}
        raise InputError(f"it holds {short(found)}, expected moments of {wanted[0]} pictures, {side} x {side}, {kind}")
    refuse_not_finite(kept, "it")
    return moments


@torch.no_grad()
def prompts(encoder: nn.Module, captions: list[str], device: torch.device) -> dict[str, Encoding]:
    """The encoding of each caption, [tokens, d], and the encoder's other outputs, each without the batch dimension."""
    encoder.to(device)
    encoded = {caption: each(lambda part: part[0].cpu(), encoder.encode([caption])) for caption in captions}
    encoder.cpu()
    return encoded


def _key(first_stage: nn.Module, dataset: PersonalizedBase) -> str:
    """A digest of everything that the encodings depend on: the pictures' bytes, the cropping, the autoencoder."""
    digest = hashlib.sha256(fingerprint(first_stage.state_dict()).encode())
    digest.update(json.dumps([dataset.size, dataset.interpolation, dataset.center_crop]).encode())
    for path in dataset.paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]
