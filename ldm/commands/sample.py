"""Draw pictures from prompts, with adapters.

    ldm sample --prompt "photo of a sks dog" --adapter_path logs/<run>/checkpoints/500-adapters
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.cli import Parser, add_allow_family, add_base_parts, add_compile, seed_number, text
from ldm.devices import PRECISIONS
from ldm.errors import InputError
from ldm.files import read_text
from ldm.models.bases import BASES, DEFAULT

log = logging.getLogger(__name__)

PROMPT = "a painting of a virus monster playing guitar"
AGAINST = " --n "  # before the negative prompt, in a line of --from-file, as sd-scripts has it
# Of `ldm.models.diffusion.samplers`, which imports torch.
SAMPLERS = ("ddim", "plms", "dpm_solver", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2s_a", "lms")


class DescriptionAndDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every option with its default."""


def add_arguments(p: Parser) -> None:
    p.formatter_class = DescriptionAndDefaults
    what = p.add_argument_group("what to draw")
    what.add_argument("--prompt", type=text, nargs="?", action="append", help=f"repeatable (default: {PROMPT})")
    what.add_argument("--negative_prompt", type=text, metavar="TEXT", default="", help="what guidance leads away from")
    what.add_argument("--from-file", metavar="FILE",
                      help="instead of --prompt: a prompt per line, '--n TEXT' behind it is negative")  # fmt: skip
    what.add_argument("--prompt_weights", action="store_true", help="read (word), [word] and (word:1.3) as weights")
    what.add_argument("--n_samples", type=int, default=1, help="pictures for each prompt, made in one batch")
    what.add_argument("--n_iter", type=int, default=2, help="how often to go through the prompts")
    what.add_argument("--seed", type=seed_number, default=42, help="seed of the first picture; they count up from here")
    what.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")

    picture = p.add_argument_group("beginning at a picture")
    picture.add_argument("--init-img", metavar="FILE", help="begin at this picture instead of noise")
    picture.add_argument("--strength", type=float, help="share of the steps that are made: 0 keeps the picture, 1 "
                         "nothing of it (default 0.75, with a mask 1)")  # fmt: skip
    picture.add_argument("--mask", metavar="FILE", help="paint only where this picture is white")

    model = p.add_argument_group("model")
    model.add_argument("--config", default="auto",
                       help=f"auto: that of the base that --ckpt is of, else {DEFAULT.config}")  # fmt: skip
    model.add_argument("--ckpt", help="checkpoint of the base model; by default the one that the config names")
    add_base_parts(model)
    model.add_argument("--laion400m", action="store_true", help="use the LAION-400M text-to-image model")
    model.add_argument("--adapter_path", action="append", default=[], metavar="PATH",
                       help="what was tuned: our folder, a LoRA of any format, a delta, words; repeatable")  # fmt: skip
    add_allow_family(model)
    model.add_argument("--delta_ckpt", dest="adapter_path", action="append", metavar="FILE",
                       help="the same, in Custom Diffusion's words")  # fmt: skip
    model.add_argument(
        "--adapter_scale", action="extend", nargs="+", type=float, default=[],
        help="strength of each, in their order, or of all; several for one adapter: a grid of them",
    )  # fmt: skip
    model.add_argument("--compress", action="store_true", help="Custom Diffusion's option; the file itself tells")
    model.add_argument("--modifier_token", metavar="<new1>+<new2>", help="names for the words of LoRAs and deltas")
    model.add_argument("--embedding_path", action="append", default=[], metavar="FILE",
                       help="learnt words (textual inversion); repeatable")  # fmt: skip

    how = p.add_argument_group("how to sample")
    how.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="_a: ancestral, which add noise on their way")
    how.add_argument("--spacing", choices=("uniform", "quad", "trailing", "karras"), default="uniform",
                     help="of the steps: quad for ddim and plms, karras for euler to lms")  # fmt: skip
    how.add_argument("--plms", dest="sampler", action="store_const", const="plms", help="short for --sampler plms")
    how.add_argument("--dpm_solver", dest="sampler", action="store_const", const="dpm_solver",
                     help="short for --sampler dpm_solver")  # fmt: skip
    how.add_argument("--ddim_steps", type=int, default=50, help="steps of any sampler")
    how.add_argument("--ddim_eta", type=float,
                     help="noise that is added, 0 is none (default: 1 for ancestral samplers, else 0)")  # fmt: skip
    how.add_argument("--scale", type=float, nargs="+", default=[7.5],
                     help="guidance scale; several: a grid of them")  # fmt: skip
    how.add_argument("--H", type=int, help="height in pixels; by default the model's")
    how.add_argument("--W", type=int, help="width in pixels; by default the model's")
    how.add_argument("--C", type=int, help="latent channels; by default the model's")
    how.add_argument("--f", type=int, help="pixels per latent; by default the model's")
    how.add_argument("--precision", choices=("full", "autocast"), default="autocast",
                     help="autocast acts on CUDA only, and on weights in fp32")  # fmt: skip
    how.add_argument("--base_precision", choices=tuple(PRECISIONS), default="fp32",
                     help="of the UNet's weights; a file in half precision is loaded as it is then")  # fmt: skip
    add_compile(how)
    how.add_argument("--device", help="cuda, cuda:1, mps or cpu; by default the best there is")

    files = p.add_argument_group("files")
    files.add_argument("--outdir", default="outputs/txt2img-samples")
    files.add_argument("--skip_grid", action="store_true", help="no grid of all pictures")
    files.add_argument("--skip_save", action="store_true", help="no single pictures")
    files.add_argument("--safety_checker", metavar="DIR|off", default="off",
                       help="blank what the published safety checker flags; its folder, or off")  # fmt: skip
    files.add_argument("--watermark", metavar="TEXT|off", default="off",
                       help="invisible text in every picture (extra watermark)")  # fmt: skip
    files.add_argument("--wandb_log", action="store_true", help="also send the pictures to Weights & Biases")
    files.add_argument("--n_rows", type=int, default=0, help="pictures in a row of the grid; 0: --n_samples")


class Text(NamedTuple):
    """A prompt, and what guidance leads away from."""

    prompt: str
    negative: str = ""


class Variant(NamedTuple):
    """One of the settings that a grid compares."""

    scale: float
    adapter_scale: float | None  # None: as given for each adapter


def run(options: argparse.Namespace) -> None:
    if options.laion400m:
        options.config = next(base.config for base in BASES if base.name == "txt2img-1p4B-eval")
    check(options)
    wandb = weights_and_biases() if options.wandb_log else None
    texts = read_prompts(options)
    variants = variants_of(options)
    model, use_variant = prepared_model(options)

    from ldm import generate

    settings, start = settings_of(options), start_of(model, options)
    say_what_is_cut(model, texts)
    say_what_words_are_unused(model, texts)
    outdir, singles = Path(options.outdir), Path(options.outdir) / "samples"
    number, rows = generate.next_number(singles), {}
    for variant in variants:
        use_variant(variant)
        own, label = replace(settings, scale=variant.scale), label_of(variant, variants)
        pictures = rows.setdefault(label, [])
        for one, seed, picture in drawn(model, texts, options, own, start):
            if not options.skip_save:
                of_picture = {**one._asdict(), "seed": seed, **metadata(options, variant)}
                number = generate.save_numbered(picture, singles, "{:05}.png", number, of_picture)
                print(f"{singles / f'{number:05}.png'}  {one.prompt!r}, seed {seed}{label and ', ' + label}")
            number += 1
            pictures.append(picture)
    if not options.skip_grid:
        save_grid(rows, texts, outdir, options)
    if wandb:
        run_there = wandb.init(project="custom-diffusion", name=outdir.name, config=metadata(options, variants[0]))
        for label, pictures in rows.items():
            run_there.log({label or "pictures": [wandb.Image(generate.to_pil(picture)) for picture in pictures]})
        run_there.finish()


def weights_and_biases() -> Any:
    """The package `wandb`. Raises `InputError` if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb_log needs the package wandb: pip install wandb") from None
    return wandb


def prepared_model(options: argparse.Namespace) -> tuple[Any, Callable[[Variant], None]]:
    """The model with its adapters, and what sets the strength of its adapter to that of a variant."""
    import torch

    from ldm.config import find_file, load_config
    from ldm.devices import best_device
    from ldm.interchange.base_choice import Choice
    from ldm.models.building import untuned
    from ldm.util import load_model_from_config

    is_auto = options.config == "auto"
    if is_auto:
        options.config = config_of(options.ckpt)
    config = untuned(load_config(find_file(options.config)))
    config = Choice.asked(options).into(config)
    if is_auto and options.ckpt:
        adapt(config, options.ckpt)
    model = load_model_from_config(config, options.ckpt, True, getattr(torch, PRECISIONS[options.base_precision]))
    model.to(best_device(options.device))
    add_adapters(model, options)
    if options.compile:
        from ldm.train.compiled import compile_module  # which imports Lightning

        compile_module(model.model.diffusion_model, options.compile)
    now = options.adapter_scale[:1]

    def use_variant(variant: Variant) -> None:
        if variant.adapter_scale is not None and [variant.adapter_scale] != now:
            from ldm.interchange import load_any

            load_any(model, options.adapter_path[0], variant.adapter_scale)
            now[:] = [variant.adapter_scale]

    return model, use_variant


def settings_of(options: argparse.Namespace) -> Any:
    from ldm.generate import Settings

    half = options.precision == "autocast" and options.base_precision == "fp32"
    return Settings(
        options.sampler, options.ddim_steps, options.ddim_eta, options.scale[0], options.H, options.W, options.C,
        options.f, half=half, spacing=options.spacing, weighted=options.prompt_weights,
    )  # fmt: skip


def start_of(model: Any, options: argparse.Namespace) -> Any:
    """What sampling begins at, None for noise."""
    if not options.init_img:
        return None
    from ldm.data.starts import read_mask, read_start
    from ldm.generate import Start

    factor = getattr(model.first_stage_model, "downsampling_factor", 1)
    multiple = factor * model.model.diffusion_model.downsampling_factor
    picture = read_start(options.init_img, multiple, (options.H, options.W))
    mask = read_mask(options.mask, tuple(picture.shape[1:])) if options.mask else None
    strength = options.strength
    if strength is None:
        strength = 0.75 if mask is None else 1.0
    return Start(picture, strength, mask)


def drawn(
    model: Any, texts: list[Text], options: argparse.Namespace, settings: Any, start: Any
) -> Iterator[tuple[Text, int, Any]]:
    """Every picture with its prompt and its seed."""
    from ldm import generate
    from ldm.evaluate.safety import find_checker
    from ldm.evaluate.watermark import find_watermark, finish

    checker, watermark = find_checker(options.safety_checker), find_watermark(options.watermark)
    for batch, seeds in generate.batches(texts, options.n_samples, options.n_iter, options.seed, options.fixed_code):
        prompts, negative = [text.prompt for text in batch], [text.negative for text in batch]
        pictures = generate.generate(model, prompts, seeds, settings, True, negative, start)
        yield from zip(batch, seeds, finish(list(pictures), checker, watermark), strict=True)


def save_grid(rows: dict[str, list], texts: list[Text], outdir: Path, options: argparse.Namespace) -> None:
    """All pictures as one; with several settings a labelled row for each, and prompts above the columns."""
    from ldm import generate

    pictures = list(itertools.chain(*rows.values()))
    if len(rows) > 1:
        from ldm.sheets import labelled_rows

        prompts = [text.prompt for text in texts for _ in range(options.n_samples)] * options.n_iter
        heads = prompts if len(texts) > 1 else []
        grid = generate.from_pil(labelled_rows(rows, min(pictures[0].shape[-1], 512), heads=heads))
    else:
        grid = generate.grid(pictures, options.n_rows or options.n_samples)
    first = generate.next_number(outdir, "grid-*.png")
    variant = Variant(options.scale[0], None)
    of_grid = {"prompt": " | ".join(text.prompt for text in texts), "seed": options.seed, **metadata(options, variant)}
    number = generate.save_numbered(grid, outdir, "grid-{:04}.png", first, of_grid)
    print(f"{outdir / f'grid-{number:04}.png'}  all {len(pictures)}")


def metadata(options: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """What a picture's file says of how it was made, beside prompt and seed."""
    from ldm.models.diffusion.samplers import sampler

    scales = options.adapter_scale if variant.adapter_scale is None else [variant.adapter_scale]
    eta = sampler(options.sampler).usual_eta if options.ddim_eta is None else options.ddim_eta
    given = {"vae": options.vae, "text encoder": ", ".join(options.text_encoder or []), "ema": options.ema}
    parts = {name: value for name, value in given.items() if value not in (None, "")}
    begun = {"init-img": options.init_img, "strength": options.strength, "mask": options.mask or ""}
    return {
        "sampler": options.sampler, "steps": options.ddim_steps, "spacing": options.spacing, "eta": eta,
        "base precision": options.base_precision, **parts,
        "scale": variant.scale, "config": options.config, "ckpt": options.ckpt or "the config's",
        "embeddings": ", ".join(options.embedding_path), "adapter": ", ".join(options.adapter_path),
        "adapter scale": ", ".join(map(str, scales)), **(begun if options.init_img else {}),
    }  # fmt: skip


def variants_of(options: argparse.Namespace) -> list[Variant]:
    """The settings that are compared, in the order of the grid's rows; one if nothing is."""
    strengths = options.adapter_scale if len(options.adapter_path) == 1 and len(options.adapter_scale) > 1 else [None]
    return [Variant(scale, strength) for scale in options.scale for strength in strengths]


def label_of(variant: Variant, variants: list[Variant]) -> str:
    """What a row of the grid shows; empty where there is one."""
    if len(variants) == 1:
        return ""
    strength = "" if variant.adapter_scale is None else f", adapter scale {variant.adapter_scale:g}"
    return f"scale {variant.scale:g}{strength}"


def config_of(ckpt: str | None) -> str:
    """The config of the base that a checkpoint is of, by the names and shapes of its weights."""
    if ckpt is None:
        return DEFAULT.config
    from ldm.interchange.base_files import known_base

    base = known_base(ckpt)
    print(f"{ckpt} is {base.what}: {base.config}{'; ' + base.note if base.note else ''}")
    return base.config


def adapt(config: Any, ckpt: str) -> None:
    """Set a config to what the JSON of a diffusers folder says of its model. Raises `InputError`."""
    from omegaconf import OmegaConf

    from ldm.interchange import diffusers_json
    from ldm.interchange.base_choice import Choice
    from ldm.interchange.hub import folder_of

    if (folder := folder_of(ckpt)) is None:
        return
    for key, value in diffusers_json.adapted(folder, config.model.params, ckpt, Choice.of(config).parts).items():
        log.info("%s: %s is %s", ckpt, key, value)
        OmegaConf.update(config.model.params, key, value)


def check(options: argparse.Namespace) -> None:
    for name in ("n_samples", "n_iter", "ddim_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.sampler == "plms" and options.ddim_eta:
        raise InputError("--ddim_eta must be 0 with the plms sampler, which is deterministic")
    count = len(options.adapter_path)
    if options.adapter_scale and count != 1 and len(options.adapter_scale) not in (min(1, count), count):
        raise InputError(
            f"{len(options.adapter_scale)} times --adapter_scale for {count} times --adapter_path: "
            "give one for each, or one for all"
        )
    if not options.init_img:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name} needs a picture to begin at: add --init-img")


def read_prompts(options: argparse.Namespace) -> list[Text]:
    """The prompts with their negative ones, of the command line or of its file."""
    if not options.from_file:
        return [Text(prompt or "", options.negative_prompt) for prompt in options.prompt or [PROMPT]]
    try:
        lines = read_text(options.from_file).splitlines()
    except InputError as error:
        raise InputError(f"--from-file {error}; expected text, a prompt per line") from None
    found = []
    for line in filter(None, map(str.strip, lines)):
        prompt, mark, negative = f" {line}".partition(AGAINST)
        found.append(Text(prompt.strip(), negative.strip() if mark else options.negative_prompt))
    if not found:
        raise InputError(f"--from-file {options.from_file} holds no prompt; expected one per line")
    return found


def say_what_is_cut(model: Any, texts: list[Text]) -> None:
    """Log, once for each prompt, the words that text encoders with a single window do not see (those of SDXL)."""
    from ldm.modules.encoders.prompts import cut_words

    embedders = getattr(getattr(model, "conditioner", None), "embedders", [])
    for encoder in [one for one in embedders if hasattr(one, "tokens_of")][:1]:  # both have the same vocabulary
        for one in dict.fromkeys(part for pair in texts for part in pair):
            if words := cut_words(encoder, one):
                log.warning("the prompt is too long for the text encoders, which do not see: %s", words)


def say_what_words_are_unused(model: Any, texts: list[Text]) -> None:
    """Log a warning if the model has learnt words and no prompt uses any."""
    from ldm.modules.encoders.tokens import readers

    for encoder in list(readers(model).values())[:1]:  # all of a model have the same words
        tokens = encoder.new_tokens
        if tokens.words and not any(tokens.used_in(part) for pair in texts for part in pair):
            log.warning("no prompt uses a learnt word; there are %s", ", ".join(tokens.words))


def say_words(model: Any, path: str, known: set[str]) -> None:
    """Print the words that a file has taught, and add them to the known ones."""
    from ldm.modules.encoders.tokens import readers

    taught = dict.fromkeys(word for e in readers(model).values() for word in e.new_tokens.words if word not in known)
    if taught:
        print(f"{path}  words {', '.join(taught)}")
    known.update(taught)


def add_adapters(model, options: argparse.Namespace) -> None:
    from ldm.interchange import assign_tokens, load_any
    from ldm.interchange.custom_diffusion import split_words
    from ldm.modules.encoders.tokens import load_words

    names = assign_tokens(split_words(options.modifier_token), options.adapter_path)
    known: set[str] = set()
    for path in options.embedding_path:
        load_words(model, path, "--embedding_path")
        say_words(model, path, known)
    scales = options.adapter_scale or [1.0]
    scales = scales[:1] if len(options.adapter_path) == 1 else scales
    scales = scales * len(options.adapter_path) if len(scales) == 1 else scales
    for number, (path, scale, words) in enumerate(zip(options.adapter_path, scales, names, strict=True)):
        load_any(model, path, scale, add=number > 0, words=words)
        say_words(model, path, known)
