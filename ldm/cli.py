"""Floor 0: common to all command lines: the parser, types of options, and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm import trust
from ldm.errors import InputError, did_you_mean
from ldm.writing import printable, why

log = logging.getLogger(__name__)

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def run_command(main: Callable[[list[str] | None], int | None]) -> None:
    """Run a command's `main`: `InputError` becomes a line on stderr and exit code 2, Ctrl-C exit code 130.

    SIGTERM raises `SystemExit` with code 143, so that cleanup code runs.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may have bytes that are not text in this locale
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _told_of_thread
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(None)
    except InputError as error:
        log.error("error: %s", " ".join(str(error).split()))
        code = 2
    except OSError as error:
        log.error("error: %s", " ".join(refused(error).split()))
        code = 2
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        log.error("error: a name of a file has a NUL character")
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # as shells have it
    sys.exit(code or 0)


def refused(error: OSError) -> str:
    """An error of the system as one line, with the name of the file if it is known."""
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return f"{named[0][:200]}: {why(error)}" if named else why(error)


def _told_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Log one line for a thread that cannot write; the main thread gets the same error."""
    if isinstance(failed.exc_value, OSError):
        log.warning("%s stopped: %s", failed.thread.name if failed.thread else "a thread", refused(failed.exc_value))
    else:
        threading.__excepthook__(failed)


def text(given: str) -> str:
    """argparse type for text that a model reads. Raises for bytes that are not UTF-8."""
    try:
        return os.fsencode(given).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"expected text in UTF-8, got {printable(given)!r}") from None


def _terminate(number: int, _frame: Any) -> None:
    log.error("stopped by SIGTERM")
    raise SystemExit(128 + number)


def boolean(text: str) -> bool:
    """argparse type for `True`, `no`, `1`, ..."""
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in TRUE


def seed_number(text: str) -> int:
    """argparse type for a seed that torch, numpy and Lightning all take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**32 - 1}, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """argparse type for how many, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """argparse type for a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


class Parser(argparse.ArgumentParser):
    """An argument parser with unformatted descriptions and errors of one line.

    A program may set `respell`, which changes the words before parsing, and `rest`, which gets the parser, the options
    and the remaining words.
    """

    respell: Callable[[Sequence[str]], Sequence[str]] | None = None
    rest: Callable[[Parser, argparse.Namespace, list[str]], None] | None = None

    def __init__(self, *args: Any, formatter_class: Any = argparse.RawDescriptionHelpFormatter, **options: Any) -> None:
        super().__init__(*args, formatter_class=formatter_class, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        (self.rest or refuse)(self, options, rest)
        return options

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        known, rest = super().parse_known_args(self.respell(words) if self.respell else words, namespace)
        # by this command line and no earlier one
        trust.allowed_families = list(getattr(known, "allow_family", []))
        trust.trust_config = getattr(known, "trust_config", False)
        return known, rest


def refuse(parser: Parser, _options: argparse.Namespace, rest: list[str]) -> None:
    """Raises `InputError` for remaining words, with the nearest option."""
    if rest:
        unknown = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
        near = did_you_mean(unknown, parser._option_string_actions) if unknown.startswith("-") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{near if 'did you mean' in near else ''}")


def keep_rest(_parser: Parser, options: argparse.Namespace, rest: list[str]) -> None:
    """Keep remaining words in `options.rest`, for a program that passes them on."""
    options.rest = rest


def underscores(words: Sequence[str]) -> list[str]:
    """Accept `--alpha-1 x` like `--alpha_1=x`: replace dashes in the names of options by underscores."""

    def spelled(word: str) -> str:
        name, equals, value = word.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word

    return [spelled(word) for word in words]


def in_order(values: Sequence[str], named: Mapping[str, str | None], usage: str) -> list[str]:
    """Arguments by position or by name (`a b` or `--one a --two b`, as in python-fire), in order."""
    rest = list(values)
    found = [value if value is not None else rest.pop(0) if rest else None for value in named.values()]
    if rest or None in found:
        raise InputError(f"expected {usage}, by position or as --name value; got {len(values)} by position")
    return found


def add_files(parser: argparse.ArgumentParser, config: str) -> None:
    """The common options of commands on files: `--config`, `--force` and `--allow_family`."""
    parser.add_argument("--config", help="config of the base model (default: that of the run or base that an input is "
                        f"of, else {config})")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite what exists")
    add_allow_family(parser)


def add_base_parts(group: argparse._ActionsContainer) -> None:
    """The options of programs that read a base: `--vae`, `--text_encoder`, `--ema`, see `base_choice.Choice`."""
    group.add_argument("--vae", metavar="FILE_OR_FOLDER", help="this autoencoder, instead of the base's own")
    group.add_argument("--text_encoder", action="append", metavar="FILE_OR_FOLDER",
                       help="this text encoder, instead of the base's own; repeatable for SDXL")  # fmt: skip
    add_ema(group, "the base")


def add_ema(group: argparse._ActionsContainer, what: str, option: str = "--ema") -> None:
    """The option that chooses between two sets of weights of a model."""
    group.add_argument(option, type=boolean, metavar="yes|no", help="the average of the training (EMA) or the last "
                       f"weights, where {what} holds both")  # fmt: skip


def add_allow_family(group: argparse._ActionsContainer) -> None:
    """The option `--allow_family` of every program that reads folders of adapters, see `ldm.trust`."""
    group.add_argument("--allow_family", action="append", default=[], metavar="my.module.Family",
                       help="import this family of tuning if a folder asks for it; repeatable")  # fmt: skip


# Modes of torch.compile. With `reduce-overhead` a GPU replays CUDA graphs instead of launching single kernels.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def add_compile(group: argparse._ArgumentGroup) -> None:
    """The option `--compile [MODE]`."""
    group.add_argument("--compile", nargs="?", const="default", choices=COMPILE_MODES,
                       help="torch.compile the UNet; with reduce-overhead a GPU replays CUDA graphs")  # fmt: skip


def complete(parser: argparse.ArgumentParser) -> None:
    """If the shell asks for completions, answer and exit; see argcomplete."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
