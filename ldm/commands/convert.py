"""Convert any format to any: LoRAs, Custom Diffusion deltas, learnt words, whole models.

    ldm convert lora.safetensors out.safetensors --to kohya
    ldm convert logs/<run>/checkpoints/500-adapters out.safetensors --to diffusers
    ldm convert models/sd-v1-4.ckpt folder --to diffusers-model
    ldm convert --mode compvis-to-diffuser --ckpt models/sd-v1-4.ckpt --delta_ckpt delta.ckpt

What the input is, is seen by looking at it. It can become:
  a LoRA, or a folder of ours that holds one      cloneofsimo, cloneofsimo-pt, comfyui, diffusers, kohya, peft
  LoHa, LoKr, DoRA, OFT, ..., or such a folder    lycoris (for web UIs), peft-kinds
  a Custom Diffusion delta, or such a folder      delta, delta-diffusers, delta-attn-procs
  what has learnt words                           words (for diffusers), words-ldm (for LDM and web UIs)
  a model                                         checkpoint, diffusers-model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser, add_base_parts, add_files
from ldm.errors import InputError
from ldm.interchange.formats import written
from ldm.models.bases import DEFAULT

ORDERS = ("diffusers", "ldm", "diffusers-new")  # of ldm.interchange.layers, whose import would slow --help
MODES = ("diffuser-to-webui", "compvis-to-webui", "compvis-to-diffuser", "diffuser-to-compvis")


def add_arguments(p: Parser) -> None:
    p.add_argument("paths", nargs="*", metavar="INPUT OUTPUT")
    p.add_argument("--to", choices=written(), metavar="FORMAT", help=", ".join(written()))
    p.add_argument("--order", choices=ORDERS,
                   help="of the layers of a cloneofsimo file: of the input where its shapes do not tell it (default: "
                   "what fits first), of the output (default diffusers)")  # fmt: skip
    p.add_argument("--modifier_token", help="names of a delta's new words, joined by + (default <new1>+<new2>...)")
    p.add_argument("--bundle_words", action="store_true",
                   help="write learnt words into the LoRA file, too, for web UIs: kohya, comfyui, lycoris")  # fmt: skip
    p.add_argument("--base", metavar="MODEL", help="the base, to write tuned weights as differences from it")
    add_base_parts(p.add_argument_group("of INPUT, if it is a whole model, else of --base or --ckpt"))
    add_files(p, DEFAULT.config)
    published = p.add_argument_group("the published interface for deltas; the output lies beside the delta")
    published.add_argument("--mode", choices=MODES,
                           help="to-diffuser, to-compvis: the delta's layout; to-webui: a whole model")  # fmt: skip
    published.add_argument("--ckpt", help="the pretrained model: a checkpoint or a diffusers folder")
    published.add_argument("--delta_ckpt")
    published.add_argument("--sd_version", help="accepted for compatibility; the base is --ckpt")
    published.add_argument("--modelname", default="model.ckpt", help="name of the checkpoint (default model.ckpt)")


def run(options: argparse.Namespace) -> None:
    if options.mode:
        print(convert_delta(options))
        return
    if len(options.paths) != 2 or not options.to:
        raise InputError("expected INPUT OUTPUT --to FORMAT, or --mode with --ckpt and --delta_ckpt; see --help")
    source, output = options.paths
    from ldm.interchange.command import to_be_written

    print(convert(source, to_be_written(output, options.force, options.to), options))


def convert(source: str, output: Path, options: argparse.Namespace) -> str:
    """Read by what the input is, write what is wanted; a line about it. Raises `InputError` where that cannot be."""
    from ldm.interchange import Context, by_name, open_file, recognise
    from ldm.interchange.base_choice import NONE, Choice
    from ldm.interchange.command import config_for, read_model
    from ldm.interchange.contents import CONTENTS
    from ldm.interchange.custom_diffusion import split_words

    row, to = recognise(file := open_file(source)), by_name(options.to)
    form = CONTENTS[to.form]
    config, words = config_for(options.config, file), split_words(options.modifier_token)
    choice, is_model = Choice.asked(options), row.form == "model"
    if choice != NONE and not (is_model or options.base):
        raise InputError(f"--vae, --text_encoder and --ema are for whole models; {source} is {row.title}")
    base = read_model(options.base, config, None if is_model else choice) if options.base else None
    if options.bundle_words and not to.bundles:
        raise InputError(f"--bundle_words: {to.name} has no place for words; expected kohya, comfyui or lycoris")
    context = Context(
        config=config, order=options.order, words=words, source=source, base=base, choice=choice if is_model else None,
        bundles=options.bundle_words,
    )  # fmt: skip
    if form.name not in row.holds:
        raise InputError(f"{source} {form.absent or f'is {row.title}: it cannot become {to.name}'}")
    value = row.read(form.name, file, context)
    if not value:
        raise InputError(f"{source} {form.absent}")
    held = getattr(value, "tokens", {})
    lost = {} if to.keeps_words or options.bundle_words else held
    if held and to.name != "words" and not getattr(value, "layers", True):
        raise InputError(f"{source} holds words and no LoRA; write them with --to words")
    files = to.write(output, value, context)
    summary = f"{', '.join(map(str, files))}  {form.summary(value)}"
    if options.bundle_words:
        return f"{summary}, words {', '.join(held) or 'none'}"
    more = " or --bundle_words" if to.bundles else ""
    return f"{summary}; its words {', '.join(lost)} are not in it: --to words{more}" if lost else summary


def convert_delta(options: argparse.Namespace) -> str:
    """The published modes."""
    from ldm.interchange import Context, apply, by_name, custom_diffusion, embeddings
    from ldm.interchange.base_choice import Choice
    from ldm.interchange.command import config_for, read_model, to_be_written
    from ldm.modules.encoders.tokens import is_bracketed

    if not options.delta_ckpt or not options.ckpt:
        raise InputError(f"--mode {options.mode} needs --ckpt and --delta_ckpt")
    source = Path(options.delta_ckpt)
    delta = custom_diffusion.read(source, custom_diffusion.split_words(options.modifier_token))
    if not options.mode.endswith("-to-webui"):
        to_ldm = options.mode == "diffuser-to-compvis"
        name, to = ("delta_model.ckpt", "delta") if to_ldm else ("delta.bin", "delta-diffusers")
        output = to_be_written(source.with_name(name), options.force)
        by_name(to).write(output, delta, Context())
        return f"{output}  {len(delta.weights)} weights, words {', '.join(delta.tokens) or 'none'}"
    place = source.parent / "webui"
    output = to_be_written(place / options.modelname, options.force)
    names = dict(zip(delta.tokens, embeddings.file_names(delta.tokens), strict=True))
    files = {
        word: to_be_written(
            place / "embeddings" / (f"<{name}>.pt" if is_bracketed(word) else f"{name}.pt"), options.force
        )
        for word, name in names.items()
    }
    choice = Choice.asked(options)
    weights = read_model(options.ckpt, config_for(options.config, options.ckpt) if choice.paths else None, choice)
    changed = apply.merged(weights, custom_diffusion.changes(delta, weights, str(source)))
    by_name("checkpoint").write(output, changed, Context())
    for word, file in files.items():
        by_name("words-ldm").write(file, {word: delta.tokens[word]}, Context())
    return "  ".join(map(str, [output, *files.values()]))
