"""Floor 0: errors for the user, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Bad input from the user: its message is one line (what was wrong, what was expected, what to do).

    Commands print it without a traceback and exit with code 2, see `run_command`. From a data-loading process, the
    message arrives with a traceback around it; then the last line counts. Words of more than 300 letters are cut.
    """

    def __init__(self, message: str) -> None:
        message = str(message).strip().split(f"{__name__}.InputError: ")[-1]
        super().__init__(re.sub(r"\S{301,}", lambda word: _cut(word[0]), message))


class WriteError(InputError):
    """A file or folder cannot be written. The message says what is still intact."""

    def __init__(self, path: Any, reason: str, was_there: bool = False, kept: str = "") -> None:
        self.path, self.reason = path, reason
        kept = kept or ("what was there is unchanged" if was_there else "nothing of it is left behind")
        super().__init__(f"{_cut(str(path))} cannot be written: {reason}; {kept}")


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def short(value: Any, limit: int = 80) -> str:
    """repr, cut to fit into a one-line message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all known names."""
    known = [str(one) for one in known]
    near = difflib.get_close_matches(str(name), known, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; expected {', '.join(known)}" if known else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for wrapping it into a one-line `InputError`."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def explain(prefix: str, *kinds: type[BaseException]):
    """Turn exceptions of the given kinds into an `InputError` whose line starts with `prefix`."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{prefix}: {first_line(error)}") from error
