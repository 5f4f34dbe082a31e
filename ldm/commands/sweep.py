"""Train and score many configs, subjects and seeds: one row of a table for each.

    ldm sweep --base configs/sd-mini/attn2o-ffni.yaml route=attn2o-ffni,attn1i-attn2i seed=1,2 \\
        subject=photos/a,photos/b --class_word dog --reg_data_root photos/dogs --max_steps 200 --out sweeps/first
    ldm sweep configs/sweeps/positions-sd-mini.yaml --dry-run

A word is varied by word=value,value: route (or route=all), family, seed, subject, lr, steps, loss, mid_dim, scale,
method, form, and any key of a config by its dots. All other options are those of ldm train, the same for all trials.
The same command goes on with what is missing; see docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from ldm.cli import Parser, count, keep_rest
from ldm.errors import InputError
from ldm.evaluate.protocol import PROTOCOLS

FACTOR = re.compile(r"[A-Za-z_][\w.]*=")


def add_arguments(p: Parser) -> None:
    p.usage = "%(prog)s [YAML] [--base YAML] [word=value,value ...] --out DIR [options] [options of ldm train]"
    p.allow_abbrev = False
    p.rest = keep_rest
    p.add_argument("-b", "--base", metavar="YAML", help="config that is varied")
    p.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder of the sweep (default: sweeps/<name of YAML>)")
    p.add_argument("--dry-run", "--dry_run", action="store_true",
                   help="list trials, weights that learn, memory and time, by a few measured steps")  # fmt: skip
    p.add_argument("--retry", action="store_true", help="try failed trials again")
    p.add_argument("--any_code", action="store_true",
                   help="let results of another version of this code count as finished")  # fmt: skip
    p.add_argument("--together", type=count, default=8, metavar="K", help="trials trained at once (default 8)")
    p.add_argument("--every", type=count, metavar="N", help="score every N steps, too (default: at the end)")
    p.add_argument("--keep", type=kept, default=("pictures",), metavar="pictures,adapters|nothing",
                   help="what stays of each trial beside its row (default: pictures)")  # fmt: skip
    engine = p.add_argument_group("engine")
    engine.add_argument("--engine", choices=("ray", "local"), help="(default: ray where it is installed)")
    engine.add_argument("--address", help="of a Ray cluster, or auto (default: Ray on this machine)")
    engine.add_argument("--workers", type=count, help="processes that train (default: one per GPU, or per --threads)")
    engine.add_argument("--threads", type=count, help="CPU threads of each worker (default 1 without a GPU, else 4)")
    engine.add_argument("--gpus_per_worker", type=float, metavar="G",
                        help="share of a GPU (default 1 where there are GPUs)")  # fmt: skip
    early = p.add_argument_group("stopping early")
    early.add_argument("--scheduler", choices=("asha",), help="stop trials that are behind (Ray Tune's ASHA)")
    early.add_argument("--grace", type=count, help="steps before the first comparison (default: a quarter)")
    early.add_argument("--factor", type=count, default=2, help="the best 1/factor go on (default 2)")
    scores = p.add_argument_group("scores")
    scores.add_argument("--protocol", choices=PROTOCOLS,
                        help="what is drawn, as ldm evaluate has it (default: mini on SD-mini, else fast)")  # fmt: skip
    scores.add_argument("--prompts", action="append", metavar="TEXT|LIST|FILE",
                        help="template with {} for the subject; repeatable; or a list or file, once")  # fmt: skip
    scores.add_argument("--first", type=count, metavar="N", help="of the prompts, the first N alone")
    scores.add_argument("--per_prompt", type=count, help="pictures of each prompt")
    scores.add_argument("--per_class", type=int, help="pictures of the class, for prior drift; 0: none")
    scores.add_argument("--sampler", help="sampler of ldm sample")
    scores.add_argument("--sample_steps", type=count, help="sampling steps")
    scores.add_argument("--guidance", type=float, help="guidance scale")
    scores.add_argument("--network", action="append", metavar="NAME",
                        help="network that compares, as ldm evaluate has them; repeatable")  # fmt: skip


def kept(text: str) -> tuple[str, ...]:
    """argparse type for `pictures`, `adapters`, both with a comma, or `nothing`."""
    names = () if text == "nothing" else tuple(text.split(","))
    if not set(names) <= {"pictures", "adapters"}:
        raise argparse.ArgumentTypeError(f"expected pictures, adapters, both with a comma, or nothing, got {text!r}")
    return names


def check_options(train: list[str]) -> None:
    """Raises `InputError` for an option that neither the sweep nor ldm train has, with the nearest of both."""
    from ldm import schema
    from ldm.errors import did_you_mean
    from ldm.train.options import dreambooth_parser

    own = Parser()
    add_arguments(own)
    train_options = [*dreambooth_parser("")._option_string_actions, *(f"--{n}" for n in schema.Trainer.model_fields)]
    for name in (word.partition("=")[0] for word in train if word.startswith("--")):
        if name not in train_options and "." not in name:
            raise InputError(
                f"unknown option {name}{did_you_mean(name, [*own._option_string_actions, *train_options])}"
            )


def split(rest: list[str]) -> tuple[list[str], dict[str, list[Any]], list[str]]:
    """Words that are no options of the sweep: files, what varies, and options of ldm train with their values."""
    from ldm.study.words import check_word, values_of

    files, factors, train = [], {}, []
    for before, word in zip(["", *rest], rest, strict=False):
        if FACTOR.match(word):
            name, _, values = word.partition("=")
            check_word(name)
            if name in factors:
                raise InputError(f"{name} is given twice; name its values in one word: {name}=1,2")
            factors[name] = values_of(values)
        elif word.endswith((".yaml", ".yml")) and not before.startswith("-"):
            files.append(word)
        else:
            train.append(word)
    check_options(train)
    if len(files) > 1:
        raise InputError(f"expected one YAML file of a sweep, got {', '.join(files)}")
    return files, factors, train


def run(options: argparse.Namespace) -> int | None:
    files, factors, train = split(options.rest)
    from ldm.study import plan, sweep

    file = plan.read_file(files[0]) if files else plan.SweepFile()
    out = options.out or (Path("sweeps") / Path(files[0]).stem if files else None)
    if out is None:
        raise InputError("name the folder of the sweep with --out")
    if options.every:
        train += [f"lightning.modelcheckpoint.params.every_n_train_steps={options.every}"]
    asked = plan.asked(file, options.base, factors, train, out, evaluation(options))
    threads, workers, gpus = resources(options)
    how = sweep.How(
        together=options.together, retry=options.retry, any_code=options.any_code, keep=options.keep,
        asha=(options.grace, options.factor) if options.scheduler else None,
    )  # fmt: skip
    if options.dry_run:
        print(told(sweep.forecast(asked, how, threads, workers)))
        return None
    command = "ldm sweep " + shlex.join(sys.argv[2:])
    path, statuses = sweep.run(asked, how, lambda: engine(options, threads, workers, gpus), command)
    print(f"{path}: " + ", ".join(f"{count} {status}" for status, count in statuses.items()))
    if "failed" in statuses:
        print("reasons are in the column reason; --retry tries failed trials again")
    return int("failed" in statuses)


def evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the scores."""
    prompts = options.prompts
    if prompts and len(prompts) == 1 and "{}" not in prompts[0]:
        (prompts,) = prompts  # a list or a file
    given = {
        "protocol": options.protocol, "prompts": prompts, "first": options.first, "per_prompt": options.per_prompt,
        "per_class": options.per_class, "sampler": options.sampler, "steps": options.sample_steps,
        "scale": options.guidance, "networks": options.network,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def resources(options: argparse.Namespace) -> tuple[int, int, float]:
    """Threads of a worker, workers, and the share of a GPU that each has."""
    import torch

    from ldm.devices import usable_cpus

    count = torch.cuda.device_count() if options.address is None else 0
    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else float(count > 0)
    threads = options.threads or (4 if gpus else 1)
    if options.address is not None and options.workers is None:
        raise InputError("--address: say with --workers how many processes train on the cluster")
    workers = options.workers or (max(1, int(count / gpus)) if gpus and count else max(1, usable_cpus() // threads))
    return threads, workers, gpus


def engine(options: argparse.Namespace, threads: int, workers: int, gpus: float) -> Any:
    """Ray where it is there or asked for, else this process."""
    from importlib.util import find_spec

    from ldm.study import engines

    kind = options.engine or ("ray" if find_spec("ray") or options.address else "local")
    if kind == "ray":
        return engines.OnRay(workers, threads, gpus, options.address)
    if options.engine is None:
        print("Ray is not installed: one worker, in this process; for more: pip install '.[sweep]'", file=sys.stderr)
    return engines.Local(threads)


def told(forecast: dict[str, Any]) -> str:
    """A forecast as text."""
    from ldm.study.live import duration

    lines = [
        f"{number:4}  {weights:>11,} weights  " + " ".join(f"{name}={value}" for name, value in settings.items())
        for number, (settings, weights) in enumerate(forecast["trials"])
    ]
    return "\n".join([
        *lines,
        f"{len(lines)} trials in {forecast['groups']} groups of up to {forecast['together']}",
        f"measured: {forecast['step']:.3f} s per step of a group, {forecast['score']:.1f} s for the scores of a trial, "
        f"{forecast['memory'] / 2**30:.2f} GiB in each worker",
        f"about {duration(forecast['seconds'])} on {forecast['workers']} workers, "
        f"{forecast['seconds_per_trial']:.1f} s per trial",
    ])  # fmt: skip
