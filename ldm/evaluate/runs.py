"""Scores files: the checkpoints of a run, a tuned model on any base, or pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm.data.pictures import find_pictures
from ldm.devices import best_device
from ldm.errors import InputError
from ldm.evaluate.features import FeatureCache, Files
from ldm.evaluate.networks import Network, default_networks, load_network
from ldm.evaluate.prompts import choose_templates
from ldm.evaluate.protocol import Protocol
from ldm.evaluate.scoring import Drawn, Scores, add_distances, class_pictures, compare, load_networks, score
from ldm.evaluate.sources import Subject, is_pictures, opened, read_drawn, subject_of
from ldm.generate import from_pil, save_png
from ldm.interchange.base_choice import NONE, Choice
from ldm.interchange.base_files import base_weights
from ldm.models.bases import base_of
from ldm.models.building import choose_checkpoint
from ldm.train.run_folder import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """The question about a path, besides the protocol. Fields that are None are taken from the run.

    config, ckpt, scale: the base model and the strength, for a path outside a run
    against: a folder of pictures for FID and KID
    keep: a folder for the drawn pictures
    choice: parts and weights that are chosen of the base model
    """

    path: Path
    protocol: Protocol = field(default_factory=Protocol)
    data_root: str | None = None
    class_word: str | None = None
    identifier: str | None = None
    template: str | None = None
    checkpoints: str = "last"
    config: str | None = None
    ckpt: str | None = None
    scale: float = 1.0
    against: str | None = None
    keep: Path | None = None
    device: str | None = None
    verbose: bool = False
    choice: Choice = NONE

    def of(self, subject: Subject) -> Question:
        """The question with missing fields from the run's facts about its subject."""
        identifier, template = self.identifier or subject.identifier, self.template or subject.template
        told = {"identifier": identifier, "class_templates": template and (template,)}
        protocol = replace(self.protocol, **{name: value for name, value in told.items() if value})
        return replace(self, protocol=protocol, data_root=self.data_root or subject.data_root,
                       class_word=self.class_word or subject.class_word)  # fmt: skip


def answers(question: Question, cache: FeatureCache | None = None) -> Iterator[Scores]:
    """The scores of each requested checkpoint, one after the other. Raises `InputError`."""
    cache = cache or FeatureCache()
    if question.against:
        find_pictures(question.against)  # check the folder before anything is drawn
    if is_pictures(question.path):
        yield of_pictures(question, cache)
        return
    sources, subject = opened(
        question.path, question.checkpoints, question.config, question.ckpt, question.scale, question.choice
    )
    question = question.of(subject)
    for value, option in ((question.data_root, "--data_root"), (question.class_word, "--class_word")):
        if not value:
            raise InputError(f"{option} is missing: {question.path} does not say what it was tuned on")
    find_pictures(question.data_root)
    choose_templates(question.protocol.prompts, question.class_word)
    protocol, prior, device = question.protocol, None, best_device(question.device)
    for source in sources:
        model = source.base().to(device)
        if prior is None:
            networks = load_networks(protocol, model)  # check the networks before anything is drawn
            prior = class_pictures(model, question.class_word, protocol, question.verbose)
        source.put_into(model)
        found = score(model, question.data_root, question.class_word, protocol, prior, cache, question.verbose)
        found.source, found.step = str(source.path), source.step
        yield finished(found, question, networks, cache)


def of_pictures(question: Question, cache: FeatureCache) -> Scores:
    """The scores of pictures in a folder. There is no prior drift, because there is no model."""
    if question.checkpoints != "last":
        raise InputError(f"--checkpoints is for runs; {question.path} is a folder of pictures")
    started, protocol = time.perf_counter(), question.protocol
    drawn = read_drawn(question.path, question.identifier or protocol.identifier, question.class_word)
    references = Files(find_pictures(question.data_root)) if question.data_root else []
    networks = load_networks(protocol, device=best_device(question.device))
    found = compare(drawn, references, question.class_word or "", networks, protocol, cache=cache,
                    verbose=question.verbose)  # fmt: skip
    found.source, found.protocol = str(question.path), {"networks": protocol.networks, "level": protocol.level}
    found = finished(found, question, networks, cache)
    found.seconds = time.perf_counter() - started
    return found


def finished(found: Scores, question: Question, networks: Mapping[str, Network], cache: FeatureCache) -> Scores:
    """Add FID and KID if requested, and keep the pictures if requested."""
    if question.against:
        add_distances(found, Files(find_pictures(question.against)), networks, cache, question.verbose)
    if question.keep:
        keep(found.drawn, question.keep / (f"{found.step}" if found.step is not None else ""))
    for note in found.notes:
        log.info("left out: %s", note)
    return found


def keep(drawn: Drawn, folder: Path) -> None:
    """Write pictures as PNG files with their prompt and seed, which `ldm evaluate` can read."""
    for number, (picture, prompt, seed) in enumerate(zip(drawn.pictures, drawn.prompts, drawn.seeds, strict=True)):
        save_png(from_pil(picture), folder / f"{number:05}.png", {"prompt": prompt, "seed": seed})


# --- at the end of a training


def networks_of(run: Run, protocol: Protocol) -> Protocol:
    """The protocol with the networks of a run's base, checked to be available.

    Raises `InputError` for a missing network before the training, not after it.
    """
    path, _ = choose_checkpoint(run.config, run.base)
    names = protocol.networks
    if names is None:
        base = base_of(base_weights(path)) if path else None
        names = default_networks(base and base.name)
    for name in names:
        load_network(name, download=protocol.download)
    return replace(protocol, networks=tuple(names))


def of_run(run: Run, protocol: Protocol, device: str | None = None) -> Scores:
    """The scores of a run's last checkpoint. Raises `InputError`, see `answers`."""
    (found,) = answers(Question(run.folder, protocol, device=device, verbose=True))
    return found


def subject_is_known(run: Run) -> None:
    """Raises `InputError` for a run without photographs of one subject, because it cannot be scored."""
    subject = subject_of(run)
    if not (subject.data_root and subject.class_word):
        raise InputError("--evaluate scores a run on one subject: it needs --data_root and --class_word")
