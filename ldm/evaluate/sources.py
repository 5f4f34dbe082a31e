"""Sources of scores: a run with its checkpoints, a folder or file of a tuned model, a folder of pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from ldm.config import find_file, load_config
from ldm.data.pictures import find_pictures
from ldm.errors import InputError
from ldm.evaluate.features import Files
from ldm.evaluate.scoring import Drawn
from ldm.interchange import load_any, open_file, recognise
from ldm.interchange.base_choice import NONE, Choice
from ldm.interchange.base_files import reader
from ldm.models.bases import DEFAULT
from ldm.models.building import build_model, choose_checkpoint, untuned
from ldm.modules.encoders.tokens import load_words
from ldm.train import dreambooth
from ldm.train.run_config import read_configs
from ldm.train.run_folder import Run


@dataclass(frozen=True)
class Source:
    """One checkpoint of a tuned model.

    base: builds the model again without the trained values; its position adapters are untrained and off
    """

    path: Path
    step: int | None
    base: Callable[[], Any]
    scale: float = 1.0

    def put_into(self, model: Any) -> None:
        """Load the checkpoint into a base. Raises `InputError` for another base model."""
        model.model.diffusion_model.adapters_enable(True)
        load_any(model, self.path, self.scale)


@dataclass(frozen=True)
class Subject:
    """The known facts about a run's subject."""

    data_root: str | None = None
    class_word: str | None = None
    identifier: str | None = None
    template: str | None = None


def run_of(path: Path) -> Path | None:
    """The folder of a run; the path is the folder, or `<run>/checkpoints/<name>`."""
    return next((f for f in (path, path.parent.parent) if (f / "configs" / "project.yaml").is_file()), None)


def is_pictures(path: Path) -> bool:
    """Whether a path is a folder of pictures without a tuned model."""
    if not path.is_dir() or run_of(path) == path or (path / "adapter_config.json").is_file():
        return False
    return not list(path.glob("*.pt")) and not list(path.glob("*.safetensors"))


def opened(
    path: Path,
    checkpoints: str = "last",
    config: str | None = None,
    ckpt: str | None = None,
    scale: float = 1.0,
    choice: Choice = NONE,
) -> tuple[list[Source], Subject]:
    """The checkpoints to score, in the order of steps, and the run's facts about its subject.

    `checkpoints` of a run: `last`, `all`, or steps such as `200,400`. `config` and `ckpt` name the base model for a
    file or folder outside a run, `choice` what is chosen of it. Raises `InputError`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: expected a run, a folder or file of what was tuned, or pictures")
    folder = run_of(path)
    run = read_run(folder) if folder else None
    base = _base(run, config, ckpt, choice)
    if folder == path:
        return [Source(one, step, base, scale) for step, one in chosen(path, checkpoints)], subject_of(run)
    if checkpoints != "last":
        raise InputError(f"--checkpoints is for runs; {path} is none")
    row = recognise(open_file(path))  # refuse unknown files before anything is drawn
    if row.form == "model":
        raise InputError(f"{path} is {row.title}: give it with --ckpt, and here what was tuned, or pictures of it")
    step = re.match(r"(\d+)-adapters$", path.name)
    return [Source(path, int(step[1]) if step else None, base, scale)], subject_of(run) if run else Subject()


def read_run(folder: Path) -> Run:
    """The run in a folder, from its config. Raises `InputError` if it did not train on a subject."""
    config = read_configs([], [], folder)
    if config.get("dreambooth") is None or OmegaConf.select(config, "data.params.train") is None:
        raise InputError(f"{folder} is no run of ldm train: its config lacks dreambooth or data.params.train")
    return dreambooth.as_run(config, folder)


def subject_of(run: Run) -> Subject:
    """The facts about a run's subject."""
    train = run.config.get("data", {}).get("params", {}).get("train") or {}
    params = {} if dreambooth.has_concepts(run.config) else train.get("params", {})
    templates = params.get("templates") or "photo of a {}"  # none where all pictures have captions
    template = templates if isinstance(templates, str) else templates[0]
    template = template if template.count("{}") == 1 and template.count("{") == 1 else None
    word = run.notes["class_word"]
    return Subject(run.config.dreambooth.get("data_root"), word, run.notes["identifier"], template)


def chosen(folder: Path, checkpoints: str) -> list[tuple[int, Path]]:
    """(step, folder) of the requested checkpoints of a run. Raises `InputError` for missing ones."""
    there = {int(path.name.partition("-")[0]): path for path in (folder / "checkpoints").glob("[0-9]*-adapters")}
    if not there and (parts := sorted(one.parent.parent.name for one in folder.glob("*/configs/project.yaml"))):
        raise InputError(f"{folder} holds {len(parts)} trainings; name one of them, such as {folder / parts[0]}")
    if not there:
        raise InputError(f"{folder}/checkpoints has no <step>-adapters: the run has saved nothing to score")
    named = {"last": [max(there)], "all": sorted(there)}.get(checkpoints)
    if named is None:
        words = checkpoints.split(",")
        named = sorted({int(word) for word in words if word.strip().isdecimal()})
        if len(named) != len(words) or not set(named) <= there.keys():
            steps = ",".join(map(str, sorted(there)))
            raise InputError(f"--checkpoints {checkpoints}: expected last, all, or some of the steps {steps}")
    return [(step, there[step]) for step in named]


def _base(run: Run | None, config: str | None, ckpt: str | None, choice: Choice) -> Callable[[], Any]:
    """The function that builds the base model: that of the run, or that of a config."""
    words = run.config.dreambooth.get("words") if run else None

    def build() -> Any:
        source = run.config if run and config is None else load_config(find_file(config or DEFAULT.config))
        source = choice.into(untuned(source.copy()))
        checkpoint = choose_checkpoint(source, ckpt or (run.base if run else None))
        model = build_model(source, *checkpoint, read=reader(source)).eval()
        if words:
            load_words(model, words, "--embedding_manager_ckpt")
        model.model.diffusion_model.adapters_enable(False)
        return model

    return build


def read_drawn(folder: Path, identifier: str | None, class_word: str | None) -> Drawn:
    """The pictures of a folder, with prompts and seeds from the metadata of `ldm sample`.

    A caption for CLIP-T is the prompt without the identifier before the class.
    """
    paths = find_pictures(folder)
    notes = [_notes(path) for path in paths]
    prompts = [note.get("prompt") for note in notes]
    seeds = [int(note["seed"]) if str(note.get("seed", "")).isdecimal() else None for note in notes]
    own, plain = f"{identifier} {class_word}", str(class_word)
    captions = [prompt and (prompt.replace(own, plain) if identifier and class_word else prompt) for prompt in prompts]
    return Drawn(Files(paths), prompts, captions, seeds)


def _notes(path: Path) -> dict[str, str]:
    """The text chunks of a PNG; {} for other files and for damaged ones, which are refused later."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text: Sequence[tuple[str, Any]] = list(getattr(picture, "text", {}).items())
            return {str(key): str(value) for key, value in text}
    except Exception:  # Pillow's decoders raise many types
        return {}
