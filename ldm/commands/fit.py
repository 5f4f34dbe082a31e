"""Train any model of the LDM family from its config: autoencoders, latent diffusion, CLIP.

    ldm fit --base configs/sd-mini/train/autoencoder.yaml -t -n autoencoder
    ldm fit -t -r logs/<run>            # go on with it
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.train.options import add_training, sorted_out


def add_arguments(p: Parser) -> None:
    add_training(p)


def run(options: argparse.Namespace) -> None:
    options, trainer_options, overrides = sorted_out(options)
    from ldm.train import from_config
    from ldm.train.run_folder import finished, outcome

    run = from_config.plan(options, trainer_options, overrides)
    if not options.train:
        print(from_config.report(run))
        return
    if line := finished(run):
        print(line)
        return
    if from_config.train(run, test=not options.no_test).is_global_zero:
        print(outcome(run))
