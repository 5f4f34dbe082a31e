"""DreamBooth on SD-mini for many subjects: pictures before and after, and what CLIP says of them.

    python scripts/evaluate_dreambooth.py --subjects build/captioned/subjects/* --out docs/sd-mini

Each subject is a folder of pictures with `subject.json` (scripts/build_captioned_pictures.py writes them). Subjects
that were trained on under --logdir for as many steps are not trained on again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main_dream_booth  # noqa: E402
from ldm.data.dreambooth import PersonalizedBase  # noqa: E402
from ldm.evaluate.figures import save_grid  # noqa: E402
from ldm.evaluate.metrics import mean_and_error, pairwise_similarity, similarity_to  # noqa: E402
from ldm.generate import Settings, generate  # noqa: E402
from ldm.models.clip import CLIP  # noqa: E402
from ldm.util import load_config, load_model_from_config, run_command  # noqa: E402


def train(subject: Path, word: str, options: argparse.Namespace) -> Path:
    """Train on one subject with class pictures of the base; the folder of its adapters."""
    name, runs = f"evaluate-{subject.name}", options.logdir / subject.name
    adapters = f"*/checkpoints/{options.steps}-adapters"
    if not any(runs.glob(adapters)):
        template = "an emoji of a {}"
        main_dream_booth.main([
            "--base", options.config, "-t", "--no-test", "-n", name, "-l", str(runs), "--class_word", word,
            "--data_root", str(subject), "--reg_data_root", str(options.logdir / "classes" / word),
            "--num_class_images", str(options.class_pictures), "--max_steps", str(options.steps),
            *(f"data.params.{part}.params.templates={template}" for part in ("train", "reg", "validation")),
            "data.params.train.params.flip_p=0.0", f"data.params.batch_size={options.batch_size}",
            "lightning.callbacks.image_logger.params.disabled=true",
        ])  # fmt: skip
    return next(runs.glob(adapters))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", type=Path, required=True)
    parser.add_argument("--config", default="configs/sd-mini/attn2o-ffni.yaml")
    parser.add_argument("--clip", default="models/sd-mini/clip")
    parser.add_argument("--out", type=Path, default=Path("docs/sd-mini"))
    parser.add_argument("--logdir", type=Path, default=Path("logs/evaluate"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--class_pictures", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--scale", type=float, default=5.0)
    options = parser.parse_args(arguments)

    clip = CLIP(options.clip).eval()
    settings, seeds = Settings(steps=25, scale=options.scale), list(range(options.samples))
    gains, drifts = [], []
    for subject in options.subjects:
        word = json.loads((subject / "subject.json").read_text())["class_word"]
        pictures = PersonalizedBase(subject, size=64, set="val", class_word=word, repeats=1)
        photos = torch.stack([item["image"] for item in pictures]).movedim(-1, 1)
        adapters = train(subject, word, options)
        model = load_model_from_config(load_config("configs/sd-mini/inference.yaml"))

        def draw(prompt: str, model=model) -> torch.Tensor:
            return generate(model, [prompt] * len(seeds), seeds, settings)

        named, of_class = f"an emoji of a sks {word}", f"an emoji of a {word}"
        before, base = draw(named), draw(of_class)
        model.model.diffusion_model.load_adapter_from_dir(adapters)
        after, prior = draw(named), draw(of_class)
        model.model.diffusion_model.adapters_enable(False)
        same = torch.equal(draw(of_class), base)

        target, seen = clip.embed_pictures(photos), {}
        for name, made in (("base", base), ("before", before), ("after", after), ("prior", prior)):
            seen[name] = clip.embed_pictures(2 * made - 1)
        near = {name: similarity_to(vectors, target).mean() for name, vectors in seen.items()}
        alike = {name: pairwise_similarity(seen[name]) for name in ("base", "prior")}
        gains.append(near["after"] - near["base"])
        drifts.append(alike["prior"] - alike["base"])
        print(
            f"{subject.name}: CLIP-I to the subject {near['base']:.3f} of class samples, {near['before']:.3f}"
            f" before and {near['after']:.3f} after training; among class samples {alike['base']:.3f}, then "
            f"{alike['prior']:.3f}; with the adapter off the base exactly: {same}",
            flush=True,
        )
        rows = [((photos + 1) / 2)[: options.samples].repeat(8, 1, 1, 1)[: options.samples], before, after, base, prior]
        save_grid(torch.cat(rows), options.samples, options.out / f"dreambooth-{subject.name}.jpg")
    print("rise of CLIP-I: {:.3f} +- {:.3f}".format(*mean_and_error(torch.stack(gains))))
    print("rise of pairwise CLIP-I of the class: {:.3f} +- {:.3f}".format(*mean_and_error(torch.stack(drifts))))


if __name__ == "__main__":
    run_command(main)
