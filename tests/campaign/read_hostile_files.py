"""Reads every hostile file and prints, as JSON, what came of it, how long it took and how far memory grew.

    python -m tests.campaign.read_hostile_files /tmp/hostile --seed 0
"""

import argparse
import json
import resource
import sys
import time
import traceback
from pathlib import Path

import torch

from ldm.checkpoints import read_object
from ldm.config import load_config
from ldm.data.pictures import read_picture
from ldm.errors import InputError
from ldm.files import read_json
from ldm.interchange.inspection import describe
from ldm.modules.encoders.claims import read_clip
from ldm.tuning import files
from tests import tuned_models
from tests.campaign.fuzz_torch_files import walk
from tests.campaign.hostile_files import generate

READERS = {
    "object": lambda path: walk(read_object(path)),
    "folder": lambda path: files.load(tuned_models.model(), path),
    "describe": describe,
    "yaml": load_config,
    "json": read_json,
    "picture": read_picture,
    "clip": read_clip,
}


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(folder: Path, seed: int, only: str = "") -> None:
    torch.set_num_threads(1)
    cases = generate(folder, seed)
    tuned_models.model()
    for case in cases:
        if only not in case.path.name:
            continue
        before, began = peak(), time.process_time()
        try:
            READERS[case.kind](case.path)
            said = None
        except InputError as error:
            said = str(error)
        except BaseException:
            said = traceback.format_exc()
        took = time.process_time() - began
        told = {"name": case.path.name, "kind": case.kind, "expected": case.expectation, "said": said}
        print(json.dumps(told | {"seconds": took, "grown": peak() - before}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names to read")
    options = parser.parse_args()
    main(options.folder, options.seed, options.only)
