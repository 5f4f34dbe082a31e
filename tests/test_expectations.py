"""docs/expectations.md: its commands are understood, and its tests exist."""

import importlib.util
import re
import shlex

import pytest

from ldm.commands import Program
from ldm.errors import InputError
from ldm.train.options import dreambooth_parser, parse
from ldm.train.run_config import opened
from tests.conftest import ROOT

BASE = ("configs/sd-mini/lora-attention.yaml", "configs/text-image/captioned.yaml")
ROWS = [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| expectation |"))
]
QUOTED = {quoted for row in ROWS for quoted in re.findall(r"`([^`]+)`", row[4])}
COMMANDS = sorted(quoted for quoted in QUOTED if "=" in quoted or quoted.startswith(("-", "ldm ")))


def understood(command: str) -> None:
    """Read a command of the page as the program does, up to the checked config. Raises `InputError`."""
    words = [re.sub(r"^\.", "data.params.train.params.", word) for word in shlex.split(command)]
    if words[0] == "ldm":
        Program(words[1]).parser().parse_args(words[2:])
        return
    options, trainer, overrides = parse(dreambooth_parser(""), ["-b", *BASE, "-n", "run", *words])
    if options.resume:  # its run does not exist
        options.resume, options.name = "", "run"
    opened(options, overrides, trainer)


def test_the_page_is_read():
    assert len(ROWS) > 80 and len(COMMANDS) > 80 and all(len(row) == 6 for row in ROWS)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_page_says_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # optimizers that are not installed
    understood(command)


@pytest.mark.parametrize("command", [".flip=0.5", "--cach off", "loss.weigting=min_snr", ".buckets={stp: 16}"])
def test_what_it_might_say_wrongly_is_not(command):
    with pytest.raises(InputError):
        understood(command)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_tests_of_the_page_exist(row):
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[5])
    assert named, "an expectation without a test belongs below 'Not here'"
    for module, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / module).read_text(encoding="utf-8"), name
