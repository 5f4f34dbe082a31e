"""Names of files that are no text in any encoding, words beyond ASCII, and a locale that knows neither."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.runs import ENVIRONMENT, TINY, pictures

pytestmark = pytest.mark.slow

LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
PROMPT = "a \N{CAT FACE} in a caf\xe9"
SCRIPT = """
import os, sys
from ldm.cli import run_command

def call(module, *words):
    import importlib
    try:
        run_command(lambda _: importlib.import_module(module).main(list(words)))
    except SystemExit as end:
        print(module, "ended with", end.code, flush=True)

tiny, photos, work, prompt = sys.argv[1:]
logs, out = (os.path.join(work, name) for name in ("logs", "out"))
words = ["--base", tiny, "-t", "--reg_data_root", photos, "--class_word", "dog", "--logdir", logs,
         "-n", os.path.basename(work), "--accelerator", "cpu", "--max_steps", "1"]
call("main_dream_booth", *words, "--data_root", os.path.join(work, "photos"))
call("main_dream_booth", *words, "--data_root", photos)
[run] = os.listdir(logs)
folder = os.path.join(logs, run, "checkpoints", "1-adapters")
call("sample", "--config", tiny, "--device", "cpu", "--ddim_steps", "1", "--n_iter", "1", "--outdir", out,
     "--adapter_path", folder, "--prompt", prompt)
call("scripts.convert", folder, os.path.join(work, "x.safetensors"), "--to", "kohya")
call("scripts.merge_adapters", folder, "--weights", "0.5", "--out", os.path.join(work, prompt))
call("sample", "--config", tiny, "--device", "cpu", "--from-file", os.path.join(work, "latin.txt"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_a_folder_whose_name_is_no_text_in_a_locale_that_is_ascii(tmp_path):
    work = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(work)
    photos = pictures(tmp_path / "photos", 2)
    shutil.copytree(photos, os.path.join(os.fsdecode(work), "photos"))
    with open(os.path.join(work, b"latin.txt"), "wb") as file:
        file.write(b"caf\xe9\n")
    words = [sys.executable, "-c", SCRIPT, TINY, photos, work, PROMPT.encode()]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT | LOCALE, capture_output=True, timeout=240)
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert "Traceback" not in text, text[-3000:]
    ends = [line for line in done.stdout.decode().splitlines() if " ended with " in line]
    names = ["main_dream_booth", "main_dream_booth", "sample", "scripts.convert", "scripts.merge_adapters", "sample"]
    assert ends == [f"{name} ended with {code}" for name, code in zip(names, (2, 0, 0, 2, 0, 2), strict=True)], text
    assert "photos' is not UTF-8, so the config of the run cannot be stored" in text
    assert "position adapters, which no LoRA file can hold" in text
    assert "latin.txt cannot be read" in text and "expected text, a prompt per line" in text
    with Image.open(os.path.join(os.fsdecode(work), "out", "samples", "00000.png")) as picture:
        assert picture.info["prompt"] == PROMPT and "caf\\udce9" in picture.info["adapter"]
    assert os.path.isdir(os.path.join(work, PROMPT.encode()))
