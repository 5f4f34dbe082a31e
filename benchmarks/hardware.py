"""Which memory a training needs: docs/hardware.md, by `ldm plan` for each base, resolution and family.

    python benchmarks/hardware.py

Nothing is trained and no weights are needed: one step of the real model runs on fake tensors. About five minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hardware.md"
CARDS = (8, 12, 16, 24, 80)  # GiB
CONTEXT = 0.6  # GiB that the driver takes
HALF = ["--base_precision", "bf16", "lightning.trainer.precision=bf16-mixed"]
AGAIN = ["model.params.unet_config.params.use_checkpoint=true"]
BATCH = "data.params.batch_size=1"
BASES = {
    "SD v1, 512": ("configs/sd-inject-dreambooth/{}.yaml", "configs/sd-dream.yaml"),
    "SD 2.x, 768": ("configs/sd2-inject-dreambooth/{}.yaml", None),
    "SDXL, 1024": ("configs/sdxl-inject-dreambooth/{}.yaml", None),
}
LORA = {"SD v1, 512": "configs/lora/attention.yaml"}  # others have it beside their routes
MEANS = {"fp32": [], "bf16": HALF, "bf16, `use_checkpoint: true`": [*HALF, *AGAIN]}


def plan(words: list[str]) -> float:
    """The predicted peak in GiB."""
    command = [sys.executable, "-m", "ldm", "plan", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PAGE.parent.parent)
    return json.loads(done.stdout.splitlines()[-1])["peak"] / 2**30


def cases() -> list[tuple[str, str, str, list[str]]]:
    """Base, what learns, means, arguments of `ldm plan`."""
    found = []
    for base, (config, whole) in BASES.items():
        for family in ("attn2o-ffni", "resi-reso", "lora-attention"):
            path = LORA.get(base, config).format(family) if family == "lora-attention" else config.format(family)
            found += [(base, f"`{family}`", name, ["--base", path, BATCH, *words]) for name, words in MEANS.items()]
        if whole is not None:
            means = {"fp32": [], "fp32, `use_checkpoint: true`": AGAIN}
            found += [(base, "full UNet", name, ["--base", whole, BATCH, *words]) for name, words in means.items()]
    return found


def page(found: list[tuple[str, str, str, float]]) -> str:
    """The page, from the GiB of each case without the driver's share."""
    lines = [
        "# What a training needs",
        "",
        "Predicted by `ldm plan` for one picture of the subject and one of its class in a step, pictures and captions",
        f"encoded beforehand (`--cache`), AdamW; with {CONTEXT} GiB for the driver. Predictions were within 2 to 8 %",
        "of six peaks measured on an H200 ([benchmarks](benchmarks.md)). `ldm plan` with your own options says it",
        "for them and names what helps if it does not fit; [presets](../configs/presets) fit a config to a card.",
        "",
        f"| base, pixels | what learns | precision | GiB | {' | '.join(f'{card} GB' for card in CARDS)} |",
        f"| --- | --- | --- | ---: |{' :---: |' * len(CARDS)}",
    ]
    for base, family, means, peak in found:
        fits = ["yes" if peak + CONTEXT <= card else "" for card in CARDS]
        lines.append(f"| {base} | {family} | {means} | {peak + CONTEXT:.1f} | {' | '.join(fits)} |")
    return "\n".join([*lines, "", "Made by `python benchmarks/hardware.py`.", ""])


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as workers:
        asked = cases()
        peaks = list(workers.map(lambda case: plan(case[3]), asked))
    PAGE.write_text(page([(*case[:3], peak) for case, peak in zip(asked, peaks, strict=True)]), encoding="utf-8")
