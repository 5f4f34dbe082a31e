"""Families of tuning compared on SD-mini: cost, similarity to the subject, drift of its class.

    python -m scripts.sd_mini.compare_families --subjects build/captioned/subjects/* --table docs/families.md

Same photographs, class pictures, steps and seeds for all, each family as its config in configs/sd-mini has it. Each
subject is a folder of pictures with `subject.json` (build_captioned_pictures.py writes them). Results are kept
under --logdir, so that the command goes on where it was interrupted; the table takes its place in --table.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.checkpoints import atomic_write
from ldm.cli import (
    Parser,
    count,
    run_command,
    seed_number,
)
from ldm.config import load_config, plain
from ldm.data.pictures import find_pictures, read_picture, to_tensor
from ldm.errors import InputError
from ldm.evaluate.cached import cached, class_folder
from ldm.evaluate.metrics import clip_i, clip_t, cosines, mean_and_error
from ldm.evaluate.subjects import class_word_of
from ldm.files import read_text
from ldm.generate import Settings, generate
from ldm.interchange import load_any
from ldm.models.clip import CLIP
from ldm.train import dreambooth
from ldm.train.callbacks import EpochReport
from ldm.train.options import dreambooth_parser, parse
from ldm.util import load_model_from_config

PART = ["model.params.train_level=[]", "model.params.unet_config.params.adapter_config=null"]
# name: (config, overrides, the word that stands for the subject)
FAMILIES = {
    "position adapters attn2o-ffni": ("attn2o-ffni", [], "sks"),
    "LoRA": ("lora-attention", [], "sks"),
    "LoRA, text encoder too": ("lora-attention-text", [], "sks"),
    "LoRA, convolutions too": ("lora-convolution", [], "sks"),
    "DoRA": ("lora-dora", [], "sks"),
    "LoHa": ("lora-loha", [], "sks"),
    "LoKr": ("lora-lokr", [], "sks"),
    "OFT": ("lora-oft", [], "sks"),
    "BOFT": ("lora-boft", [], "sks"),
    "Custom Diffusion": ("custom-diffusion-addtoken", [], "<new1>"),
    "textual inversion": ("textual-inversion-one-vector", [], "<sks>"),
    "pivotal tuning": ("textual-inversion-pivotal", [], "<sks>"),
    "biases": ("dreambooth", [*PART, "model.params.tuning={target: ldm.tuning.biases.Biases}"], "sks"),
    "norms": ("dreambooth", [*PART, "model.params.tuning={target: ldm.tuning.norms.Norms}"], "sks"),
    "full UNet": ("dreambooth", [*PART, "model.params.train_level=[unet]", "model.base_learning_rate=1e-4"], "sks"),
}
TEMPLATE = "an emoji of a {}"  # as in configs/sd-mini/dreambooth.yaml
COLUMNS = ("weights that learn", "file, kB", "ms per step", "CLIP-I", "CLIP-T", "drift of the class")


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--subjects", nargs="+", type=Path, required=True)
    p.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    p.add_argument("--steps", type=count, default=400)
    p.add_argument("--class_pictures", type=count, default=32)
    p.add_argument("--samples", type=count, default=8, help="pictures for each prompt")
    p.add_argument("--model", default="configs/sd-mini/inference.yaml", help="the base model, for sampling")
    p.add_argument("--clip", default="models/sd-mini/clip", help="what measures CLIP-I and CLIP-T")
    p.add_argument("--overlay", nargs="*", default=[], metavar="YAML", help="configs on top of those of the families")
    p.add_argument("--logdir", type=Path, default=Path("logs/families"))
    p.add_argument("--table", type=Path, default=Path("docs/families.md"))
    p.add_argument("--seed", type=seed_number, default=23)
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if unknown := set(options.families) - FAMILIES.keys():
        raise InputError(f"--families: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(FAMILIES)}")
    for subject in options.subjects:
        class_word_of(subject)  # reject folders that are not subjects before training starts
    clip, results = CLIP(options.clip).eval(), {}
    settings = {name: getattr(options, name) for name in ("steps", "class_pictures", "samples", "overlay", "seed")}
    for subject in options.subjects:
        for family in options.families:
            file = options.logdir / "results" / f"{subject.name} {family}.json"
            result = cached(file, settings, partial(measure, family, subject, clip, options))
            results.setdefault(family, []).append(result)
            print(f"{subject.name}, {family}: {result}", flush=True)
    write_table(options.table, table(results, options))
    print(f"{options.table}: {len(results)} families, {len(options.subjects)} subjects")


def measure(family: str, subject: Path, clip: CLIP, options: argparse.Namespace) -> dict[str, float]:
    """Train one family on one subject and measure it."""
    config, overrides, word = FAMILIES[family]
    kind = class_word_of(subject)
    made_with = {name: getattr(options, name) for name in ("class_pictures", "overlay", "seed")}
    told = load_config(f"configs/sd-mini/{config}.yaml")  # captions and guidance of class pictures are the family's own
    made_with |= {"dreambooth": plain(told.get("dreambooth")), "concepts": dreambooth.has_concepts(told)}
    classes = class_folder(options.logdir, kind, made_with)
    name, learns_words = family.replace(",", "").replace(" ", "-"), word != "sks"
    arguments = [
        "--base", f"configs/sd-mini/{config}.yaml", *options.overlay, "-t", "-n", name, "-l", options.logdir,
        "--class_word", kind, "--data_root", subject, "--reg_data_root", classes,
        "--num_class_images", options.class_pictures, *(["--init_word", kind] if learns_words else []),
        "--max_steps", options.steps, "--seed", options.seed, "--no-test", "true",
        "--limit_val_batches", 0, "lightning.callbacks.image_logger.params.disabled=true", *overrides,
    ]  # fmt: skip
    chosen, trainer_options, changes = parse(dreambooth_parser(""), [str(argument) for argument in arguments])
    run = dreambooth.plan(chosen, trainer_options, changes)
    stretch_stages(run.config, options.steps / told.lightning.trainer.max_steps)
    trainer = dreambooth.train(run, chosen)
    (report,) = (callback for callback in trainer.callbacks if isinstance(callback, EpochReport))
    folder = run.checkpoints / f"{options.steps}-adapters"

    model, settings = load_model_from_config(load_config(options.model)), Settings(steps=25, scale=5.0)

    def draw(named: str) -> Tensor:
        prompts, seeds = [TEMPLATE.format(named)] * options.samples, list(range(options.samples))
        return clip.embed_pictures(2 * generate(model, prompts, seeds, settings) - 1)

    size = model.image_size * model.first_stage_model.downsampling_factor
    photos = clip.embed_pictures(torch.stack([to_tensor(read_picture(path), size) for path in find_pictures(subject)]))
    base = draw(kind)
    load_any(model, folder)
    tuned, prior = draw(f"{word} {kind}"), draw(kind)
    caption = clip.embed_captions([TEMPLATE.format(kind)]).expand(options.samples, -1)
    return {
        "weights that learn": sum(value.numel() for value in trainer.lightning_module.trainable_parameters().values()),
        "file, kB": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1000,
        "ms per step": 1000 * report.seconds / report.steps,
        "CLIP-I": clip_i(tuned, photos).mean().item(),
        "CLIP-T": clip_t(tuned, caption).mean().item(),
        "drift of the class": (1 - cosines(prior, base).diagonal()).mean().item(),
        "CLIP-I before": clip_i(base, photos).mean().item(),
        "CLIP-T before": clip_t(base, caption).mean().item(),
    }


def stretch_stages(config: DictConfig, factor: float) -> None:
    """Scale the stages of tuning to the length of the run, so that each keeps its share."""
    for family in config.model.params.get("tuning") or []:
        if "steps" in family:
            family.steps = [None if step is None else round(step * factor) for step in family.steps]


def table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """The results as Markdown: means over the subjects, with standard errors where pictures are measured."""
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]

    def measured(rows: list[dict[str, float]], column: str) -> str:
        mean, error = mean_and_error(torch.tensor([row[column] for row in rows]))
        return f"{round(mean, 3) + 0.0:.3f} ± {error:.3f}"  # + 0.0: no -0.000

    first = next(iter(results.values()))
    before = [measured(first, column) for column in ("CLIP-I before", "CLIP-T before")]
    lines.append("| " + " | ".join(["none: the base's pictures of the class", "0", "", "", *before, "0"]) + " |")
    for family, rows in results.items():
        means = [sum(row[column] for row in rows) / len(rows) for column in COLUMNS[:2]]
        fastest = min(row[COLUMNS[2]] for row in rows)  # the minimum of all runs is least disturbed by other programs
        cells = [f"{means[0]:,.0f}", f"{means[1]:,.0f}", f"{fastest:,.0f}"]
        lines.append("| " + " | ".join([family, *cells, *(measured(rows, column) for column in COLUMNS[3:])]) + " |")
    told = f"{len(options.subjects)} subjects, {options.steps} steps, {options.class_pictures} class pictures, "
    return "\n".join([*lines, "", f"{told}{options.samples} samples of each prompt, seed {options.seed}."])


def write_table(path: Path, text: str) -> None:
    """Put the table between its two marks in a page; a page without them, or none, becomes the table alone."""
    begin, end = "<!-- table: scripts/sd_mini/compare_families.py -->", "<!-- end of table -->"
    page = read_text(path) if path.is_file() else ""
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2] if found else ""
    with atomic_write(path) as beside:
        beside.write_text(f"{before if found else ''}{begin}\n\n{text}\n\n{end}{after or chr(10)}")


if __name__ == "__main__":
    run_command(main)
