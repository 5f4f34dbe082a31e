"""Paint the white places of masks anew: a folder of pictures, each with its mask beside it.

    ldm inpaint --indir photos --outdir painted --prompt "a vase" --ckpt model.ckpt
    ldm inpaint --init-img table.png --mask hole.png --outdir painted --prompt "a vase" --ckpt model.ckpt

A picture dog.png goes with dog_mask.png; the result has the picture's name. Models that were made for inpainting see
the mask, others are led by it step by step. One picture and its mask are drawn as `ldm sample` draws them, with grids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser
from ldm.commands import sample
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    sample.add_arguments(p)
    folders = p.add_argument_group("folders")
    folders.add_argument("--indir", metavar="DIR", help="pictures and masks: dog.png, dog_mask.png")
    folders.add_argument("--steps", type=int, help="the published name of --ddim_steps")
    p.set_defaults(outdir=None, prompt=None, n_iter=1)


def run(options: argparse.Namespace) -> None:
    if not options.outdir or not (options.indir or (options.init_img and options.mask)):
        raise InputError("name the folder of pictures and masks with --indir, or one picture and its mask with "
                         "--init-img and --mask, and the folder of the results with --outdir")  # fmt: skip
    options.ddim_steps = options.steps or options.ddim_steps
    options.prompt = options.prompt or [""]
    if not options.indir:
        sample.run(options)
        return
    for name in ("init_img", "mask"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is for one picture: leave --indir out, or this")
    options.init_img = options.indir  # so that options of pictures are allowed
    sample.check(options)

    from ldm import generate
    from ldm.data.starts import masked_pictures

    pairs = masked_pictures(options.indir)
    model, _ = sample.prepared_model(options)
    settings, [one, *others] = sample.settings_of(options), sample.read_prompts(options)
    if others:
        raise InputError("ldm inpaint takes one prompt for all pictures")
    for number, (picture, mask) in enumerate(pairs):
        options.init_img, options.mask = str(picture), str(mask)
        start = sample.start_of(model, options)
        prompts, negative = [one.prompt], [one.negative]
        (painted,) = generate.generate(model, prompts, [options.seed + number], settings, True, negative, start)
        path = Path(options.outdir) / f"{picture.stem}.png"
        metadata = sample.metadata(options, sample.Variant(settings.scale, None))
        generate.save_png(painted, path, {**one._asdict(), "seed": options.seed + number, **metadata})
        print(f"{path}  {picture.name} where {mask.name} is white")
