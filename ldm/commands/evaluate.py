"""Score what was tuned, or pictures: CLIP-I, CLIP-T, DINO, prior drift, diversity.

    ldm evaluate logs/<run> --data_root photos/a --class_word dog --out scores.json
    ldm evaluate some_lora.safetensors --config configs/stable-diffusion/v1-inference.yaml --ckpt model.ckpt \\
        --data_root photos/a --class_word dog --out scores.csv
    ldm evaluate outputs/txt2img-samples/samples --data_root photos/a --against photos/dogs
    ldm evaluate delta.ckpt --ckpt model.ckpt --concepts_list concepts.json --out scores.csv

What the columns mean: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ldm.cli import Parser, add_allow_family, add_base_parts, count, seed_number, text
from ldm.errors import InputError
from ldm.evaluate.prompts import LISTS
from ldm.evaluate.protocol import PROTOCOLS

# Options that take the place of a protocol's values, by their names there.
OF_PROTOCOL = {
    "prompts": "prompts", "first": "first", "n_samples": "per_prompt", "class_samples": "per_class", "seed": "seed",
    "sampler": "sampler", "ddim_steps": "steps", "scale": "scale", "batch_size": "batch_size", "network": "networks",
}  # fmt: skip


def add_arguments(p: Parser) -> None:
    p.add_argument("path", type=Path, help="a run, a folder or file of what was tuned, or a folder of pictures")
    p.add_argument("--out", action="append", default=[], metavar="FILE",
                   help=".json: everything; .csv: a row per checkpoint; .npy: similar.npy; repeatable")  # fmt: skip
    what = p.add_argument_group("what it is compared with; a run says it itself")
    what.add_argument("--data_root", metavar="DIR", help="photographs of the subject")
    what.add_argument("--concepts_list", metavar="JSON",
                      help="several concepts, as in training, each with its own prompts: a row for each")  # fmt: skip
    what.add_argument("--class_word", type=text, help="what the subject is")
    what.add_argument("--identifier", type=text, help="its rare token (default: the run's, or sks)")
    what.add_argument("--class_template", type=text, help="caption of class pictures (default: the run's)")
    what.add_argument("--against", metavar="DIR", help="FID and KID to the pictures of this folder, too")
    what.add_argument("--network", action="append", metavar="NAME",
                      help="in whose eyes: a folder, a name on the hub, efficientnet-lite0; repeatable")  # fmt: skip
    what.add_argument("--download", action="store_true", help="fetch networks that are not in the hub's cache")
    what.add_argument("--cache", default="logs/features", metavar="DIR|off",
                      help="where vectors of pictures are kept (default logs/features)")  # fmt: skip

    model = p.add_argument_group("model; a run names its own")
    model.add_argument("--checkpoints", default="last", metavar="last|all|STEPS", help="of a run (default last)")
    model.add_argument("--config", help="config of the base model")
    model.add_argument("--ckpt", help="checkpoint of the base model; by default the one that the config names")
    add_base_parts(model)
    model.add_argument("--adapter_scale", type=finite, default=1.0, help="strength of what was tuned (default 1)")
    model.add_argument("--device", help="cuda, cuda:1, mps or cpu; by default the best there is")
    model.add_argument("--trust_config", action="store_true", help="import whatever the run's config names")
    add_allow_family(model)

    how = p.add_argument_group("what is drawn; without these, what the protocol has")
    how.add_argument("--protocol", choices=PROTOCOLS, default="dreambooth",
                     help="dreambooth: 25 prompts, 4 pictures each; fast: 4 prompts; mini: SD-mini")  # fmt: skip
    how.add_argument("--prompts", metavar=f"auto|{'|'.join(LISTS)}|FILE", help="auto: the class decides")
    how.add_argument("--first", type=count, metavar="N", help="only the first N prompts")
    how.add_argument("--n_samples", type=count, metavar="N", help="pictures of each prompt")
    how.add_argument("--class_samples", type=count_or_0, metavar="N", help="pictures of the class; 0: no prior drift")
    how.add_argument("--seed", type=seed_number, help="seed of the first picture; they count up")
    how.add_argument("--sampler", choices=("ddim", "plms", "dpm_solver"))
    how.add_argument("--ddim_steps", type=count, help="steps of any sampler")
    how.add_argument("--scale", type=finite, help="guidance scale")
    how.add_argument("--batch_size", type=count, help="pictures at once")
    how.add_argument("--pictures", type=Path, metavar="DIR", help="keep the pictures that are drawn")


def finite(given: str) -> float:
    """argparse type for a number that is one."""
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {given!r}")
    return number


def count_or_0(given: str) -> int:
    """argparse type for how many, or none."""
    return 0 if given == "0" else count(given)


def run(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from ldm.evaluate import runs, tables
    from ldm.evaluate.features import FeatureCache
    from ldm.interchange.base_choice import Choice

    for file in options.out:
        tables.check(file)
    given = {name: getattr(options, option) for option, name in OF_PROTOCOL.items()}
    given |= {"networks": options.network and tuple(options.network), "download": options.download}
    protocol = replace(
        PROTOCOLS[options.protocol], **{name: value for name, value in given.items() if value is not None}
    )
    question = runs.Question(
        options.path, protocol, options.data_root, options.class_word, options.identifier, options.class_template,
        options.checkpoints, options.config, options.ckpt, options.adapter_scale, options.against, options.pictures,
        options.device, verbose=True, choice=Choice.asked(options),
    )  # fmt: skip
    cache, asked = FeatureCache(None if options.cache == "off" else options.cache), [question]
    if options.concepts_list:
        if options.data_root or options.class_word or options.identifier:
            raise InputError("--concepts_list names the concepts; leave --data_root, --class_word, --identifier out")
        from ldm.evaluate.concepts import questions

        asked = questions(question, options.concepts_list)
    scores = []
    for found in (found for one in asked for found in runs.answers(one, cache)):
        scores.append(found)
        print(report(found), flush=True)
        for file in options.out:
            tables.save(file, scores)
    for file in options.out:
        print(file)


def report(scores) -> str:
    """A line for each value, with its interval."""
    percent = f"{100 * scores.protocol.get('level', 0.95):g} %"
    head = f"{scores.source}: {len(scores.pictures)} pictures, {scores.seconds:.1f} s; in brackets {percent} intervals"
    lines = [f"  {name:24} {value}" for name, value in scores.values.items()]
    return "\n".join([head, *lines, *(f"  {name:24} {value:.4g}" for name, value in scores.distances.items())])
