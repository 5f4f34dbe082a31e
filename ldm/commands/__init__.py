"""The verbs of `ldm <verb>`: a module each, called as the verb is, with `add_arguments(parser)` and `run(options)`.

The first line of a module's docstring is the verb's help; `ldm --help` reads it without importing the module. A new
verb is a module and its name in the table below. No module imports at its top what takes long to import (torch above
all), so that `ldm <verb> --help` and completion answer at once.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ldm import lightning
from ldm.cli import Parser, complete

VERBS = {
    "training": ("train", "train-many", "plan", "fit", "lora-pti", "lora-dreambooth", "custom-diffusion",
                 "class-pictures", "cache-latents", "config"),
    "studies": ("sweep", "anova", "report"),
    "pictures": ("sample", "txt2img", "img2img", "inpaint", "sample-diffusion", "before-after", "evaluate",
                 "guidance", "demo"),
    "files of adapters, LoRAs, deltas, words and models": (
        "inspect", "convert", "merge", "resize", "lora-add", "distill", "mix", "deltas", "compress", "compose",
    ),
}  # fmt: skip
# The others do without Lightning.
TRAINS = {"train", "train-many", "fit", "lora-pti", "lora-dreambooth", "custom-diffusion", "sweep", "demo"}


def verbs() -> list[str]:
    """The verbs, in the order of the table."""
    return [verb for group in VERBS.values() for verb in group]


def module_name(verb: str) -> str:
    """The name of a verb's module in this package."""
    return verb.replace("-", "_")


def help_of(verb: str) -> str:
    """What a verb does, in a line; its module is read and not imported."""
    source = Path(find_spec(f"{__name__}.{module_name(verb)}").origin).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


@dataclass(frozen=True)
class Program:
    """A verb as a `main(argv)`; `prog` is how messages call it (default: as it was called)."""

    verb: str
    prog: str | None = None

    def has_process(self) -> None:
        """The process runs this verb and nothing else: what it does not need need not be imported."""
        if self.verb not in TRAINS:
            lightning.leave_out()

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"{__name__}.{module_name(self.verb)}")

    def parser(self) -> Parser:
        return self.fill(Parser(prog=self.prog))

    def fill(self, parser: Parser) -> Parser:
        """Give a parser the verb's description and options."""
        parser.description = self.module.__doc__
        self.module.add_arguments(parser)
        return parser

    def __call__(self, argv: list[str] | None = None) -> int | None:
        if argv is None:
            self.has_process()
        parser = self.parser()
        complete(parser)
        return self.module.run(parser.parse_args(argv))
