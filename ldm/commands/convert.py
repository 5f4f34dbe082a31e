"""Convert any format to any: LoRAs, Custom Diffusion deltas, learnt words, whole models.

    ldm convert lora.safetensors out.safetensors --to kohya
    ldm convert logs/<run>/checkpoints/500-adapters out.safetensors --to diffusers
    ldm convert models/sd-v1-4.ckpt folder --to diffusers-model
    ldm convert --mode compvis-to-diffuser --ckpt models/sd-v1-4.ckpt --delta_ckpt delta.ckpt

What the input is, is seen by looking at it. It can become:
  a LoRA, or a folder of ours that holds one      cloneofsimo, cloneofsimo-pt, diffusers, kohya
  a Custom Diffusion delta, or such a folder      delta, delta-diffusers
  what has learnt words                           words (for diffusers), words-ldm (for LDM and web UIs)
  a model                                         checkpoint, diffusers-model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser, add_files
from ldm.errors import InputError

LORAS = ("cloneofsimo", "cloneofsimo-pt", "diffusers", "kohya")
TARGETS = (*LORAS, "delta", "delta-diffusers", "words", "words-ldm", "checkpoint", "diffusers-model")
ORDERS = ("diffusers", "ldm", "diffusers-new")  # of ldm.interchange.layers, whose import would slow --help
MODES = ("diffuser-to-webui", "compvis-to-webui", "compvis-to-diffuser", "diffuser-to-compvis")


def add_arguments(p: Parser) -> None:
    p.add_argument("paths", nargs="*", metavar="INPUT OUTPUT")
    p.add_argument("--to", choices=TARGETS, metavar="FORMAT", help=", ".join(TARGETS))
    p.add_argument("--order", choices=ORDERS,
                   help="of the layers of a cloneofsimo file: of the input where its shapes do not tell it (default: "
                   "what fits first), of the output (default diffusers)")  # fmt: skip
    p.add_argument("--modifier_token", help="names of a delta's new words, joined by + (default <new1>+<new2>...)")
    add_files(p)
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
    from ldm.interchange import DELTAS, KINDS, custom_diffusion, diffusers_model, identify, own, read_lora, words_in
    from ldm.interchange import LORAS as READ
    from ldm.interchange.command import params_of, read_model, skeleton, write_checkpoint, write_lora

    kind, to = identify(source), options.to
    words = custom_diffusion.split_words(options.modifier_token)
    if to in LORAS and kind in (*READ, "adapter"):
        model = skeleton(options.config)
        lora = read_lora(source, model, options.order)
        if not lora.layers and to != LORAS[0]:  # cloneofsimo's files may hold words alone
            raise InputError(f"{source} holds words and no LoRA; write them with --to words")
        write_lora(output, lora, model, to, options.order or "diffusers")
        lost = (
            f"; its words {', '.join(lora.tokens)} are not in it: --to words" if lora.tokens and to != LORAS[0] else ""
        )
        return f"{output}  {len(lora.layers)} layers, ranks {lora.ranks()}{lost}"
    if to in DELTAS and kind in (*DELTAS, "adapter"):
        delta = own.delta(source) if kind == "adapter" else custom_diffusion.read(source, words)
        custom_diffusion.write(output, delta, "ldm" if to == "delta" else "diffusers")
        return f"{output}  {len(delta.weights)} weights, words {', '.join(delta.tokens) or 'none'}"
    if to in ("words", "words-ldm"):
        learnt = words_in(source, kind, words)
        if not learnt:
            raise InputError(f"{source} holds no learnt words")
        return write_words(learnt, output, to)
    if to in ("checkpoint", "diffusers-model") and kind in ("checkpoint", "diffusers-model"):
        weights = read_model(source)
        if to == "checkpoint":
            write_checkpoint(output, weights)
        else:
            diffusers_model.write_folder(output, weights, params_of(options.config), source)
        return f"{output}  {len(weights)} tensors"
    raise InputError(f"{source} is {KINDS[kind]}: it cannot become {to}")


def write_words(words: dict, output: Path, to: str) -> str:
    """Write words for diffusers or for LDM."""
    from ldm.interchange import embeddings

    if to == "words-ldm":
        embeddings.write_ldm(output, words)
        return f"{output}  {', '.join(words)}"
    files = embeddings.write_diffusers(output, words)
    return f"{', '.join(map(str, files))}  {', '.join(words)}"


def convert_delta(options: argparse.Namespace) -> str:
    """The published modes."""
    from ldm.interchange import apply, custom_diffusion, embeddings
    from ldm.interchange.command import read_model, to_be_written, write_checkpoint

    if not options.delta_ckpt or not options.ckpt:
        raise InputError(f"--mode {options.mode} needs --ckpt and --delta_ckpt")
    source = Path(options.delta_ckpt)
    delta = custom_diffusion.read(source, custom_diffusion.split_words(options.modifier_token))
    if not options.mode.endswith("-to-webui"):
        to_ldm = options.mode == "diffuser-to-compvis"
        output = to_be_written(source.with_name("delta.ckpt" if to_ldm else "delta.bin"), options.force)
        custom_diffusion.write(output, delta, "ldm" if to_ldm else "diffusers")
        return f"{output}  {len(delta.weights)} weights, words {', '.join(delta.tokens) or 'none'}"
    output = to_be_written(source.with_name(options.modelname), options.force)
    files = {word: to_be_written(source.with_name(f"{word}.pt"), options.force) for word in delta.tokens}
    weights = read_model(options.ckpt)
    write_checkpoint(output, apply.merged(weights, custom_diffusion.changes(delta, weights, str(source))))
    for word, file in files.items():
        embeddings.write_ldm(file, {word: delta.tokens[word]})
    return "  ".join(map(str, [output, *files.values()]))
