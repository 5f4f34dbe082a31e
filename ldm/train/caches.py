"""Encode every picture and every caption of a DreamBooth run once, before it begins.

The result is exact. The cache holds the autoencoder's posterior of each picture, flipped and not, and each step samples
from it. A frozen text encoder gives the same encoding every time. Pictures are encoded one by one, so the numbers are
those of a batch of one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.data.encoded import EncodedSamples
from ldm.errors import InputError
from ldm.modules.cached_encoders import CachedPosteriors, CachedPrompts, Encoding, each
from ldm.modules.encoders.prompts import cut_words
from ldm.train.datamodule import DataModuleFromConfig
from ldm.train.picture_cache import pictures

log = logging.getLogger(__name__)

PROMPT_BYTES = 2**31  # encoded captions that are kept in memory


@contextmanager
def encoded(models: Sequence[Any], data: DataModuleFromConfig, where: str, device: torch.device) -> Iterator[None]:
    """Within this context, cached encodings replace the encoders of `models` and the pictures of `data`.

    The models belong to one training, or to several trainings side by side, which share a base.

    `where`: `off`, `memory`, or a folder that keeps the encodings of pictures for later runs. Pictures that change at
    random are not cached, and neither is a text encoder that is trained, nor captions that are too many or vary.
    """
    data.setup()
    refuse_cut_captions(models, data)
    if where == "off":
        yield
        return
    stages = [(model.first_stage_model, model.text_encoders()) for model in models]
    datasets, workers = dict(data.datasets), data.num_workers
    reasons = {getattr(dataset, "why_not_cached", "") for dataset in data.datasets.values()} - {None}
    if told := ", ".join(filter(None, reasons)):
        log.info("pictures are encoded in every step, captions only once: %s", told)
    if not reasons:
        _encode_pictures(models, data, None if where == "memory" else Path(where), device)
    if "" not in reasons:
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
        kept = pictures(model, dataset, folder, device, name, data.num_workers)
        data.datasets[name] = EncodedSamples(dataset, kept)
    for model in models:
        model.first_stage_model = CachedPosteriors(model.first_stage_model.cpu())
    data.num_workers = 0  # an encoded picture is read faster than it is sent between processes


def _encode_prompts(models: Sequence[Any], data: DataModuleFromConfig, device: torch.device) -> None:
    sets = [getattr(dataset, "dataset", dataset) for dataset in data.datasets.values()]
    if any(one.captions.vary for one in sets):
        log.info("captions have other tags at each draw, so they are encoded in every step; pictures only once")
        return
    captions = sorted({caption for one in sets for caption in one.all_captions()} | {""})
    for name in models[0].text_encoders():
        frozen = [one for one in models if not any(key.startswith(f"{name}.") for key in one.trainable_parameters())]
        if not frozen:
            continue
        encoder = frozen[0].text_encoders()[name]
        known = prompts(encoder, captions[:1], device)
        if len(captions) * sum(map(_bytes, known.values())) > PROMPT_BYTES:
            log.info("%d captions are too many to keep: they are encoded in every step", len(captions))
            return
        known |= prompts(encoder, captions[1:], device)
        for model in frozen:
            model.replace_text_encoder(name, CachedPrompts(model.text_encoders()[name].cpu(), known))


def _bytes(encoding: Encoding) -> int:
    return sum(part.nbytes for part in (encoding if isinstance(encoding, tuple) else (encoding,)))


@torch.no_grad()
def prompts(encoder: nn.Module, captions: list[str], device: torch.device) -> dict[str, Encoding]:
    """The encoding of each caption, [tokens, d], and the encoder's other outputs, each without the batch dimension."""
    encoder.to(device)
    encoded = {caption: each(lambda part: part[0].cpu(), encoder.encode([caption])) for caption in captions}
    encoder.cpu()
    for caption, parts in encoded.items():
        if not all(torch.isfinite(part).all() for part in (parts if isinstance(parts, tuple) else (parts,))):
            raise InputError(f"the text encoder gives numbers that are not finite for the caption {caption!r}")
    return encoded

