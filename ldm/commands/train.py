"""Tune a model on a few photographs of a subject (DreamBooth), by adapters or another family.

    ldm train --base configs/sd-inject-dreambooth/attn2o-ffni.yaml -t --gpus 0, \\
        --actual_resume model.ckpt --data_root photos --reg_data_root class_pictures --class_word dog -n my-dog
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm.cli import Parser
from ldm.evaluate.protocol import PROTOCOLS
from ldm.train.options import add_dreambooth, sorted_out


def add_arguments(p: Parser) -> None:
    add_dreambooth(p)
    p.add_argument("--evaluate", nargs="?", const="dreambooth", choices=PROTOCOLS, metavar="|".join(PROTOCOLS),
                   help="score the last checkpoint at the end, as ldm evaluate does, and log it")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    options, trainer_options, overrides = sorted_out(options)
    from ldm.train import dreambooth
    from ldm.train.run_folder import finished, outcome

    run = dreambooth.plan(options, trainer_options, overrides)
    if not options.train:
        print(dreambooth.report(run) + "\nnothing trained: add -t")
        return
    protocol = planned_evaluation(run, options.evaluate) if options.evaluate else None
    if line := finished(run):
        print(line)
        if protocol:
            evaluate(run, protocol, [])
        return
    trainer = dreambooth.train(run, options)
    if trainer.is_global_zero:
        print(outcome(run))
        if protocol:
            evaluate(run, protocol, trainer.loggers)


def planned_evaluation(run: Any, name: str) -> Any:
    """The protocol of that name, if its networks are there and the run has a subject. Raises `InputError`."""
    from ldm.evaluate import runs

    runs.subject_is_known(run)
    return runs.networks_of(run, PROTOCOLS[name])


def evaluate(run: Any, protocol: Any, loggers: list[Any]) -> None:
    """Score the last checkpoint of a run: `scores.json` in its folder, and `score/<column>` in its loggers."""
    from ldm.commands.evaluate import report
    from ldm.evaluate import runs, tables

    scores = runs.of_run(run, protocol)
    tables.save(run.folder / "scores.json", [scores])
    for logger in loggers:
        logger.log_metrics({f"score/{name}": value for name, value in scores.row().items() if value is not None},
                           scores.step)  # fmt: skip
        logger.finalize("success")
    print(report(scores) + f"\n{run.folder / 'scores.json'}")
