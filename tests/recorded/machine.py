"""What decides the bits of a recording: the processor's instructions and caches, the libraries, the threads."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import torch

MACHINE = Path(__file__).with_name("machine.json")
THREADS = 1
LIBRARIES = ("torch", "numpy", "pillow", "kornia", "peft", "pytorch-lightning", "safetensors", "transformers")
# Each of them makes a library choose other instructions.
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
VECTORS = re.compile(r"avx|amx|fma|f16c|sse4")


def this_machine() -> dict:
    """The description that two machines must share for the same bits. On Linux it knows the processor well."""
    cpu = Path("/proc/cpuinfo")
    lines = (line.split(":", 1) for line in (cpu.read_text().splitlines() if cpu.is_file() else []) if ":" in line)
    about: dict[str, str] = {}
    for key, value in lines:
        about.setdefault(key.strip(), value.strip())  # the first core speaks for all
    caches = [Path(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size") for i in (0, 2)]  # loops are cut by them
    return {
        "cpu": "/".join(about.get(key, "?") for key in ("vendor_id", "cpu family", "model")),
        "vector instructions": sorted(flag for flag in about.get("flags", "").split() if VECTORS.match(flag)),
        "caches": [path.read_text().strip() if path.is_file() else "?" for path in caches],
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "mkl": torch.backends.mkl.is_available(),
        "threads": torch.get_num_threads(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def differences(recorded: dict) -> list[str]:
    """Where this machine is another one than `recorded`; empty where bits can be compared."""
    here = this_machine()
    return [f"{key}: {here.get(key)}, recorded {value}" for key, value in recorded.items() if here.get(key) != value]


def summary() -> str:
    """A line that says how numbers are compared here."""
    if not (other := differences(json.loads(MACHINE.read_text()))):
        return "recorded numbers: compared bit for bit"
    return "recorded numbers: compared within tolerances, for the recording is of another machine: " + "; ".join(other)
