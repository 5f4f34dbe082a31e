"""Train any model of the LDM family from its config: autoencoders, latent diffusion, CLIP.

    python scripts/train.py --base configs/sd-mini/train/autoencoder.yaml -t -n autoencoder
    python scripts/train.py -t -r logs/<run>            # go on with it
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout as well

from ldm.cli import run_command  # noqa: E402
from ldm.train.options import parse, parser  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    options, trainer_options, overrides = parse(parser(__doc__), argv)
    from ldm.train import general
    from ldm.train.run import finished, outcome

    run = general.plan(options, trainer_options, overrides)
    if not options.train:
        print(f"nothing trained: add -t to train in {run.folder}")
        return
    if line := finished(run):
        print(line)
        return
    if general.train(run, test=not options.no_test).is_global_zero:
        print(outcome(run))


if __name__ == "__main__":
    run_command(main)
