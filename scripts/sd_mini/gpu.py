"""Train SD-mini further on one GPU, out of one packed file of pictures, in calls of a few minutes.

    python -m scripts.sd_mini.pack_pictures --out build/packed.tar.gz
    python -m scripts.sd_mini.gpu --autoencoder_seconds 60 --seconds 300 --out build/gpu

Pictures are composed, encoded and drawn on the device. `--autoencoder_seconds` of training of the autoencoder come
first, in the first call only; then the UNet learns from the weights of `--ckpt` or, in a later call, from where the
state in `--out` ends. Writes `model.safetensors` as `models/sd-mini` has it (half precision, averaged UNet),
`report.json` (losses and PSNR on held-out pictures before and after, speed) and grids of pictures of forty prompts.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import save_safetensors
from ldm.cli import COMPILE_MODES, Parser, count, run_command
from ldm.config import load_config
from ldm.data.captioned import CaptionedPictures
from ldm.devices import best_device
from ldm.evaluate.figures import save_grid
from ldm.evaluate.metrics import psnr
from ldm.models.bases import FIRST_STAGE, TEXT, UNET
from ldm.muon import Muon
from ldm.util import load_model_from_config
from scripts.sd_mini import evaluate
from scripts.sd_mini.on_device.clock import Clock
from scripts.sd_mini.on_device.draws import encode_draws
from scripts.sd_mini.on_device.state import load_state, save_state
from scripts.sd_mini.on_device.training import Averages, held_out_loss, train_autoencoder, train_unet
from scripts.sd_mini.pack import half
from scripts.sd_mini.pack_pictures import HELD_OUT

log = logging.getLogger("gpu")

FIRST_DRAW = 1_000_000  # none of the draws that earlier trainings saw


@torch.no_grad()
def reconstruction(model: Any, held_out: CaptionedPictures, rows: list[int]) -> float:
    """Mean PSNR in dB of pictures on white that go through the autoencoder."""
    ratios = []
    for part in torch.tensor(rows).split(100):
        x = held_out.shown(part).movedim(-1, 1).contiguous()
        rebuilt = model.first_stage_model.decode(model.first_stage_model.encode(x).mode()).clamp(-1, 1)
        ratios.append(psnr((rebuilt + 1) / 2, (x + 1) / 2))
    return torch.cat(ratios).mean().item()


def measure(model: Any, held_out: CaptionedPictures, options: Any) -> dict[str, float]:
    """Measure the model on held-out pictures."""
    kinds = {
        kind: [i for i, r in enumerate(held_out.records) if r["kind"] == kind][: options.held_out]
        for kind in ("drawing", "photo")
    }
    draws = encode_draws(held_out, model, 0, options.held_out)
    return {
        **{f"psnr_{kind}": reconstruction(model, held_out, rows) for kind, rows in kinds.items() if rows},
        "loss": held_out_loss(model, draws, options.batch_size),
    }


def grids(model: Any, options: Any) -> None:
    """Pictures of the forty prompts chosen beforehand and of the forty that it knew, as docs/sd-mini.md shows them."""
    for name, prompts, seed in (("prompts", evaluate.PROMPTS, 0), ("known", evaluate.KNOWN, evaluate.KNOWN_SEED)):
        pictures = evaluate.sampled(model, prompts, options, options.scale, seed)
        save_grid(pictures, 10, options.out / f"{name}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="build/packed.tar.gz", help="the packed pictures")
    parser.add_argument("--config", default="configs/sd-mini/inference.yaml")
    parser.add_argument("--ckpt", help="weights to begin with; by default those that the config names")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--autoencoder_seconds", type=float, default=0.0, help="0: leave the autoencoder as it is")
    parser.add_argument("--seconds", type=float, default=480.0, help="for the UNet")
    parser.add_argument("--decay", type=float, default=0.3, help="last share of the time, in which the rate falls to 0")
    parser.add_argument("--draws", type=count, default=300_000, help="pictures that are drawn and encoded beforehand")
    parser.add_argument("--held_out", type=count, default=1000, help="held-out draws of each measurement")
    parser.add_argument("--batch_size", type=count, default=512)
    parser.add_argument("--autoencoder_batch_size", type=count, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of the UNet (Muon)")
    parser.add_argument("--autoencoder_rate", type=float, default=1e-3)
    parser.add_argument("--compile", choices=COMPILE_MODES, help="compile the UNet")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=5.0, help="guidance of the grids")
    parser.add_argument("--steps", type=count, default=100, help="steps of DDIM for the grids")
    parser.add_argument("--eta", type=float, default=1.0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    began, device = time.monotonic(), best_device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")

    def elapsed() -> float:
        return round(time.monotonic() - began, 1)

    config = load_config(options.config)
    config.model.params.min_snr_gamma = 5.0
    packed = options.out / "model.safetensors"  # of the call before, which may have trained the autoencoder
    model = load_model_from_config(config, packed if packed.is_file() else options.ckpt).to(device)
    pictures = CaptionedPictures(options.data, split="train", seed=options.seed).to(device)
    held_out = CaptionedPictures(options.data, split=HELD_OUT).to(device)
    report: dict[str, Any] = {"read_seconds": elapsed(), "pictures": len(pictures.records)}
    report["before"] = measure(model, held_out, options)
    log.info("%.1f s: %d pictures are read; before: %s", elapsed(), len(pictures.records), report["before"])

    unet = model.model.diffusion_model.requires_grad_(True)
    optimizer = Muon(unet.parameters(), lr=options.rate, fused=device.type == "cuda")
    averages = Averages(list(unet.parameters()))
    done = load_state(options.out, optimizer, averages)
    if options.autoencoder_seconds and not done:
        model.first_stage_model.requires_grad_(True)
        clock = Clock(options.autoencoder_seconds, decay=0.5, warm_up=100)
        report["autoencoder_steps"] = train_autoencoder(
            model.first_stage_model,
            pictures,
            clock,
            options.autoencoder_batch_size,
            options.autoencoder_rate,
            FIRST_DRAW,
        )
        log.info("%.1f s: %d steps of the autoencoder", elapsed(), report["autoencoder_steps"])
    model.first_stage_model.requires_grad_(False)
    draws = encode_draws(pictures, model, FIRST_DRAW + done * options.batch_size, options.draws)
    report["scale_factor_now"] = float(model.scale_factor / draws.means.float().std())
    log.info("%.1f s: %d draws with %d captions are encoded; 1 / std would be %.4f",
             elapsed(), len(draws), len(draws.contexts), report["scale_factor_now"])  # fmt: skip

    clock, here = Clock(options.seconds, options.decay, warm_up=100), time.monotonic()
    steps = train_unet(
        model,
        draws,
        clock,
        options.batch_size,
        optimizer,
        averages,
        options.rate,
        compile_mode=options.compile,
        before_decay=lambda step: save_state(options.out, optimizer, averages, done + step),
    )
    if options.decay == 0:
        save_state(options.out, optimizer, averages, done + steps)
    seconds = time.monotonic() - here
    report |= {"steps": steps, "steps_before": done, "steps_per_second": steps / seconds}
    report["pictures_per_second"] = report["steps_per_second"] * options.batch_size
    averages.swap()
    report["after"] = measure(model, held_out, options)
    log.info("%.1f s: %d steps of the UNet, %.1f a second; after: %s",
             elapsed(), steps, report["steps_per_second"], report["after"])  # fmt: skip
    save_weights(model, packed)
    print(packed)
    grids(model, options)
    report["all_seconds"] = elapsed()
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def save_weights(model: Any, path: Path) -> None:
    """Write the file that is shipped: all trained weights in half precision, without buffers that a config computes."""
    learnt = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
        and name.startswith((UNET, FIRST_STAGE, TEXT))
        and not name.startswith(FIRST_STAGE + "loss.")
    }
    save_safetensors(path, half(learnt))


if __name__ == "__main__":
    run_command(main)
