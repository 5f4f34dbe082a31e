"""Which GPU suffices: the peak memory of a training step by base, family and switches, as `ldm plan` predicts it.

    python benchmarks/hardware.py               # writes the tables of docs/hardware.md, in about half an hour

Nothing is loaded and no GPU is needed: the steps run on fake tensors. `benchmarks/gpu.py` compares them with a GPU.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from common import parser

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/hardware.md"
BEGIN, END = "<!-- from benchmarks/hardware.py: begin -->\n", "<!-- from benchmarks/hardware.py: end -->\n"
CARDS = (8, 12, 16, 24, 80)  # GB

BASES = {
    "SD v1, 512 px": (512, "configs/sd-inject-dreambooth", {
        "LoRA": "configs/lora/attention.yaml", "Custom Diffusion": "configs/custom-diffusion/finetune_addtoken.yaml",
        "textual inversion": "configs/textual-inversion/one-vector.yaml",
    }),
    "SD 2.x, 768 px": (768, "configs/sd2-inject-dreambooth", {}),
    "SDXL, 1024 px": (1024, "configs/sdxl-inject-dreambooth", {}),
}  # fmt: skip
FAMILIES = {
    "adapters `attn2o-ffni`": "attn2o-ffni", "LoRA": "lora-attention", "Custom Diffusion": "custom-diffusion",
    "textual inversion": "textual-inversion", "every weight": "attn2o-ffni",
}  # fmt: skip
HALF = "lightning.trainer.precision=bf16-mixed"
MODES = {"fp32": (False, False), "bf16": (True, False), "bf16, checkpointing": (True, True)}


def case(base: str, family: str, mode: str) -> tuple[int, float]:
    """Trainable weights, and GiB of a step with one picture of the subject and one of its class."""
    from ldm.config import load_config, unet_params
    from ldm.train.plan import GIB, footprint

    size, folder, own = BASES[base]
    path = ROOT / (own.get(family) or f"{folder}/{FAMILIES[family]}.yaml")
    half, checkpointing = MODES[mode]
    unet = unet_params(load_config(path))
    words = [f"{unet}.use_checkpoint={str(checkpointing).lower()}", "data.params.batch_size=1"]
    words += [f"data.params.{part}.params.size={size}" for part in ("train", "reg")]
    words += [HALF] if half else ["lightning.trainer.precision=32"]
    if family == "every weight":
        words += ["model.params.train_level=[unet]", f"{unet}.adapter_config=null"]
    found = footprint(load_config(path, words), {"cache": True, "base_precision": "bf16" if half else "fp32"})
    return found.parameters, found.peak / GIB


def tables(found: dict[tuple[str, str, str], tuple[int, float]]) -> str:
    from ldm.train.plan import OVERHEAD

    lines = ["| base | family | trainable | " + " | ".join(MODES) + " |", "| --- | --- | ---: " + "| ---: " * 3 + "|"]
    for base in BASES:
        for family in FAMILIES:
            peaks = [f"{found[base, family, mode][1]:.1f}" for mode in MODES]
            lines.append(f"| {base} | {family} | {found[base, family, 'fp32'][0]:,} | " + " | ".join(peaks) + " |")
    lines += ["", "| base | family | " + " | ".join(f"{card} GB" for card in CARDS) + " |"]
    lines += ["| --- | --- " + "| --- " * len(CARDS) + "|"]
    for base in BASES:
        for family in FAMILIES:
            fits = [[mode for mode in MODES if found[base, family, mode][1] + OVERHEAD <= card] for card in CARDS]
            lines.append(f"| {base} | {family} | " + " | ".join(modes[0] if modes else "no" for modes in fits) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    options = p.parse_args()
    cases = [(base, family, mode) for base in BASES for family in FAMILIES for mode in MODES]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = dict(zip(cases, pool.map(case, *zip(*cases, strict=True)), strict=True))
    text = options.page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    assert pattern.search(text), f"{options.page} has no place for the tables"
    options.page.write_text(pattern.sub(lambda _: BEGIN + "\n" + tables(found) + "\n" + END, text), encoding="utf-8")


if __name__ == "__main__":
    main()
