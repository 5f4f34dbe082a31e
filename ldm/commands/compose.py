"""Join Custom Diffusion concepts that were trained one by one in one delta, in closed form.

    ldm compose --paths cat/delta.ckpt+pot/delta.ckpt --categories "cat+wooden pot" \\
        --ckpt models/sd-v1-4.ckpt --regularization_prompt captions.txt

writes <save_path>/<categories>/checkpoints/delta_epoch=000000.ckpt or, if all deltas have diffusers' layout,
<save_path>/<categories>/delta.bin, with the new words <new1>, <new2>, ... in order. The closed form is that of arXiv
2212.04488.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser, add_files
from ldm.config import find_file
from ldm.errors import InputError
from ldm.files import read_text
from ldm.models.bases import CONDITIONER, DEFAULT

MOST = 200  # captions read of each file
CAPTIONS = "./data/regularization_captions.txt"  # the published default...
OURS = "examples/regularization_captions.txt"  # ... and what stands for it where there is no such file


def add_arguments(p: Parser) -> None:
    p.add_argument("--paths", required=True, help="deltas, joined by +")
    p.add_argument("--categories", required=True, help="what each concept is, joined by +")
    p.add_argument("--ckpt", required=True, help="the pretrained model: a checkpoint or a diffusers folder")
    p.add_argument("--save_path", default="optimized_logs", help="(default optimized_logs)")
    p.add_argument(
        "--prompts",
        help="for each concept a file of prompts, joined by +; {} stands for the concept (default: its name alone)",
    )
    p.add_argument(
        "--regularization_prompt",
        default=CAPTIONS,
        help=f"captions on which the weights are to stay, one per line, the first {MOST} count (default "
        f"%(default)s or, if there is none, {OURS} of this package)",
    )
    p.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    add_files(p, DEFAULT.config)


def captions_file(given: str) -> Path:
    """The file of captions: the given one; for the default that does not exist, that of this package."""
    path = Path(given)
    return find_file(OURS) if given == CAPTIONS and not path.exists() else path


def read_lines(path: str | Path) -> list[str]:
    """The first non-empty lines of a text file."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected text, a caption per line") from None
    if not any(lines):
        raise InputError(f"{path} holds no text; expected a caption per line")
    return [line for line in lines if line][:MOST]


def run(options: argparse.Namespace) -> None:
    from ldm.config import instantiate_from_config
    from ldm.devices import best_device
    from ldm.interchange import Context, by_name, custom_diffusion, identify
    from ldm.interchange.command import config_for, params_of, read_model, to_be_written
    from ldm.interchange.compose import compose
    from ldm.models.building import load_weights, skip_init

    paths, categories = options.paths.split("+"), options.categories.split("+")
    folder = "_".join(categories).replace(" ", "-")
    kinds = {identify(path) for path in paths}
    kind = "delta-diffusers" if kinds <= {"delta-diffusers", "delta-attn-procs"} else "delta"
    name = "delta.bin" if kind == "delta-diffusers" else "checkpoints/delta_epoch=000000.ckpt"
    output = to_be_written(Path(options.save_path) / folder / name, options.force)
    prompts = [read_lines(path) for path in options.prompts.split("+")] if options.prompts else None
    if prompts and len(prompts) != len(paths):
        raise InputError(f"--prompts names {len(prompts)} files for {len(paths)} deltas; expected one for each")
    regularization = read_lines(captions_file(options.regularization_prompt))
    deltas = [custom_diffusion.read(path) for path in paths]
    weights = read_model(options.ckpt)
    text = {n.removeprefix(CONDITIONER): v for n, v in weights.items() if n.startswith(CONDITIONER)}
    with skip_init():
        encoder = instantiate_from_config(params_of(config_for(options.config, options.ckpt)).cond_stage_config)
    load_weights(encoder, text, options.ckpt)
    encoder.to(best_device(options.device))
    joint = compose(encoder, weights, deltas, categories, regularization, prompts)
    by_name(kind).write(output, joint, Context())
    named = ", ".join(f"{word} ({category})" for word, category in zip(joint.tokens, categories, strict=False))
    print(f"{output}  {len(joint.weights)} weights; {named or 'no new words'}")
