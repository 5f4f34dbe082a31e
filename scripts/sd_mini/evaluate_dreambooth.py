"""DreamBooth on SD-mini for many subjects: pictures before and after, and what CLIP says of them.

    python -m scripts.sd_mini.evaluate_dreambooth --subjects build/captioned/subjects/* --out docs/sd-mini

Each subject is a folder of pictures with `subject.json` (build_captioned_pictures.py writes them). Subjects
that were trained on in the same way under --logdir are not trained on again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli import (
    Parser,
    count,
    run_command,
    seed_number,
)
from ldm.config import find_file, load_config, plain
from ldm.data.dreambooth import PersonalizedBase
from ldm.evaluate.cached import cached, class_folder
from ldm.evaluate.figures import save_grid
from ldm.evaluate.metrics import clip_i, mean_and_error, pairwise_similarity
from ldm.evaluate.subjects import class_word_of
from ldm.generate import Settings, generate
from ldm.models.clip import CLIP
from ldm.train import dreambooth
from ldm.train.options import dreambooth_parser, parse
from ldm.util import load_model_from_config


def trained(subject: Path, word: str, options: argparse.Namespace) -> Path:
    """The folder of a subject's adapters, trained now unless a run with the same settings and config exists."""
    runs, config = options.logdir / f"{subject.name}-{options.seed}", plain(load_config(find_file(options.config)))
    drawing = {"number": options.class_pictures, "seed": options.seed}
    drawing |= {section: config.get(section) for section in ("checkpoint", "dreambooth")}
    classes = class_folder(options.logdir, word, drawing)
    settings = {"steps": options.steps, "batch_size": options.batch_size, "class": drawing, "config": config}
    made = cached(runs / "trained.json", settings, partial(train, subject, word, runs, classes, options))
    return runs / made["adapters"]


def train(subject: Path, word: str, runs: Path, classes: Path, options: argparse.Namespace) -> dict[str, str]:
    """Train on one subject with class pictures of the base; where its adapters are below `runs`."""
    template = "an emoji of a {}"
    words = [
        "--base", options.config, "-t", "--no-test", "-n", f"evaluate-{subject.name}", "-l", runs,
        "--class_word", word, "--data_root", subject, "--reg_data_root", classes,
        "--num_class_images", options.class_pictures, "--max_steps", options.steps, "--seed", options.seed,
        *(f"data.params.{part}.params.templates={template}" for part in ("train", "reg", "validation")),
        "data.params.train.params.flip_p=0.0", f"data.params.batch_size={options.batch_size}",
        "lightning.callbacks.image_logger.params.disabled=true",
    ]  # fmt: skip
    chosen, trainer_options, overrides = parse(dreambooth_parser(""), [str(word) for word in words])
    run = dreambooth.plan(chosen, trainer_options, overrides)
    dreambooth.train(run, chosen)
    return {"adapters": str((run.checkpoints / f"{options.steps}-adapters").relative_to(runs))}


def measure(subject: Path, options: argparse.Namespace, clip: CLIP) -> tuple[dict[str, float], Tensor]:
    """CLIP-I to the subject and among class samples, with and without what was trained, and rows of pictures.

    The rows [rows * samples, 3, 64, 64] in 0 .. 1: the subject; samples of it before and after; of its class likewise.
    """
    word = class_word_of(subject)
    pictures = PersonalizedBase(subject, size=64, set="val", class_word=word, repeats=1)
    photos = torch.stack([item["image"] for item in pictures]).movedim(-1, 1)
    adapters = trained(subject, word, options)
    model = load_model_from_config(load_config("configs/sd-mini/inference.yaml"))
    settings, seeds = Settings(steps=25, scale=options.scale), list(range(options.samples))

    def draw(prompt: str) -> Tensor:
        return generate(model, [prompt] * len(seeds), seeds, settings)

    named, of_class = f"an emoji of a sks {word}", f"an emoji of a {word}"
    before, base = draw(named), draw(of_class)
    model.model.diffusion_model.load_adapter_from_dir(adapters)
    after, prior = draw(named), draw(of_class)
    model.model.diffusion_model.adapters_enable(False)

    target = clip.embed_pictures(photos)
    seen = {"base": base, "before": before, "after": after, "prior": prior}
    seen = {name: clip.embed_pictures(2 * made - 1) for name, made in seen.items()}
    figures = {name: clip_i(vectors, target).mean().item() for name, vectors in seen.items()}
    figures |= {f"among {name}": pairwise_similarity(seen[name]).item() for name in ("base", "prior")}
    figures["same when off"] = torch.equal(draw(of_class), base)
    shown = ((photos + 1) / 2)[: options.samples].repeat(options.samples, 1, 1, 1)[: options.samples]
    return figures, torch.cat([shown, before, after, base, prior])


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--subjects", nargs="+", type=Path, required=True)
    p.add_argument("--config", default="configs/sd-mini/attn2o-ffni.yaml")
    p.add_argument("--clip", default="models/sd-mini/clip")
    p.add_argument("--out", type=Path, default=Path("docs/sd-mini"))
    p.add_argument("--logdir", type=Path, default=Path("logs/evaluate"))
    p.add_argument("--steps", type=count, default=300)
    p.add_argument("--batch_size", type=count, default=4)
    p.add_argument("--class_pictures", type=count, default=32)
    p.add_argument("--samples", type=count, default=8)
    p.add_argument("--scale", type=float, default=5.0)
    p.add_argument("--seed", type=seed_number, default=23, help="of training")
    return p


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    for subject in options.subjects:
        class_word_of(subject)  # reject folders that are not subjects before training starts
    clip = CLIP(options.clip).eval()
    gains, drifts = [], []
    for subject in options.subjects:
        seen, rows = measure(subject, options, clip)
        gains.append(seen["after"] - seen["base"])
        drifts.append(seen["among prior"] - seen["among base"])
        print(
            f"{subject.name}: CLIP-I to the subject {seen['base']:.3f} of class samples, {seen['before']:.3f}"
            f" before and {seen['after']:.3f} after training; among class samples {seen['among base']:.3f}, then "
            f"{seen['among prior']:.3f}; with the adapter off the base exactly: {seen['same when off']}",
            flush=True,
        )
        save_grid(rows, options.samples, options.out / f"dreambooth-{subject.name}.jpg")
    print("rise of CLIP-I: {:.3f} +- {:.3f}".format(*mean_and_error(torch.tensor(gains))))
    print("rise of pairwise CLIP-I of the class: {:.3f} +- {:.3f}".format(*mean_and_error(torch.tensor(drifts))))


if __name__ == "__main__":
    run_command(main)
