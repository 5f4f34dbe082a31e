"""Draw pictures from prompts, with adapters.

    ldm sample --prompt "photo of a sks dog" --adapter_path logs/<run>/checkpoints/500-adapters
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser, add_allow_family, add_compile, seed_number, text
from ldm.errors import InputError
from ldm.files import read_text
from ldm.models.bases import BASES, DEFAULT, base_of, recognise

# Of `ldm.models.diffusion.samplers`, which imports torch.
SAMPLERS = ("ddim", "plms", "dpm_solver", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2s_a", "lms")


class DescriptionAndDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every option with its default."""


def add_arguments(p: Parser) -> None:
    p.formatter_class = DescriptionAndDefaults
    what = p.add_argument_group("what to draw")
    what.add_argument("--prompt", type=text, nargs="?", default="a painting of a virus monster playing guitar")
    what.add_argument("--from-file", metavar="FILE", help="a text file with one prompt per line, instead of --prompt")
    what.add_argument("--n_samples", type=int, default=1, help="pictures for each prompt, made in one batch")
    what.add_argument("--n_iter", type=int, default=2, help="how often to go through the prompts")
    what.add_argument("--seed", type=seed_number, default=42, help="seed of the first picture; they count up from here")
    what.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")

    model = p.add_argument_group("model")
    model.add_argument("--config", default="auto",
                       help=f"auto: that of the base that --ckpt is of, else {DEFAULT.config}")  # fmt: skip
    model.add_argument("--ckpt", help="checkpoint of the base model; by default the one that the config names")
    model.add_argument("--laion400m", action="store_true", help="use the LAION-400M text-to-image model")
    model.add_argument("--adapter_path", action="append", default=[], metavar="PATH",
                       help="what was tuned: our folder, a LoRA of any format, a delta, words; repeatable")  # fmt: skip
    add_allow_family(model)
    model.add_argument("--delta_ckpt", dest="adapter_path", action="append", metavar="FILE",
                       help="the same, in Custom Diffusion's words")  # fmt: skip
    model.add_argument(
        "--adapter_scale", action="append", type=float, default=[], help="strength of each, in their order, or of all"
    )
    model.add_argument("--compress", action="store_true", help="Custom Diffusion's option; the file itself tells")
    model.add_argument("--modifier_token", metavar="<new1>+<new2>", help="names for the words of LoRAs and deltas")
    model.add_argument("--embedding_path", metavar="FILE", help="learnt words (textual inversion)")

    how = p.add_argument_group("how to sample")
    how.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="_a: ancestral, which add noise on their way")
    how.add_argument("--spacing", choices=("uniform", "quad", "trailing", "karras"), default="uniform",
                     help="of the steps: quad for ddim and plms, karras for euler to lms")  # fmt: skip
    how.add_argument("--plms", dest="sampler", action="store_const", const="plms", help="short for --sampler plms")
    how.add_argument("--ddim_steps", type=int, default=50, help="steps of any sampler")
    how.add_argument("--ddim_eta", type=float,
                     help="noise that is added, 0 is none (default: 1 for ancestral samplers, else 0)")  # fmt: skip
    how.add_argument("--scale", type=float, default=7.5, help="guidance scale")
    how.add_argument("--H", type=int, help="height in pixels; by default the model's")
    how.add_argument("--W", type=int, help="width in pixels; by default the model's")
    how.add_argument("--C", type=int, help="latent channels; by default the model's")
    how.add_argument("--f", type=int, help="pixels per latent; by default the model's")
    how.add_argument("--precision", choices=("full", "autocast"), default="autocast", help="autocast acts on CUDA only")
    add_compile(how)
    how.add_argument("--device", help="cuda, cuda:1, mps or cpu; by default the best there is")

    files = p.add_argument_group("files")
    files.add_argument("--outdir", default="outputs/txt2img-samples")
    files.add_argument("--skip_grid", action="store_true", help="no grid of all pictures")
    files.add_argument("--skip_save", action="store_true", help="no single pictures")
    files.add_argument("--n_rows", type=int, default=0, help="pictures in a row of the grid; 0: --n_samples")


def run(options: argparse.Namespace) -> None:
    if options.laion400m:
        options.config = next(base.config for base in BASES if base.name == "txt2img-1p4B-eval")
    check(options)
    prompts = read_prompts(options)

    from ldm import generate
    from ldm.config import find_file, load_config
    from ldm.devices import best_device
    from ldm.models.building import untuned
    from ldm.models.diffusion.samplers import sampler as row
    from ldm.util import load_model_from_config

    if options.config == "auto":
        options.config = config_of(options.ckpt)
    model = load_model_from_config(untuned(load_config(find_file(options.config))), options.ckpt, verbose=True)
    model.to(best_device(options.device))
    add_adapters(model, options)
    if options.compile:
        from ldm.train.compiled import compile_module  # which imports Lightning

        compile_module(model.model.diffusion_model, options.compile)
    settings = generate.Settings(
        options.sampler, options.ddim_steps, options.ddim_eta, options.scale, options.H, options.W, options.C,
        options.f, half=options.precision == "autocast", spacing=options.spacing,
    )  # fmt: skip
    outdir, singles = Path(options.outdir), Path(options.outdir) / "samples"
    metadata = {
        "sampler": options.sampler, "steps": options.ddim_steps, "spacing": options.spacing,
        "eta": row(options.sampler).usual_eta if options.ddim_eta is None else options.ddim_eta, "scale": options.scale,
        "config": options.config, "ckpt": options.ckpt or "the config's", "embeddings": options.embedding_path or "",
        "adapter": ", ".join(options.adapter_path), "adapter scale": ", ".join(map(str, options.adapter_scale)),
    }  # fmt: skip
    number, pictures = generate.next_number(singles), []
    for texts, seeds in generate.batches(prompts, options.n_samples, options.n_iter, options.seed, options.fixed_code):
        for prompt, seed, picture in zip(
            texts, seeds, generate.generate(model, texts, seeds, settings, True), strict=True
        ):
            if not options.skip_save:
                of_picture = {"prompt": prompt, "seed": seed, **metadata}
                number = generate.save_numbered(picture, singles, "{:05}.png", number, of_picture)
                print(f"{singles / f'{number:05}.png'}  {prompt!r}, seed {seed}")
            number += 1
            pictures.append(picture)
    if not options.skip_grid:
        grid = generate.grid(pictures, options.n_rows or options.n_samples)
        first = generate.next_number(outdir, "grid-*.png")
        of_grid = {"prompt": " | ".join(prompts), "seed": options.seed, **metadata}
        number = generate.save_numbered(grid, outdir, "grid-{:04}.png", first, of_grid)
        print(f"{outdir / f'grid-{number:04}.png'}  all {len(pictures)}")


def config_of(ckpt: str | None) -> str:
    """The config of the base that a checkpoint is of, by the names and shapes of its weights."""
    if ckpt is None:
        return DEFAULT.config
    from ldm.checkpoints import read_weights

    weights = read_weights(ckpt)
    base = base_of(weights)
    if base is None:
        what = recognise(weights)
        unknown = "is of no base that is known: name its config by --config"
        named = f"is {what.what}: {what.instead}" if what else unknown
        raise InputError(f"{ckpt} {named}")
    print(f"{ckpt} is {base.what}: {base.config}{'; ' + base.note if base.note else ''}")
    return base.config


def check(options: argparse.Namespace) -> None:
    for name in ("n_samples", "n_iter", "ddim_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.sampler == "plms" and options.ddim_eta:
        raise InputError("--ddim_eta must be 0 with the plms sampler, which is deterministic")
    if len(options.adapter_scale) not in (0, min(1, len(options.adapter_path)), len(options.adapter_path)):
        raise InputError(
            f"{len(options.adapter_scale)} times --adapter_scale for {len(options.adapter_path)} times --adapter_path: "
            "give one for each, or one for all"
        )


def read_prompts(options: argparse.Namespace) -> list[str]:
    if not options.from_file:
        return [options.prompt or ""]
    try:
        lines = read_text(options.from_file).splitlines()
    except InputError as error:
        raise InputError(f"--from-file {error}; expected text, a prompt per line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--from-file {options.from_file} holds no prompt; expected one per line")
    return prompts


def add_adapters(model, options: argparse.Namespace) -> None:
    from ldm.interchange import assign_tokens, load_any
    from ldm.interchange.custom_diffusion import split_words
    from ldm.modules.encoders.tokens import load_words

    names = assign_tokens(split_words(options.modifier_token), options.adapter_path)
    if options.embedding_path:  # words as they are called in the file, `*` too, as in LDM
        load_words(model.cond_stage_model, options.embedding_path, "--embedding_path")
    scales = options.adapter_scale or [1.0]
    scales = scales * len(options.adapter_path) if len(scales) == 1 else scales
    for number, (path, scale, words) in enumerate(zip(options.adapter_path, scales, names, strict=True)):
        load_any(model, path, scale, add=number > 0, words=words)
