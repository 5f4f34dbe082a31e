"""The command line of training: LDM's options, Lightning's options, overrides of the config."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, get_args

from ldm import schema
from ldm.cli import Parser, add_allow_family, add_base_parts, add_compile, boolean, count, positive, seed_number, text
from ldm.config import parse_overrides, plain
from ldm.errors import InputError, did_you_mean


def add_training(p: Parser, several: bool = False) -> None:
    """The options that every training entry has; `several` trainings at once have no test set."""
    p.usage = "%(prog)s --base YAML ... -t [options] [a.b.c=value ...]"
    p.allow_abbrev = False
    p.epilog = (
        "Any other option of Lightning's Trainer works too (--gradient_clip_val 1.0 ...), and so do overrides\n"
        "of the config: model.base_learning_rate=1e-3 data.params.batch_size=2"
    )
    p.rest, p.respell = sort_rest, partial(with_values, p)
    run = p.add_argument_group("run")
    run.add_argument(
        "-b", "--base", nargs="*", action="extend", default=[], metavar="YAML",
        help="configs, later ones win; auto: the first one for the kind of --actual_resume",
    )
    run.add_argument(
        "-t", "--train", type=boolean, nargs="?", const=True, default=False, help="train (else only report)"
    )
    run.add_argument(
        "-r", "--resume", nargs="?", const="", default="", metavar="DIR", help="go on with this run's last.ckpt"
    )
    run.add_argument("--trust_config", action="store_true",
                     help="-r: import whatever the run's own config names")  # fmt: skip
    add_allow_family(run)
    if not several:
        run.add_argument(
            "--no-test", type=boolean, nargs="?", const=True, default=False, help="skip the test set at the end"
        )
    run.add_argument("-s", "--seed", type=seed_number, help=help_of(schema.Training, "seed"))
    run.add_argument("-d", "--debug", type=boolean, nargs="?", const=True, default=False, help="debugger after a crash")
    run.add_argument("--scale_lr", type=boolean, nargs="?", const=True,
                     help=help_of(schema.Training, "scale_lr"))  # fmt: skip

    files = p.add_argument_group("where things go: <logdir>/<project>/<data><timestamp>_<name><postfix>")
    files.add_argument(
        "-n", "--name", nargs="?", const="", default="", help="name of the run (default: that of the config)"
    )
    files.add_argument("-f", "--postfix", default="", help="end of the name")
    files.add_argument("-p", "--project", default="", help="sub-folder that groups runs")
    files.add_argument("-l", "--logdir", default="logs", help="(default logs)")

    machine = p.add_argument_group("machine and length (Lightning's Trainer)")
    machine.add_argument(
        "--gpus", metavar="0,3", help="these GPUs, with DDP if several (default: what the machine has)"
    )
    machine.add_argument("--keep_memory", type=boolean,
                         help=help_of(schema.Training, "keep_memory"))  # fmt: skip
    for name in TRAINER_OPTIONS:
        kind = int if name in WHOLE else str
        text = help_of(schema.Trainer, name, False)
        machine.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)


    add_saving(p, several)


def add_saving(p: Parser, several: bool = False) -> None:
    """Options for what is saved, and for when a run ends. Trainings side by side end together."""
    saving = p.add_argument_group("saving and stopping")
    saving.add_argument("--checkpoints_total_limit", type=count, metavar="N",
                        help=help_of(schema.CheckpointParams, "total_limit"))  # fmt: skip
    saving.add_argument("--save_every_minutes", type=positive, metavar="MINUTES",
                        help=help_of(schema.CheckpointParams, "every_n_minutes"))  # fmt: skip
    seen = p.add_argument_group("what one sees")
    seen.add_argument("--logger", choices=("tensorboard", "csv", "wandb", "mlflow"),
                      help="where numbers and pictures go (default tensorboard)")  # fmt: skip
    seen.add_argument("--sample_every_n_steps", type=count, metavar="N", help="steps between sheets of sample pictures")
    if several:
        return
    seen.add_argument("--sample_prompts", nargs="+", metavar="FILE|PROMPT",
                      help="prompts of sample pictures, or files with one a line")  # fmt: skip
    saving.add_argument("--early_stopping", type=count, metavar="N",
                        help=help_of(schema.Monitor, "early_stopping"))  # fmt: skip
    saving.add_argument("--save_best", type=boolean, nargs="?", const=True,
                        help=help_of(schema.Monitor, "save_best"))  # fmt: skip
    saving.add_argument("--monitor", metavar="METRIC", help="what these two go by: a logged value (default val/loss)")
    saving.add_argument("--monitor_mode", choices=("min", "max"), help=help_of(schema.Monitor, "mode"))


def help_of(section: type[schema.Section], name: str, with_default: bool = True) -> str:
    """The help of an option that is also a key of a config."""
    field = section.model_fields[name]
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    has_default = with_default and value is not None and "default" not in field.description
    return field.description + (f" (default {value})" if has_default else "")


def add_dreambooth(p: Parser, several: bool = False) -> None:
    """The options of `ldm train`: the common options of training and the options of DreamBooth.

    With `several`, the options of the subject take a list, and options that `ldm.train.many` lacks are left out.
    """
    add_training(p, several)
    each = {"nargs": "+"} if several else {}
    subject = p.add_argument_group("DreamBooth")
    subject.add_argument(
        "--actual_resume", "--resume-from-checkpoint-custom",  # so Custom Diffusion calls it
        metavar="CKPT", help=help_of(schema.DreamBooth, "base"),
    )  # fmt: skip
    add_base_parts(subject)
    subject.add_argument("--data_root", metavar="DIR", help=help_of(schema.DreamBooth, "data_root"), **each)
    subject.add_argument("--reg_data_root", metavar="DIR", help=help_of(schema.DreamBooth, "reg_data_root"), **each)
    subject.add_argument("--class_word", type=text, help=help_of(schema.DreamBooth, "class_word"), **each)
    subject.add_argument("--captions", choices=get_args(schema.CaptionSource),
                         help="where captions of photographs are from (default template); docs/data.md")  # fmt: skip
    subject.add_argument("--caption_ext", metavar=".txt", help="ending of caption files beside the photographs")
    subject.add_argument("--num_class_images", type=int, default=0, metavar="N",
                         help="first fill --reg_data_root up to N pictures by sampling the base model")  # fmt: skip
    subject.add_argument("--class_scale", type=float, metavar="S",
                         help=help_of(schema.DreamBooth, "class_scale"))  # fmt: skip
    subject.add_argument("--datadir_in_name", type=boolean, nargs="?", const=True, default=True,
                         help="begin the name of the run with that of --data_root (default true)")  # fmt: skip
    subject.add_argument("--base_precision", choices=("fp32", "bf16", "fp16"),
                         help=help_of(schema.DreamBooth, "base_precision"))  # fmt: skip
    subject.add_argument("--cache", metavar="memory|off|DIR",
                         help=help_of(schema.DreamBooth, "cache"))  # fmt: skip
    if not several:
        add_short(p)
        add_compile(subject)
        subject.add_argument("--embedding_manager_ckpt", metavar="FILE",
                             help=help_of(schema.DreamBooth, "words"))  # fmt: skip
    subject.add_argument("--init_word", type=text, help="start of learnt words, in configs that learn some")
    concept = p.add_argument_group("Custom Diffusion: concepts, each option once for each of them, in their order")
    for number in ("", "2"):  # the published program counts them
        concept.add_argument(f"--datapath{number}", dest="datapath", action="append", default=[], metavar="DIR",
                             help="photographs, or a text file with their paths")  # fmt: skip
        concept.add_argument(f"--caption{number}", dest="caption", action="append", default=[], metavar="TEXT",
                             help="what they show, e.g. '<new1> dog', or a text file of captions")  # fmt: skip
        concept.add_argument(f"--reg_datapath{number}", dest="reg_datapath", action="append", default=[], metavar="DIR",
                             help="pictures of the class")  # fmt: skip
        concept.add_argument(f"--reg_caption{number}", dest="reg_caption", action="append", default=[], metavar="TEXT",
                             help="what they show, e.g. dog")  # fmt: skip
    concept.add_argument("--concepts_list", metavar="JSON", help="the same as a file")
    concept.add_argument("--modifier_token", metavar="<new1>+<new2>", help="words that learn")
    if not several:
        concept.add_argument("--delta_ckpt", "--delta-ckpt", metavar="FILE", help=help_of(schema.DreamBooth, "delta"))
        concept.add_argument("--batch_size", type=count, metavar="N",
                             help="pictures in a batch, as data.params.batch_size")  # fmt: skip
        concept.add_argument("--repeat", type=count, metavar="N",
                             help="how often an epoch shows each picture of a concept")  # fmt: skip
    concept.add_argument("--freeze_model", help="crossattn-kv or crossattn: the part of the UNet that learns")


def add_short(p: Parser) -> None:
    """Options for the most common changes of a config, see `ldm.train.short_options`."""
    short = p.add_argument_group("short for keys of the config")
    short.add_argument("--lr", type=positive, metavar="RATE", help="learning rate: model.base_learning_rate")
    short.add_argument("--family", metavar="NAME",
                       help="what learns, instead of what the config says: lora, dora, loha, oft, ...")  # fmt: skip
    short.add_argument("--route", metavar="attn2o-ffni", help="where a position adapter reads and writes")
    short.add_argument("--rank", type=count, metavar="N",
                       help="rank of the family; without one that has it, width of the position adapters")  # fmt: skip
    short.add_argument("--alpha", type=positive, metavar="A", help="alpha of the family: its change times alpha / rank")


def dreambooth_parser(description: str, several: bool = False) -> Parser:
    """A parser of what `add_dreambooth` adds."""
    p = Parser(description=description)
    add_dreambooth(p, several)
    return p


def with_values(p: Parser, words: Sequence[str]) -> list[str]:
    """Give a flag that may have a value its usual one where an override follows: `-t optimizer=lion`."""
    flags = {
        name: str(action.const) for name, action in p._option_string_actions.items()
        if action.nargs == "?" and (action.type is boolean or action.choices)
    }  # fmt: skip
    spelled = []
    for word, following in itertools.pairwise([*words, ""]):
        is_bare = word in flags and re.match(r"[a-z]\w*(\.\w+)*=", following)
        spelled += [word, flags[word]] if is_bare else [word]
    return spelled


def sort_rest(p: Parser, options: argparse.Namespace, rest: list[str]) -> None:
    """Sort the other words of a command line into `options.trainer_options` and `options.overrides` of the config.

    Raises `InputError` for anything else.
    """
    named = {name: value for name, value in vars(options).items() if name in TRAINER_OPTIONS}
    more, overrides = _trainer_options(rest, p._option_string_actions)
    swallowed = [word for word in options.base if "=" in word and not word.endswith((".yaml", ".yml"))]
    options.base = [word for word in options.base if word not in swallowed]
    prompts = getattr(options, "sample_prompts", None) or []
    swallowed += [word for word in prompts if re.match(r"\w+(\.\w+)+=", word)]
    if prompts:
        options.sample_prompts = [word for word in prompts if word not in swallowed]
    options.trainer_options, options.overrides = named | more, swallowed + overrides


def sorted_out(options: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    """Our own options, those of Lightning's Trainer, and the overrides of the config."""
    ours = argparse.Namespace(**vars(options))
    return ours, vars(ours).pop("trainer_options"), vars(ours).pop("overrides")


def parse(p: Parser, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    """Parse a command line into the three parts of `sorted_out`. Raises `InputError`."""
    return sorted_out(p.parse_args(argv))


TRAINER_OPTIONS = (
    "accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs",
    "accumulate_grad_batches", "log_every_n_steps",
)  # fmt: skip
WHOLE = ("num_nodes", "max_steps", "max_epochs", "accumulate_grad_batches", "log_every_n_steps")


def _trainer_options(rest: list[str], known: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """`--name value` and `--name=value` for Trainer options, dotted `a.b=value` as overrides."""
    given, overrides, words = [], [], list(rest)
    while words:
        word = words.pop(0)
        key, has_value, value = word.partition("=")
        if has_value and ("." in key or key.removeprefix("--") in schema.Config.model_fields or key.isidentifier()):
            overrides.append(word)
        elif word.startswith("--"):
            if not has_value:
                value = words.pop(0) if words and not words[0].startswith("--") else "true"
            given.append(f"{key}={value}")
        else:
            raise InputError(
                f"cannot read {word!r}: expected an option of --help or an override such as model.params.reg_weight=0.5"
            )
    options = plain(parse_overrides(given))
    if options:
        _check_trainer_options(options, known)
    return options, overrides


def _check_trainer_options(options: dict[str, Any], known: Iterable[str]) -> None:
    """Raises `InputError` for options that Lightning's Trainer lacks. `known`: other options, for suggestions."""
    sections = [*schema.Trainer.model_fields, *schema.Config.model_fields]
    for name in options:
        if name not in schema.Trainer.model_fields:
            if name in schema.Config.model_fields:
                raise InputError(f"unknown option --{name}; it is a key of the config: {name}={options[name]}")
            near = did_you_mean(f"--{name}", [*known, *(f"--{one}" for one in sections)])
            hint = near if "did you mean" in near else ": neither one of --help nor one of Lightning's Trainer"
            raise InputError(f"unknown option --{name}{hint}")
    schema.check_part(schema.Trainer, options, "--")
