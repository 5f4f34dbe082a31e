"""What the system refuses to write is one line that names the path and what is intact; nothing is left behind."""

import errno
import os
import re
import resource
import signal
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from ldm import cli
from ldm.checkpoints import atomic_write, read_weights, save_json, save_safetensors, save_text, save_torch
from ldm.errors import InputError, WriteError
from ldm.files import read_text
from ldm.generate import save_numbered, save_png

BIG = {"a": torch.ones(300_000)}


@contextmanager
def files_of_at_most(size: int):
    """No process can write a larger file meanwhile: what a full disk looks like, without one.

    Python would leave half of what it compiles meanwhile, and not find out.
    """
    monkey = pytest.MonkeyPatch()
    monkey.setattr(sys, "dont_write_bytecode", True)
    monkey.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        monkey.undo()


def folder(path):
    with atomic_write(path) as beside:
        beside.mkdir()
        save_safetensors(beside / "adapters.safetensors", BIG)


WRITERS = {
    "a.ckpt": lambda path: save_torch(path, BIG),
    "a.safetensors": lambda path: save_safetensors(path, BIG),
    "a.json": lambda path: save_json(path, ["word"] * 100_000),
    "a.txt": lambda path: save_text(path, "word" * 100_000),
    "a.png": lambda path: save_png(torch.rand(3, 300, 300), path, {}),
    "500-adapters": folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(tmp_path, name):
    with files_of_at_most(100_000), pytest.raises(WriteError) as refused:
        WRITERS[name](tmp_path / name)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / name} cannot be written: ") and "\n" not in message
    assert message.endswith("; nothing of it is left behind")
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays(tmp_path):
    save_torch(tmp_path / "a.ckpt", {"a": torch.arange(3)})
    with files_of_at_most(100_000), pytest.raises(WriteError, match="; what was there is unchanged$"):
        save_torch(tmp_path / "a.ckpt", BIG)
    assert read_weights(tmp_path / "a.ckpt")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_system_says_is_in_the_line(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError, match=f"a.json cannot be written: {os.strerror(number)}; nothing"):
        save_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file" / "a.json", "file is a file, not a folder"),
        (tmp_path / ("n" * 5000), "File name too long"),
        (tmp_path / "a\0b", "its name has a NUL character"),
    ):
        with pytest.raises(WriteError, match=reason) as refused:
            save_json(path, {})
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_two_that_draw_into_one_folder_lose_no_picture(tmp_path, monkeypatch, links):
    """Both have counted the pictures that are there before the other writes."""
    if not links:

        def refuse(*_):
            raise PermissionError(errno.EPERM, "no links on this file system")

        monkeypatch.setattr(os, "link", refuse)
    white, black = torch.ones(3, 4, 4), torch.zeros(3, 4, 4)
    numbers = [save_numbered(picture, tmp_path, "{:05}.png", 0, {}) for picture in (white, black, white)]
    assert numbers == [0, 1, 2] and sorted(p.name for p in tmp_path.iterdir()) == [f"0000{n}.png" for n in numbers]
    assert [Image.open(tmp_path / f"0000{n}.png").getpixel((0, 0))[0] for n in numbers] == [255, 0, 255]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file is a file, not a folder"):
        save_numbered(white, tmp_path / "file", "{:05}.png", 0, {})


def test_errors_of_our_own_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^ours$"), atomic_write(tmp_path / "a"):
        raise RuntimeError("ours")


@pytest.mark.parametrize(
    "error,line",
    [
        (OSError(errno.ENAMETOOLONG, "x", "n" * 5000), "error: n+: File name too long"),
        (PermissionError(errno.EACCES, "x", "photos"), "error: photos: Permission denied"),
        (ValueError("lstat: embedded null character in path"), "error: a name of a file has a NUL character"),
    ],
)
def test_a_command_ends_with_one_line(monkeypatch, caplog, error, line):
    def main(_):
        raise error

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with caplog.at_level("ERROR"), pytest.raises(SystemExit) as ended:
        cli.run_command(main)
    assert ended.value.code == 2
    (record,) = caplog.records
    assert re.fullmatch(line, record.getMessage())


def test_texts_are_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n")
    assert read_text(tmp_path / "a.txt").strip() == "caf\xe9"
    with pytest.raises(InputError, match="b.txt cannot be read .*; expected .*UTF-8"):
        read_text(tmp_path / "b.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_that_are_no_text_are_written_down(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    save_text(tmp_path / name, name)
    assert read_text(tmp_path / name) == "caf\\udce9"
    save_png(torch.rand(3, 4, 4), tmp_path / "a.png", {"config": name})
