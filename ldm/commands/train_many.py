"""Train several configs and subjects at once over one copy of the base model, in one process.

    python scripts/train_many.py -t --base configs/sd-mini/attn2o-ffni.yaml configs/sd-mini/attn1i-transo.yaml
        --data_root photos/rex photos/tom --class_word dog cat --reg_data_root pictures/dogs pictures/cats
    python scripts/train_many.py -t -r logs/<folder>            # go on with all of them

Every config is trained on every subject. K trainings take one base, K times the activations and one call of the UNet.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout as well

from ldm.cli import run_command  # noqa: E402
from ldm.train.options import dreambooth_parser, parse  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    options, trainer_options, overrides = parse(dreambooth_parser(__doc__, several=True), argv)
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


if __name__ == "__main__":
    run_command(main)
