"""Show in one picture what an adapter has learnt: the subject, the base before, and after.

    ldm before-after --config configs/sd-mini/attn2o-ffni.yaml --data_root photos --class_word cat \\
        --adapter_path logs/<run>/checkpoints/800-adapters --out before-after.png
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser, add_allow_family, count, seed_number


def add_arguments(p: Parser) -> None:
    p.add_argument("--config", required=True)
    p.add_argument("--ckpt", help="checkpoint of the base model; by default the one that the config names")
    p.add_argument("--adapter_path", required=True, metavar="DIR")
    add_allow_family(p)
    p.add_argument("--data_root", required=True, metavar="DIR", help="photographs of the subject")
    p.add_argument("--class_word", required=True)
    p.add_argument("--identifier", default="sks")
    p.add_argument("--template", default="photo of a {}", help="caption; {} stands for the subject or its class")
    p.add_argument("--columns", type=count, default=6, help="pictures in a row")
    p.add_argument("--steps", type=count, default=25)
    p.add_argument("--scale", type=float, default=5.0, help="guidance scale")
    p.add_argument("--seed", type=seed_number, default=0)
    p.add_argument("--device")
    p.add_argument("--out", required=True, metavar="PNG")


def run(options: argparse.Namespace) -> None:
    from ldm.checkpoints import atomic_write
    from ldm.config import find_file, load_config
    from ldm.data.pictures import find_pictures, read_picture, to_tensor
    from ldm.devices import best_device
    from ldm.generate import Settings, generate
    from ldm.interchange import load_any
    from ldm.sheets import labelled_rows
    from ldm.util import load_model_from_config

    photographs = find_pictures(options.data_root)[: options.columns]
    model = load_model_from_config(load_config(find_file(options.config)), options.ckpt)
    model.to(best_device(options.device))
    subject = options.template.replace("{}", f"{options.identifier} {options.class_word}")
    plain = options.template.replace("{}", options.class_word)
    seeds = range(options.seed, options.seed + options.columns)
    settings = Settings(steps=options.steps, scale=options.scale)

    def drawn() -> list[list]:
        return [list(generate(model, [prompt] * options.columns, seeds, settings)) for prompt in (subject, plain)]

    unet = model.model.diffusion_model
    unet.adapters_enable(False)  # those of the config, which have learnt nothing
    before = drawn()
    unet.adapters_enable(True)
    load_any(model, options.adapter_path)
    after = drawn()
    rows = {"the subject": [(to_tensor(read_picture(path), 128) + 1) / 2 for path in photographs]}
    for prompt, base, tuned in zip((subject, plain), before, after, strict=True):
        rows |= {f"before: {prompt}": base, f"after: {prompt}": tuned}
    with atomic_write(options.out) as beside:
        labelled_rows(rows).save(beside, format="PNG")
    print(options.out)
