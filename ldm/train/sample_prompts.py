"""Prompts of sample pictures, with settings of their own behind them as in kohya's files of sample prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.errors import InputError, explain
from ldm.files import read_text
from ldm.generate import Settings

# `a photo of a dog --n blurry --w 768 --h 512 --d 7 --l 6 --s 30`
FIELDS = {"w": ("width", int), "h": ("height", int), "l": ("scale", float), "s": ("steps", int)}
FLAG = re.compile(r"\s--([A-Za-z]+)(?=\s|$)")


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt, with what its line says about how it is drawn."""

    text: str
    negative: str = ""
    seed: int | None = None
    settings: dict[str, Any] | None = None

    def settings_over(self, usual: Settings) -> Settings:
        return replace(usual, **(self.settings or {}))


def sample_prompt(line: str) -> SamplePrompt:
    """A line as a prompt. Raises `InputError` for a flag or a value that cannot be read."""
    text, *parts = FLAG.split(" " + line)
    settings: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for flag, value in zip(parts[::2], parts[1::2], strict=True):
        value = value.strip()
        with explain(f"sample prompt {line!r}: --{flag} {value}: expected a number", ValueError):
            if flag in FIELDS:
                name, kind = FIELDS[flag]
                settings[name] = kind(value)
            elif flag == "d":
                rest["seed"] = int(value)
            elif flag == "n":
                rest["negative"] = value
            else:
                raise InputError(
                    f"sample prompt {line!r}: --{flag} is unknown; expected --n (negative prompt), --w, --h (pixels), "
                    "--d (seed), --l (guidance scale), --s (steps)"
                )
    if any(value <= 0 for name, value in settings.items() if name != "scale"):
        raise InputError(f"sample prompt {line!r}: sizes and steps must be above 0")
    return SamplePrompt(text.strip(), settings=settings, **rest)


def read_prompts(given: Iterable[str]) -> list[str]:
    """The lines of `--sample_prompts`: each word is a prompt, or a text file with one in each line.

    Empty lines and lines that begin with # are left out. Raises `InputError` for a file without prompts.
    """
    lines: list[str] = []
    for one in given:
        if not Path(one).is_file():
            if one.endswith((".txt", ".toml", ".json")):
                raise InputError(f"--sample_prompts: there is no file {one}")
            lines.append(one)
            continue
        if one.endswith((".toml", ".json")):
            raise InputError(f"--sample_prompts {one}: expected a text file with a prompt in each line")
        found = [line.strip() for line in read_text(Path(one)).splitlines()]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise InputError(f"--sample_prompts {one}: there is no prompt in it")
        lines += found
    for line in lines:
        sample_prompt(line)
    return lines
