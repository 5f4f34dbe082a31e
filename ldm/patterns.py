"""Floor 0: regular expressions from files, which may take forever by mistake or on purpose."""

from __future__ import annotations

import time

import regex

from ldm.errors import InputError, short

SECONDS = 2.0  # for all matches of one file's patterns
LENGTH = 1000


class Patterns:
    """Matches patterns from one file within `SECONDS` in total. Raises `InputError` if it takes longer.

    The package `regex` has the features of `re`, and a timeout.
    """

    def __init__(self, source: str, seconds: float = SECONDS) -> None:
        self.source, self.left = source, seconds
        self.compiled: dict[str, regex.Pattern] = {}

    def search(self, pattern: str, text: str) -> bool:
        """Whether the pattern matches somewhere in the text."""
        return self._timed("search", pattern, text)

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Whether the pattern matches the whole text."""
        return self._timed("fullmatch", pattern, text)

    def _timed(self, how: str, pattern: str, text: str) -> bool:
        began = time.monotonic()
        try:
            if pattern not in self.compiled:
                if not isinstance(pattern, str) or len(pattern) > LENGTH:
                    raise InputError(f"{self.source}: {short(pattern)} is too long for a pattern of names")
                self.compiled[pattern] = regex.compile(pattern)
            if self.left <= 0:
                raise TimeoutError
            return getattr(self.compiled[pattern], how)(text, timeout=self.left) is not None
        except (TimeoutError, RecursionError, MemoryError):
            raise InputError(f"{self.source}: matching its pattern {short(pattern)} takes too long") from None
        except regex.error as error:
            raise InputError(f"{self.source}: {short(pattern)} is not a regular expression ({error})") from None
        finally:
            self.left -= time.monotonic() - began
