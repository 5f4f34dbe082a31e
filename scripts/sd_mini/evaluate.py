"""Every figure and picture of docs/sd-mini.md.

    python -m scripts.sd_mini.evaluate autoencoder --out docs/sd-mini
    python -m scripts.sd_mini.evaluate clip
    python -m scripts.sd_mini.evaluate base --out docs/sd-mini

Needs build/captioned/captioned.tar.gz (scripts/sd_mini/build_captioned_pictures.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.cli import (
    Parser,
    run_command,
)
from ldm.config import load_config
from ldm.data.captioned import CaptionedPictures
from ldm.evaluate.figures import save_grid
from ldm.evaluate.metrics import clip_t, mean_and_error, pairwise_similarity, psnr, retrieval
from ldm.generate import Settings, generate
from ldm.models.clip import CLIP
from ldm.util import load_model_from_config

STYLES = ("noto", "twemoji", "fluent", "flat", "modern", "openmoji")
PHOTOS = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DRAWN = (
    "a grinning face", "a cat face", "a red heart", "a red apple", "a rocket",
    "a dog face", "a pizza", "a tree", "a sun", "a robot",
    "a panda", "a banana", "a house", "a crescent moon", "a fish",
    "a woman shrugging", "a birthday cake", "a soccer ball", "a green book", "a snowman",
    "the flag of japan", "a monkey face", "a cloud", "a guitar", "a crying face",
    "a tiger face", "a clock showing three o'clock", "a sunflower", "a bus", "a ghost",
)  # fmt: skip
PROMPTS = [f"an emoji of {thing}, {STYLES[i % len(STYLES)]} style" for i, thing in enumerate(DRAWN)]
PROMPTS += [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in PHOTOS]
KNOWN_DRAWN = (
    "a crying face, twemoji", "a kissing face, fluent", "a frowning face, flat", "a face with medical mask, modern",
    "a fearful face, fluent", "a neutral face, flat", "a red heart, modern", "a green heart, noto",
    "an orange heart, fluent", "a black heart, modern", "a blue circle, flat", "a yellow circle, openmoji",
    "a blue square, noto", "an orange square, twemoji", "a full moon, modern", "a cross mark, twemoji", "a panda, noto",
    "a tiger face, twemoji", "a monkey face, fluent", "an old man, fluent", "a pouting face, twemoji", "a koala, flat",
    "a fox, modern", "a hamster, noto", "a boy, noto", "a man with a beard, modern", "a police officer, twemoji",
    "a woman with dark skin, fluent", "a purple square, fluent", "a clock showing nine o'clock, noto",
    "a green apple, noto", "a yellow heart, flat", "a house, twemoji", "the flag of sweden, fluent",
    "a car, modern",
)  # fmt: skip
KNOWN_PHOTOS = ("an airplane", "a car", "a horse", "a ship", "a truck")
KNOWN = [f"an emoji of {thing} style" for thing in KNOWN_DRAWN] + [f"a photo of {thing}" for thing in KNOWN_PHOTOS]
KNOWN_SEED = 1000  # none of the seeds from which the prompts were chosen
SCALES = (1.0, 3.0, 5.0, 7.5)
SCALE_PROMPTS = (
    "an emoji of a cat face, noto style", "an emoji of a red apple, fluent style",
    "an emoji of a rocket, twemoji style", "a photo of a horse", "a photo of a ship",
)  # fmt: skip
NEW = (
    "an emoji of a blue cat", "an emoji of an angry robot", "an emoji of a green heart, fluent style",
    "an emoji of a purple apple", "an emoji of a cat with sunglasses", "a photo of a red car",
    "an emoji of a penguin on a red background", "an emoji of a sad pizza",
)  # fmt: skip


def drawings(pictures: CaptionedPictures, count: int) -> list[int]:
    """Rows of `count` drawings of different things, from all styles in turn."""
    styles = {style: [i for i, r in enumerate(pictures.records) if r["style"] == style] for style in STYLES}
    rows, seen = [], set()
    for turn in range(len(pictures.records)):
        row = next((i for i in styles[STYLES[turn % len(STYLES)]] if pictures.records[i]["name"] not in seen), None)
        if row is not None:
            seen.add(pictures.records[row]["name"])
            rows.append(row)
        if len(rows) == count:
            break
    return rows


def photos(pictures: CaptionedPictures, count: int) -> list[int]:
    """Rows of `count` photographs, all classes alike."""
    of = {name: [i for i, r in enumerate(pictures.records) if r["name"] == name] for name in PHOTOS}
    return [of[PHOTOS[i % len(PHOTOS)]][i // len(PHOTOS)] for i in range(count)]


def shown(pictures: CaptionedPictures, rows: list[int]) -> Tensor:
    """Pictures [b, 3, h, w] in -1 .. 1 on white."""
    return pictures.shown(rows).movedim(-1, 1).contiguous()


@torch.inference_mode()
def evaluate_autoencoder(options: Any, model: Any, held_out: CaptionedPictures) -> None:
    """Reconstructions of 64 held-out pictures beside the originals, and PSNR over many more."""
    first_stage = model.first_stage_model

    def rebuilt(x: Tensor) -> Tensor:
        return first_stage.decode(first_stage.encode(x).mode()).clamp(-1, 1)

    kinds = {"drawings": [i for i, r in enumerate(held_out.records) if r["kind"] == "drawing"],
             "photographs": photos(held_out, 200)}  # fmt: skip
    for kind, rows in kinds.items():
        x = shown(held_out, rows)
        ratios = torch.cat([psnr((rebuilt(part) + 1) / 2, (part + 1) / 2) for part in x.split(50)])
        print(f"PSNR of {len(rows)} held-out {kind}: mean {ratios.mean():.2f} dB, worst {ratios.min():.2f} dB")
    x = shown(held_out, drawings(held_out, 40) + photos(held_out, 24))
    pairs = torch.stack([x, rebuilt(x)], dim=1).flatten(0, 1)
    save_grid((pairs + 1) / 2, 16, options.out / "reconstructions.jpg")


def evaluate_clip(options: Any, clip: CLIP) -> None:
    """How often the right one of 64 captions, or of 64 drawings, is the nearest."""
    for split, what in (("val_known", "known in another style"), ("val_unseen", "never seen")):
        held_out = CaptionedPictures(options.data, split=split)
        rows = drawings(held_out, 64)
        images = clip.embed_pictures(shown(held_out, rows))
        texts = clip.embed_captions([held_out.captions[row][0] for row in rows])
        top = {k: retrieval(images, texts, k) for k in (1, 5)}
        print(f"{len(rows)} drawings of things {what}: caption top-1 {top[1]:.2f}, top-5 {top[5]:.2f}; "
              f"drawing top-1 {retrieval(texts, images):.2f}; chance {1 / len(rows):.3f}")  # fmt: skip


def sampled(model: Any, prompts: list[str], options: Any, scale: float, first_seed: int = 0) -> Tensor:
    settings = Settings(steps=options.steps, eta=options.eta, scale=scale)
    seeds = list(range(first_seed, first_seed + len(prompts)))
    return torch.cat([generate(model, prompts[i : i + 40], seeds[i : i + 40], settings)
                      for i in range(0, len(prompts), 40)])  # fmt: skip


def evaluate_base(options: Any, model: Any, clip: CLIP, held_out: CaptionedPictures) -> None:
    """Grids of prompts, of guidance scales and of new combinations; CLIP-T against that of real pictures."""
    save_grid(sampled(model, PROMPTS, options, options.scale), 10, options.out / "prompts.jpg")
    save_grid(sampled(model, KNOWN, options, options.scale, KNOWN_SEED), 10, options.out / "known.jpg")
    by_scale = [sampled(model, [p for p in SCALE_PROMPTS for _ in range(2)], options, s) for s in SCALES]
    save_grid(torch.cat(by_scale), 2 * len(SCALE_PROMPTS), options.out / "guidance.jpg")
    new = sampled(model, [p for p in NEW for _ in range(4)], options, options.scale)
    save_grid(new, 16, options.out / "new.jpg")

    real_rows = drawings(held_out, 60) + photos(held_out, 40)
    captions = [held_out.captions[row][0] for row in real_rows]
    texts = clip.embed_captions(captions)
    real = clip_t(clip.embed_pictures(shown(held_out, real_rows)), texts)
    print("CLIP-T of {} real pictures: {:.3f} +- {:.3f}".format(len(real), *mean_and_error(real)))
    for scale in SCALES:
        pictures = sampled(model, captions, options, scale)
        made = clip_t(clip.embed_pictures(2 * pictures - 1), texts)
        mean, error = mean_and_error(made)
        print(f"CLIP-T of generated pictures at scale {scale}: {mean:.3f} +- {error:.3f}, "
              f"{mean / real.mean().item():.0%} of real ones")  # fmt: skip
    cats = clip.embed_pictures(2 * sampled(model, ["an emoji of a cat"] * 16, options, options.scale) - 1)
    print(f"mean pairwise CLIP-I of 16 pictures of 'an emoji of a cat': {pairwise_similarity(cats):.3f}")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=("autoencoder", "clip", "base"))
    parser.add_argument("--data", default="build/captioned/captioned.tar.gz")
    parser.add_argument("--config", default="configs/sd-mini/inference.yaml")
    parser.add_argument("--ckpt", help="by default the one that the config names")
    parser.add_argument("--clip", default="models/sd-mini/clip")
    parser.add_argument("--out", type=Path, default=Path("docs/sd-mini"))
    parser.add_argument("--scale", type=float, default=5.0, help="guidance of the grids")
    parser.add_argument("--steps", type=int, default=100, help="steps of DDIM")
    parser.add_argument("--eta", type=float, default=1.0, help="DDIM's noise: with it later steps mend earlier ones")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    model = load_model_from_config(load_config(options.config), options.ckpt)
    clip = CLIP(options.clip).eval()
    held_out = CaptionedPictures(options.data, split=("val_known", "val_unseen"))
    if "autoencoder" in options.parts:
        evaluate_autoencoder(options, model, held_out)
    if "clip" in options.parts:
        evaluate_clip(options, clip)
    if "base" in options.parts:
        evaluate_base(options, model, clip, CaptionedPictures(options.data, split="val_known"))


if __name__ == "__main__":
    run_command(main)
