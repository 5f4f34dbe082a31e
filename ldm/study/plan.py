"""From a command line or a YAML file to the trials of a sweep, each a complete config, and to groups of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from ldm import schema
from ldm.cli import Parser
from ldm.config import find_file, plain
from ldm.errors import InputError, short
from ldm.evaluate.protocol import Protocol
from ldm.evaluate.subjects import class_word_of
from ldm.files import read_yaml_text
from ldm.schema import Section, says
from ldm.study import scoring, space, words
from ldm.study.keys import code_digest, digest, pictures_digest, pictures_of, recipe
from ldm.study.worker import Task
from ldm.train import dreambooth, many
from ldm.train.options import dreambooth_parser, sorted_out
from ldm.train.run_folder import Run

# A sweep draws and validates by itself.
OWN = ["--no-test", "true", "--limit_val_batches", "0", "lightning.callbacks.image_logger.params.disabled=true"]
CLASS = "{class}"  # in --reg_data_root: the class of each subject
CLASS_PICTURES = 32  # where the sweep fills the folder


class SweepFile(Section):
    """A YAML file of `ldm sweep`."""

    base: str | None = says(None, "config that is varied")
    search: Literal["grid", "random", "list"] = says("grid", "every combination, random draws, or `trials` as they are")
    vary: dict[str, Any] | None = says(None, "word: values; for random also word: {loguniform: [low, high]} and so on")
    trials: list[dict[str, Any]] | None = says(None, "the list, each entry word: value; `vary` crosses it")
    samples: int | None = says(None, "how many trials to draw (random)")
    seed: int = says(0, "of the draws (random)")
    options: dict[str, Any] | None = says(None, "options of ldm train, the same for all trials, and keys of the config")
    evaluate: dict[str, Any] | None = says(None, "how trials are scored")


@dataclass
class Asked:
    """What a sweep is to do."""

    base: str
    settings: list[space.Settings]  # of each trial
    words: list[str]  # of ldm train, for all
    out: Path
    evaluate: dict[str, Any] = field(default_factory=dict)  # see `scoring.protocol_for`


@dataclass
class Trial:
    """One training: its settings and its whole config."""

    settings: space.Settings
    run: Run
    base: str  # the YAML that it starts from
    number: int
    class_pictures: int = 0  # that the folder of its class is filled to
    key: str = ""
    recipe: str = ""

    def about(self, out: Path) -> dict[str, Any]:
        """The columns that do not depend on how it goes."""
        adapters = words.adapters_in(self.run.config)
        routes = [f"{entry['din']}-{entry['dout']}" for _, entry in adapters]
        first = adapters[0][1] if len(adapters) == 1 else {}
        config, folders = plain(self.run.config), pictures_of(self.run)
        others = {name.replace(".", "_"): value for name, value in self.settings.items() if name not in
                  ("route", "seed", "subject", "class_word", "family", "lr", "steps")}  # fmt: skip
        return {
            "trial": self.number,
            "route": "+".join(routes) or None, "reads": first.get("din"), "writes": first.get("dout"),
            "seed": self.run.seed, "subject": Path(folders["subject"]).resolve().name,
            "class_word": self.run.notes["class_word"], "base": Path(self.base).stem,
            "lr": config["model"].get("base_learning_rate"), "steps": config["lightning"]["trainer"]["max_steps"],
            "batch_size": config["data"]["params"]["batch_size"],
            **{name: first.get(name) for name in ("mid_dim", "scale", "method")},
            **others,
            "recipe": self.recipe, "code": code_digest(),
            "subject_pictures": pictures_digest(folders["subject"]),
            "class_pictures": pictures_digest(folders["class"]),
            "config": config,
        }  # fmt: skip


def read_file(path: str) -> SweepFile:
    """A YAML file of a sweep. Raises `InputError` for keys and values that it does not take."""
    import yaml

    found = find_file(path)
    try:
        content = yaml.safe_load(read_yaml_text(found))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a mapping with {', '.join(SweepFile.model_fields)}, got {short(content)}")
    schema.check_part(SweepFile, content, "", path)
    return SweepFile(**content)


def asked(
    file: SweepFile, base: str | None, factors: Mapping[str, Sequence[Any]], train: Sequence[str], out: Path,
    evaluate: Mapping[str, Any],
) -> Asked:  # fmt: skip
    """A sweep of a file and of a command line, whose words, options and way of scoring replace those of the file.

    Raises `InputError` for words that cannot be varied, for values that contradict the way of searching, and for a
    misspelt key of `evaluate`.
    """
    base = base or file.base
    if base is None:
        raise InputError("nothing to vary: name a config with --base, or a YAML file of a sweep")
    if not find_file(base).is_file():
        raise InputError(f"--base {base} does not exist; the shipped configs are under configs/")
    vary: dict[str, Any] = {**(file.vary or {}), **factors}
    for name in (*vary, *(name for trial in file.trials or [] for name in trial)):
        words.check_word(name)
    settings = _settings(file, {name: _values(name, given, base) for name, given in vary.items()})
    how = {**(file.evaluate or {}), **evaluate}
    scoring.check(how)
    return Asked(base, settings, [*_options(file.options or {}), *train], out, how)


def _values(name: str, given: Any, base: str) -> Any:
    """What a word is varied over: a distribution as it is, or the list of all values."""
    if space.is_distribution(given):
        return _as_numbers(given)
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    return words.spread(name, _as_numbers(listed), base)


def _as_numbers(values: Any) -> Any:
    """Values of YAML 1.1, in which `1e-3` is a text, as a config has them."""
    if isinstance(values, Mapping):
        return {name: _as_numbers(given) for name, given in values.items()}
    if isinstance(values, list):
        return [_as_numbers(value) for value in values]
    return plain(OmegaConf.create(f"value: {values}").value) if _is_number(values) else values


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) == float(value) and value.strip() == value
    except ValueError:
        return False


def _settings(file: SweepFile, values: Mapping[str, Any]) -> list[space.Settings]:
    """The trials, by the way of searching. Raises `InputError` for a way that contradicts the rest of the file."""
    if (file.search == "list") != (file.trials is not None):
        raise InputError("search: list goes with trials: [{word: value, ...}, ...], the other ways without them")
    if file.search == "random":
        if not file.samples or file.samples < 1:
            raise InputError("search: random needs samples: how many trials to draw")
        return space.drawn(values, file.samples, file.seed)
    drawn_from = [name for name, given in values.items() if space.is_distribution(given)]
    if drawn_from or file.samples is not None:
        raise InputError(f"{', '.join(drawn_from) or 'samples'} needs search: random, got {file.search}")
    crossed = space.grid(values)
    listed = [{name: _as_numbers(value) for name, value in one.items()} for one in file.trials or [{}]]
    return [{**one, **more} for one in listed for more in crossed]


def _options(options: Mapping[str, Any]) -> list[str]:
    """`class_word: dog` as `--class_word dog`; a key with dots as an override."""
    told = []
    for name, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        told += [f"{name}={text}"] if "." in name else [f"--{name}", text]
    return told


# --- trials -------------------------------------------------------------------------------------------------------


def trials_of(sweep: Asked) -> list[Trial]:
    """Every trial with its whole config. Raises `InputError` for what `ldm train` would refuse, naming the trial."""
    found, classes = [], {}
    KNOWN.clear()
    for number, settings in enumerate(sweep.settings):
        if "family" in settings and "route" in settings:
            raise InputError("a trial has one of family and route: a route is one of the family of position adapters")
        base = words.base_of(settings, sweep.base)
        more = sweep.words + words.arguments_of(settings, base)
        try:
            run, number_of_class_pictures = planned(["--base", base, "-t", *more], sweep.out)
        except InputError as error:
            told = " ".join(f"{name}={value}" for name, value in settings.items())
            raise InputError(f"trial {number} ({told}): {error}") from None
        for folder, caption in dreambooth.class_folders(run.config):
            if classes.setdefault(folder.resolve(), caption) != caption:
                raise InputError(
                    f"{folder} would hold pictures of {caption!r} and of {classes[folder.resolve()]!r}; write "
                    f"--reg_data_root with {CLASS} in it, which stands for the class of each subject"
                )
        found.append(Trial(settings, run, base, number, number_of_class_pictures))
    return found


@cache
def train_parser() -> Parser:
    return dreambooth_parser("")


def planned(arguments: list[str], out: Path) -> tuple[Run, int]:
    """The run of a command line of `ldm train`, and how many class pictures its folder is filled to.

    Where nothing else is said, the class of a subject is that of its `subject.json`, and class pictures are the base's
    own, below the folder of the sweep.
    """
    options = train_parser().parse_args([*arguments, *OWN, "-l", str(out)])
    if options.data_root and options.class_word is None and (Path(options.data_root) / "subject.json").is_file():
        options.class_word = class_word_of(Path(options.data_root))
    if options.reg_data_root is None:
        options.reg_data_root = str(out / "classes" / CLASS)
    if CLASS in options.reg_data_root:
        word = options.class_word or ""
        options.reg_data_root = options.reg_data_root.replace(CLASS, word.replace("/", "_"))
        options.num_class_images = options.num_class_images or CLASS_PICTURES
    if options.cache is None:
        options.cache = str(out / "cache")
    run = like_another(options) or planned_anew(options)
    steps = OmegaConf.select(run.config, "lightning.trainer.max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"lightning.trainer.max_steps is {steps}: name the length of the trainings with --max_steps")
    return run, options.num_class_images


# Options that change where pictures, class and seed enter a config and nothing else of it.
OF_SUBJECT = ("data_root", "reg_data_root", "class_word", "seed")


def _rest_of(options: argparse.Namespace) -> str:
    rest = {name: value is None if name in OF_SUBJECT else value for name, value in vars(options).items()}
    return digest(rest)


def planned_anew(options: argparse.Namespace) -> Run:
    """The run of options, whose config is remembered for others that differ in their subject or seed alone."""
    ours, trainer, overrides = sorted_out(options)
    run = dreambooth.plan(ours, trainer, overrides)
    if not dreambooth.has_concepts(run.config):
        KNOWN[_rest_of(options)] = plain(run.config)
    return run


def like_another(options: argparse.Namespace) -> Run | None:
    """The same, from a config that is remembered: reading YAML takes longer than all else. None where there is none."""
    known = KNOWN.get(_rest_of(options))
    if known is None:
        return None
    config = OmegaConf.create(known)
    for name in OF_SUBJECT:
        if getattr(options, name) is not None:
            config.dreambooth[name] = getattr(options, name)
    dreambooth.fill_in_pictures(config, config.dreambooth, options.num_class_images)
    return dreambooth.as_run(config, dreambooth.new_folder(options))


KNOWN: dict[str, dict[str, Any]] = {}  # while the trials of one sweep are planned


def give_keys(trials: Iterable[Trial], protocol: Protocol) -> None:
    """Give each trial the digest of what determines it; its class pictures are there by now.

    Raises `InputError` where two trials are the same.
    """
    known: dict[str, Trial] = {}
    for trial in trials:
        trial.recipe = digest(recipe(trial.run, scoring.determined_by(protocol)))
        trial.key = digest([trial.recipe, code_digest()])
        other = known.setdefault(trial.key, trial)
        if other is not trial:
            raise InputError(f"trials {other.number} and {trial.number} are the same: {short(trial.settings)}")


def groups_of(trials: Sequence[Trial], size: int) -> list[list[Trial]]:
    """Trials that fit together, `size` at a time, in their order.

    Of what was interrupted the groups that are missing come out as they were: each is finished as a whole or not at
    all.
    """
    fitting: dict[str, list[Trial]] = {}
    for trial in trials:
        config = trial.run.config
        alike = [many.without(config), plain(OmegaConf.select(config, "lightning.modelcheckpoint"))]
        fitting.setdefault(digest(alike), []).append(trial)
    groups = [own[start : start + size] for own in fitting.values() for start in range(0, len(own), size)]
    return sorted(groups, key=lambda group: group[0].number)


def task_of(
    group: Sequence[Trial], sweep: Asked, protocol: Protocol, keep: Sequence[str], rungs: Sequence[int] = ()
) -> Task:
    """What a worker is given."""
    trials = [{"key": trial.key, "config": plain(trial.run.config), "about": trial.about(sweep.out)} for trial in group]
    name = digest([trial.key for trial in group])
    return Task(name, str(sweep.out), trials, protocol, tuple(keep), tuple(rungs))
