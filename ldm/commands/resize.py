"""Lower the ranks of a LoRA: to a rank, or to what keeps a share of each layer's change.

    ldm resize lora.safetensors small.safetensors --rank 8
    ldm resize lora.safetensors small.safetensors --rank 32 --dynamic_method sv_fro --dynamic_param 0.9

Each layer keeps its largest singular values: at most --rank and, with a method,
  sv_ratio        those above the largest divided by the parameter
  sv_fro          the fewest that keep this share of the Frobenius norm
  sv_cumulative   the fewest whose sum is this share of the sum
as kohya's resize_lora.py counts them. Any format of LoRA goes in.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser, add_files
from ldm.errors import InputError
from ldm.interchange.formats import written
from ldm.models.bases import DEFAULT

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")  # of ldm.interchange.resize, whose import would slow --help


def add_arguments(p: Parser) -> None:
    p.add_argument("source", metavar="LORA")
    p.add_argument("output", metavar="OUTPUT")
    add_cut(p)
    p.add_argument("--to", choices=written("lora"), metavar="FORMAT",
                   help=f"{', '.join(written('lora'))} (default: that of the input, or kohya)")  # fmt: skip
    p.add_argument("--verbose", action="store_true", help="the rank and the kept share of each layer")
    add_files(p, DEFAULT.config)


def add_cut(p: argparse._ActionsContainer) -> None:
    """The options that say which ranks to keep, see `cut_of`."""
    p.add_argument("--rank", "--new_rank", type=int, help="the highest rank")
    p.add_argument("--conv_rank", "--new_conv_rank", type=int, help="that of 3 x 3 convolutions (default: --rank)")
    p.add_argument("--dynamic_method", choices=METHODS, help="how many singular values each layer keeps")
    p.add_argument("--dynamic_param", type=float, help="of the method: a ratio of at least 1, or a share up to 1")
    for method in METHODS:
        p.add_argument(f"--{method}", type=float, metavar="X", help=f"short for --dynamic_method {method} and its X")


def cut_of(options: argparse.Namespace):
    """The `Cut` that the options ask for. Raises `InputError` for a method without parameter, and for several."""
    from ldm.interchange.resize import Cut

    short = [(method, value) for method in METHODS if (value := getattr(options, method)) is not None]
    if options.dynamic_method is not None and options.dynamic_param is None:
        raise InputError(f"--dynamic_method {options.dynamic_method} needs --dynamic_param")
    if options.dynamic_method is not None:
        short.append((options.dynamic_method, options.dynamic_param))
    elif options.dynamic_param is not None:
        raise InputError("--dynamic_param needs --dynamic_method")
    if len(short) > 1:
        raise InputError(f"expected one method, got {' and '.join(method for method, _ in short)}")
    return Cut(options.rank, options.conv_rank, *(short[0] if short else ()))


def run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm.interchange import open_file, read_lora, recognise
    from ldm.interchange.command import config_for, skeleton, to_be_written, told_words, write_lora
    from ldm.interchange.resize import resized_lora

    how = cut_of(options)
    if not how:
        raise InputError("expected --rank, or --dynamic_method with --dynamic_param")
    kind = recognise(file := open_file(options.source)).name
    kind = options.to or (kind if kind in written("lora") else "kohya")
    output = to_be_written(options.output, options.force, kind)
    model = skeleton(config_for(options.config, file))
    lora = read_lora(file, model)
    if not lora.layers:
        raise InputError(f"{options.source} holds no LoRA")
    small, shares = resized_lora(lora, how, lambda layers: tqdm(layers, desc="layers"))
    write_lora(output, small, model, kind)
    if options.verbose:
        for name, share in shares.items():
            print(f"{name}  rank {lora.layers[name].rank} -> {small.layers[name].rank}, {share:.1%} of the norm")
    mean = sum(shares.values()) / len(shares)
    print(f"{output}  ranks {lora.ranks()} -> {small.ranks()}, {mean:.1%} of the norm kept{told_words(kind, small)}")
