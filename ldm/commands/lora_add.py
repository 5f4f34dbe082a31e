"""Merge LoRAs with each other, or one into a model.

    ldm lora-add one.safetensors two.safetensors both.safetensors --alpha_1 0.5 --alpha_2 0.5 --mode sum --rank 8
    ldm lora-add models/sd-v1-4.ckpt one.safetensors merged.ckpt 0.8 --mode upl-ckpt-v2

Alphas may follow the paths (PATH_1 PATH_2 OUTPUT_PATH ALPHA_1 ALPHA_2). `--alpha A` is that of the program's earlier
versions: A for the first and 1 - A for the second; in upl the LoRA's.

Modes:
  lpl          average the factors, ups and downs separately, as the published program does, which is not the average
               of what the LoRAs do; two cloneofsimo files of equal ranks
  ljl          put the factors side by side: what the LoRAs do adds up, and so do their ranks; alphas are ignored;
               two cloneofsimo files
  sum          alpha_1 * first + alpha_2 * second, exactly, or with --rank as well as that rank allows; any formats
  upl          path_1 is a model, path_2 a LoRA (or a folder with one of its kin): a diffusers folder with
               alpha_1 * LoRA in its weights; alpha_2 is unused
  upl-ckpt-v2  the same as one checkpoint
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import Parser, add_files, boolean, in_order, underscores
from ldm.errors import InputError
from ldm.interchange.formats import written
from ldm.models.bases import DEFAULT

MODES = ("lpl", "ljl", "sum", "upl", "upl-ckpt-v2")
PATHS = ("path_1", "path_2", "output_path")


def add_arguments(p: Parser) -> None:
    p.respell = underscores
    p.add_argument("paths", nargs="*", metavar="PATH_1 PATH_2 OUTPUT_PATH [ALPHA_1 [ALPHA_2]]")
    for name in PATHS:
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    p.add_argument("--alpha_1", type=float, help="weight of the first, or of the LoRA in upl (default 0.5)")
    p.add_argument("--alpha_2", type=float, help="weight of the second (default 0.5)")
    p.add_argument("--alpha", type=float, metavar="A", help="short for --alpha_1 A --alpha_2 1-A")
    p.add_argument("--mode", choices=MODES, default="lpl", help="(default lpl)")
    p.add_argument("--with_text_lora", type=boolean, nargs="?", const=True, default=False,
                   help="for .pt files: their text encoder's lists too (.safetensors have theirs inside)")  # fmt: skip
    p.add_argument("--rank", type=int, help="for sum: reduce to this rank by SVD")
    p.add_argument("--format", choices=written("lora"),
                   help="of the output of sum (default: that of the first file)")  # fmt: skip
    add_files(p, DEFAULT.config)


def run(options: argparse.Namespace) -> None:
    named = {name: getattr(options, name) for name in PATHS}
    paths = list(named.values()).count(None)
    options.alpha_1, options.alpha_2 = alphas(options, options.paths[paths:])
    one, two, output = in_order(options.paths[:paths], named, " ".join(PATHS))
    if options.rank is not None and options.rank < 1:
        raise InputError(f"expected --rank >= 1, got {options.rank}")
    merge = {"lpl": numbered, "ljl": numbered, "sum": weighted, "upl": into_model, "upl-ckpt-v2": into_model}
    print(merge[options.mode](one, two, Path(output), options))


def alphas(options: argparse.Namespace, values: Sequence[str]) -> tuple[float, float]:
    """The two weights, from what follows the paths (`values`), `--alpha_1` and `--alpha_2`, or `--alpha`.

    Raises `InputError` for a value that is no number and for a weight that is given twice.
    """
    try:
        given = [float(value) for value in values]
    except ValueError:
        raise InputError(f"expected numbers (ALPHA_1 ALPHA_2) after the paths, got {' '.join(values)}") from None
    named = [value for value in (options.alpha_1, options.alpha_2) if value is not None]
    if len(given) > 2 or sum(map(bool, (given, named, options.alpha is not None))) > 1:
        raise InputError("expected one or two alphas: after the paths, as --alpha_1 and --alpha_2, or as --alpha")
    if options.alpha is not None:
        return options.alpha, 1 - options.alpha
    first, second = [*given, *[None] * (2 - len(given))] if given else (options.alpha_1, options.alpha_2)
    return 0.5 if first is None else first, 0.5 if second is None else second


def numbered(one: str, two: str, output: Path, options: argparse.Namespace) -> str:
    """lpl and ljl, which need no model."""
    from ldm.interchange import cloneofsimo as cs
    from ldm.interchange import identify
    from ldm.interchange.command import to_be_written

    kinds = {identify(path) for path in (one, two)}
    if kinds not in ({"cloneofsimo"}, {"cloneofsimo-pt"}):
        raise InputError(
            f"{options.mode} works on two cloneofsimo files of one kind, got {', '.join(sorted(kinds))}: use sum"
        )
    is_list = kinds == {"cloneofsimo-pt"}
    to_be_written(output, options.force, *kinds)
    contents = [(cs.read_pt if is_list else cs.read_safetensors)(path) for path in (one, two)]
    if is_list and not options.with_text_lora:
        for content in contents:
            content.factors.pop("text_encoder", None)
    merged = cs.joined(contents) if options.mode == "ljl" else cs.averaged(*contents, options.alpha_1, options.alpha_2)
    (cs.write_pt if is_list else cs.write_safetensors)(output, merged)
    return f"{output}  ranks {cs.numbered(merged).ranks()}, words {', '.join(merged.tokens) or 'none'}"


def weighted(one: str, two: str, output: Path, options: argparse.Namespace) -> str:
    """The honest sum, between any formats."""
    from ldm.interchange import by_name, cloneofsimo, open_file, read_lora, recognise
    from ldm.interchange.command import config_for, skeleton, to_be_written, write_lora
    from ldm.interchange.lora import weighted_sum

    files = [open_file(path) for path in (one, two)]
    kinds = [recognise(file).name for file in files]
    kind = options.format or (kinds[0] if kinds[0] in written("lora") else "kohya")
    to_be_written(output, options.force, kind)
    weights = (options.alpha_1, options.alpha_2)
    contents = [cloneofsimo.read_safetensors(file) for file in files] if {kind, *kinds} == {"cloneofsimo"} else []
    if contents and cloneofsimo.alike(*contents):  # numbers tell the layers: no model is needed
        merged = weighted_sum([cloneofsimo.numbered(content) for content in contents], weights, options.rank)
        cloneofsimo.write_safetensors(output, cloneofsimo.renumbered(merged, contents))
    else:
        model = skeleton(config_for(options.config, *files))
        merged = weighted_sum([read_lora(file, model) for file in files], weights, options.rank)
        write_lora(output, merged, model, kind)
    words = ", ".join(merged.tokens)
    if words and not by_name(kind).keeps_words:
        return f"{output}  ranks {merged.ranks()}; the words {words} are not in it: convert each file --to words"
    return f"{output}  ranks {merged.ranks()}, words {words or 'none'}"


def into_model(model_path: str, lora_path: str, output: Path, options: argparse.Namespace) -> str:
    """A LoRA's change in a model's own weights, for good."""
    from ldm.checkpoints import write_all
    from ldm.interchange import Context, by_name, embeddings, open_file, recognise, words_in
    from ldm.interchange.command import config_for, filled_model, read_model, to_be_written
    from ldm.interchange.contents import CONTENTS

    to_be_written(output, options.force)
    row, config = recognise(file := open_file(lora_path)), config_for(options.config, lora_path, model_path)
    weights = read_model(model_path, config)
    form, context = CONTENTS[row.form], Context(config=config, source=model_path)
    if form.folded is None:
        raise InputError(f"{lora_path} is {row.title}; expected a LoRA")
    tokens = words_in(file)
    value = row.read(form.name, file, context)
    merged = form.folded(
        value, weights, lambda: filled_model(config, weights, model_path), options.alpha_1, lora_path
    )
    beside = output.with_name(f"{output.stem}.words.safetensors")
    if tokens:
        to_be_written(beside, options.force)

    def write(path: Path) -> None:
        by_name("diffusers-model" if options.mode == "upl" else "checkpoint").write(path, merged, context)

    files = embeddings.diffusers_files(beside, tokens) if tokens else {}
    write_all({**files, output: write})
    if not tokens:
        return str(output)
    return f"{output}; the words {', '.join(tokens)} are in {', '.join(map(str, files))}"
