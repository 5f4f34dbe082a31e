"""Train an adapter on a few pictures, sample with it, show before and after.

    ldm demo
    ldm demo --data_root photos --class_word dog --max_steps 400

Prints three commands and runs them: `ldm train`, which is given all other options and overrides, `ldm sample`, and
`ldm before-after`. SD-mini and its subjects come with the package; nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from ldm.cli import Parser, keep_rest

SUBJECT = "examples/subjects/noto_woman"


def add_arguments(p: Parser) -> None:
    p.allow_abbrev, p.rest = False, keep_rest
    p.usage = "%(prog)s [options] [options of ldm train] [a.b.c=value ...]"
    p.add_argument("--base", default="configs/sd-mini/attn2o-ffni.yaml", metavar="YAML", help="(default %(default)s)")
    p.add_argument("--data_root", default=SUBJECT, metavar="DIR", help=f"pictures of a subject (default {SUBJECT})")
    p.add_argument("--class_word", default="woman", help="what the subject is (default woman)")
    p.add_argument("--logdir", default="logs", help="(default logs)")
    p.add_argument("--outdir", type=Path, default=Path("outputs/demo"), help="(default outputs/demo)")


def run(options: argparse.Namespace) -> int:
    from ldm.config import find_file

    word, subject, model = options.class_word, find_file(options.data_root), "configs/sd-mini/inference.yaml"
    code = ldm(
        "train", "--base", options.base, "-t", "-n", "demo", "--class_word", word, "--data_root", subject,
        "--reg_data_root", options.outdir / word, "--num_class_images", 16, "--logdir", options.logdir, *options.rest,
    )  # fmt: skip
    if code:
        return code
    newest = max(Path(options.logdir).glob("*_demo"), key=os.path.getmtime)
    adapters = max((newest / "checkpoints").glob("*-adapters"), key=lambda path: int(path.name.partition("-")[0]))
    return ldm(
        "sample", "--config", model, "--adapter_path", adapters, "--outdir", options.outdir,
        "--prompt", f"an emoji of a sks {word}", "--n_samples", 4, "--n_iter", 1, "--ddim_steps", 25, "--scale", 5,
    ) or ldm(
        "before-after", "--config", model, "--adapter_path", adapters, "--data_root", subject, "--class_word", word,
        "--template", "an emoji of a {}", "--out", options.outdir / "before-after.png",
    )  # fmt: skip


def ldm(*words: object) -> int:
    """Say a command and run it in a process of its own, since training may start several; its exit code."""
    spoken = [str(word) for word in words]
    print("$ ldm", shlex.join(spoken), flush=True)
    return subprocess.run([sys.executable, "-m", "ldm", *spoken]).returncode
