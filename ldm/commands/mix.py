"""Mix whole checkpoints: a weighted sum, or one model plus the difference of two others.

    ldm mix one.safetensors two.safetensors --weights 0.7 0.3 --out mixed.safetensors
    ldm mix sd-v1-5-inpainting.ckpt --add tuned.safetensors --subtract sd-v1-5.ckpt --out tuned-inpainting.safetensors

Weights are summed tensor by tensor from files that are mapped into memory, so that no model has to fit into it. What
only the first model has stays as it is there. An inpainting model as the first takes the others' changes in the
channels that they have.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.devices import PRECISIONS
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints; with --add and --subtract a single one")
    p.add_argument("--weights", nargs="+", type=float, help="one for each model, with a sum of 1 (default: equal ones)")
    p.add_argument("--add", metavar="MODEL", help="a model whose difference from that of --subtract is added")
    p.add_argument("--subtract", metavar="MODEL", help="usually the base of the one that is added")
    p.add_argument("--strength", type=float, default=1.0, help="of the difference (default 1)")
    p.add_argument("--precision", choices=PRECISIONS, help="of the output (default: that of the first model)")
    p.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    p.add_argument("--force", action="store_true", help="overwrite what exists")


def factors(options: argparse.Namespace) -> tuple[list[str], list[float]]:
    """The models and their factors. Raises `InputError` for options that contradict each other."""
    if (options.add is None) != (options.subtract is None):
        raise InputError("--add and --subtract belong together: MODEL + strength * (add - subtract)")
    if options.add is not None:
        if len(options.models) != 1 or options.weights:
            raise InputError(f"--add and --subtract change one model, without --weights; got {len(options.models)}")
        return [*options.models, options.add, options.subtract], [1.0, options.strength, -options.strength]
    if len(options.models) < 2:
        raise InputError("expected two models or more, or one with --add and --subtract")
    weights = options.weights or [1 / len(options.models)] * len(options.models)
    if len(weights) != len(options.models):
        raise InputError(f"{len(weights)} --weights for {len(options.models)} models; expected one for each")
    if abs(sum(weights) - 1) > 1e-3:
        raise InputError(f"--weights have the sum {sum(weights):g}; expected 1, as any other scales the whole model")
    return options.models, weights


def run(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ldm.interchange import mixing
    from ldm.interchange.command import to_be_written

    models, weights = factors(options)
    output = to_be_written(options.out, options.force)
    if output.suffix != ".safetensors":
        raise InputError(f"--out {output}: expected a name that ends with .safetensors")
    dtype = getattr(torch, PRECISIONS[options.precision]) if options.precision else None
    sources = mixing.opened(models, weights)
    alone = mixing.write(output, sources, dtype, lambda names: tqdm(names, desc="tensors"))
    parts = " + ".join(f"{factor:g} {path}" for path, _, factor in sources)
    kept = f"; {len(alone)} tensors are the first model's alone, e.g. {alone[0]}" if alone else ""
    print(f"{output}  {parts}{kept}")
