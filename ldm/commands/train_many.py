"""Train several configs and subjects at once over one copy of the base model.

    ldm train-many -t --base configs/sd-mini/attn2o-ffni.yaml configs/sd-mini/attn1i-transo.yaml \\
        --data_root photos/rex photos/tom --class_word dog cat --reg_data_root pictures/dogs pictures/cats
    ldm train-many -t -r logs/<folder>            # go on with all of them

Every config is trained on every subject. K trainings take one base, K times the activations and one call of the UNet.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.train.options import add_dreambooth, sorted_out


def add_arguments(p: Parser) -> None:
    add_dreambooth(p, several=True)


def run(options: argparse.Namespace) -> None:
    options, trainer_options, overrides = sorted_out(options)
    from ldm.train import many

    parts, folder = many.plan(options, trainer_options, overrides)
    if options.train and (line := many.finished(parts, folder)):
        print(line)
        return
    if options.train:
        many.train(parts, folder, options.num_class_images)
    print("\n".join(str(part.checkpoints) for part in parts))
    if not options.train:
        print(f"{len(parts)} trainings planned, nothing trained: add -t")
