"""Tune a latent diffusion model on a few photographs of a subject (DreamBooth), by adapters at named positions.

python main_dream_booth.py --base configs/sd-inject-dreambooth/attn2o-ffni.yaml -t --gpus 0,
    --actual_resume model.ckpt --data_root photos --reg_data_root class_pictures --class_word dog -n my-dog
"""

from __future__ import annotations

from ldm.cli import run_command
from ldm.train.options import dreambooth_parser, parse


def main(argv: list[str] | None = None) -> None:
    options, trainer_options, overrides = parse(dreambooth_parser(__doc__), argv)
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


if __name__ == "__main__":
    run_command(main)
