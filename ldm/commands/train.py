"""Tune a model on a few photographs of a subject (DreamBooth), by adapters or another family.

    ldm train --base configs/sd-inject-dreambooth/attn2o-ffni.yaml -t --gpus 0,
        --actual_resume model.ckpt --data_root photos --reg_data_root class_pictures --class_word dog -n my-dog
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.train.options import add_dreambooth, sorted_out


def add_arguments(p: Parser) -> None:
    add_dreambooth(p)


def run(options: argparse.Namespace) -> None:
    options, trainer_options, overrides = sorted_out(options)
    from ldm.train import dreambooth
    from ldm.train.run import finished, outcome

    run = dreambooth.plan(options, trainer_options, overrides)
    if not options.train:
        print(dreambooth.report(run) + "\nnothing trained: add -t")
        return
    if line := finished(run):
        print(line)
        return
    if dreambooth.train(run, options).is_global_zero:
        print(outcome(run))
