# PYTHON_ARGCOMPLETE_OK
"""The command `ldm <verb>`, also as `python -m ldm <verb>`."""

from __future__ import annotations

import os
import sys

from ldm.cli import Parser, complete, run_command
from ldm.commands import VERBS, Program, help_of, verbs
from ldm.errors import InputError, did_you_mean


def main(argv: list[str] | None = None) -> int | None:
    words = sys.argv[1:] if argv is None else list(argv)
    if "COMP_LINE" in os.environ:
        complete(completion(os.environ["COMP_LINE"].split()[1:]))
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return None
    if words[0] in verbs():
        program = Program(words[0], f"ldm {words[0]}")
        if argv is None:
            program.has_process()
        return program(words[1:])
    raise InputError(f"{words[0]!r} is no verb{did_you_mean(words[0], verbs())}; see ldm --help")


def overview() -> str:
    """The list of verbs by topic, each with its help line."""
    width = max(map(len, verbs()))
    lines = ["usage: ldm <verb> ...      ldm <verb> --help", "", __doc__.partition("\n")[0]]
    for group, members in VERBS.items():
        lines += ["", f"{group}:", *(f"  {verb:{width}}  {help_of(verb)}" for verb in members)]
    return "\n".join(lines)


def completion(words: list[str]) -> Parser:
    """The parser for argcomplete: it knows all verbs, and the options of the verb on the command line."""
    parser = Parser(prog="ldm")
    rows = parser.add_subparsers()
    for verb in verbs():
        row = rows.add_parser(verb, help=help_of(verb))
        if words[:1] == [verb]:
            Program(verb).fill(row)
    return parser


def command() -> None:
    """The console script."""
    run_command(main)


def lora_add() -> None:
    """The console script of this published name; the others follow."""
    run_command(Program("lora-add"))


def lora_distill() -> None:
    run_command(Program("distill"))


def lora_pti() -> None:
    run_command(Program("lora-pti"))


if __name__ == "__main__":
    command()
