"""Train a LoRA by DreamBooth with the flags of cloneofsimo's train_lora_dreambooth.py.

    ldm lora-dreambooth --pretrained_model_name_or_path models/sd-v1-5.ckpt --instance_data_dir photos \\
        --instance_prompt "style of sks" --output_dir out --learning_rate 1e-4 --max_train_steps 3000

writes <output_dir>/lora_weight.safetensors and lora_weight.pt (with lora_weight.text_encoder.pt), as --output_format
says, and the run beside them. With --with_prior_preservation, --class_data_dir is filled up by the base first.
Overrides of the config may follow: data.params.num_workers=0.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

from ldm.cli import Parser, boolean, keep_rest, seed_number, text
from ldm.errors import InputError
from ldm.lr_scheduler import NamedSchedule

log = logging.getLogger(__name__)

PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
FORMATS = {"safe": ("cloneofsimo",), "pt": ("cloneofsimo-pt",), "both": ("cloneofsimo", "cloneofsimo-pt")}
ENDINGS = {"cloneofsimo": ".safetensors", "cloneofsimo-pt": ".pt"}
# Published arguments that change nothing here; which of them were given is said.
IGNORED = ("revision", "tokenizer_name", "pretrained_vae_name_or_path", "color_jitter", "center_crop", "use_xformers",
           "sample_batch_size", "use_8bit_adam", "push_to_hub", "hub_token", "hub_model_id", "logging_dir",
           "local_rank")  # fmt: skip


def add_arguments(p: Parser) -> None:
    p.allow_abbrev, p.rest = False, keep_rest  # the training reads or refuses the rest
    p.add_argument("--instance_data_dir", required=True, metavar="DIR", help="photographs of the subject")
    p.add_argument("--instance_prompt", required=True, type=text, help="what they show: a photo of sks dog")
    p.add_argument("--class_data_dir", metavar="DIR", help="class pictures")
    p.add_argument("--class_prompt", type=text, help="what they show: a photo of a dog")
    p.add_argument("--pretrained_model_name_or_path", required=True, metavar="BASE",
                   help="a checkpoint, a diffusers folder, or the name of one in the hub's cache")  # fmt: skip
    p.add_argument("--output_dir", default="text-inversion-model", metavar="DIR", help="(default %(default)s)")
    p.add_argument("--config", default="configs/lora/attention.yaml", help="(default %(default)s)")
    p.add_argument("--output_format", choices=tuple(FORMATS), default="both", help="(default both)")
    p.add_argument("--lr_scheduler", choices=tuple(NamedSchedule.WAYS), default="constant", help="(default constant)")
    p.add_argument("--mixed_precision", choices=tuple(PRECISIONS), default="no", help="(default no)")
    p.add_argument("--seed", type=seed_number, default=42)
    p.add_argument("--device", help="cuda:1, cuda (all), mps or cpu (default: the best there is)")
    p.add_argument("--force", action="store_true", help="overwrite what exists")
    p.add_argument("--max_train_steps", type=int, help="(default: --num_train_epochs)")
    for name, value in (
        ("resolution", 512), ("train_batch_size", 4), ("num_train_epochs", 1), ("gradient_accumulation_steps", 1),
        ("learning_rate", 1e-4), ("learning_rate_text", 5e-6), ("lr_warmup_steps", 500), ("lora_rank", 4),
        ("save_steps", 500), ("prior_loss_weight", 1.0), ("num_class_images", 100), ("adam_beta1", 0.9),
        ("adam_beta2", 0.999), ("adam_weight_decay", 1e-2), ("adam_epsilon", 1e-8), ("max_grad_norm", 1.0),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=type(value), default=value, help=f"(default {value})")
    for name, help_text in (
        ("with_prior_preservation", "train on class pictures, too"), ("train_text_encoder", "LoRA on it, too"),
        ("scale_lr", "multiply rates by pictures per step"), ("gradient_checkpointing", "less memory, slower"),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=boolean, nargs="?", const=True, default=False, help=help_text)
    for name in ("resume_unet", "resume_text_encoder", *IGNORED):
        p.add_argument(f"--{name}", nargs="?", const="True", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    from ldm.interchange import own
    from ldm.interchange.command import skeleton, to_be_written, write_lora

    if given.resume_unet or given.resume_text_encoder:
        raise InputError("--resume_unet, --resume_text_encoder: go on with a run by ldm train -t -r <its folder>")
    if given.with_prior_preservation and not (given.class_data_dir and given.class_prompt):
        raise InputError("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if ignored := [f"--{name}" for name in IGNORED if getattr(given, name) is not None]:
        log.warning("%s: without effect here", ", ".join(ignored))
    outputs = {kind: Path(given.output_dir) / f"lora_weight{ENDINGS[kind]}" for kind in FORMATS[given.output_format]}
    for kind, output in outputs.items():
        to_be_written(output, given.force, kind)
    with tempfile.TemporaryDirectory() as work:
        folder = train(given, Path(work))
    if folder is None:
        return
    lora, model = own.lora(folder), skeleton(given.config)
    for kind, output in outputs.items():
        write_lora(output, lora, model, kind)
    print(f"{', '.join(map(str, outputs.values()))}  {len(lora.layers)} layers; the run is in {folder.parent.parent}")


def train(given: argparse.Namespace, work: Path) -> Path | None:
    """Train; the folder with what was learnt last, or None in all processes but the first."""
    from omegaconf import OmegaConf

    from ldm.commands.lora_pti import device_options
    from ldm.train import dreambooth
    from ldm.train.options import dreambooth_parser, parse

    OmegaConf.save(OmegaConf.create(config_of(given)), work / "lora.yaml")
    words = [
        "--base", given.config, str(work / "lora.yaml"), "-t", "--no-test", "--actual_resume",
        given.pretrained_model_name_or_path, "--data_root", given.instance_data_dir, "--logdir", given.output_dir,
        "-n", "lora", "--seed", str(given.seed), *device_options(given.device or "auto"), *given.rest,
    ]  # fmt: skip
    if given.with_prior_preservation:
        words += ["--reg_data_root", given.class_data_dir, "--class_word", given.class_prompt]
        words += ["--num_class_images", str(given.num_class_images)]
    run = dreambooth.plan(*(parsed := parse(dreambooth_parser(__doc__), words)))
    if not dreambooth.train(run, parsed[0]).is_global_zero:
        return None
    return max(run.checkpoints.glob("*-adapters"), key=lambda path: int(path.name.partition("-")[0]))


def config_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the arguments change in the config."""
    from ldm.commands.custom_diffusion import step_params
    from ldm.commands.lora_pti import ATTENTION, TEXT

    rates = {"unet": given.learning_rate} | ({"text": given.learning_rate_text} if given.train_text_encoder else {})
    pictures = given.train_batch_size * given.gradient_accumulation_steps if given.scale_lr else 1
    loras = [
        {
            "target": "ldm.tuning.lora.LoRA",
            "params": {"targets": {"unet": ATTENTION, "text": TEXT}[part], "rank": given.lora_rank,
                       "alpha": given.lora_rank, "seed": given.seed},
            "learning_rate": rate * pictures,
        }
        for part, rate in rates.items()
    ]  # fmt: skip
    # the prompts are whole: the subject's has no class word behind it, that of the class no template around it
    own = {"identifier": given.instance_prompt, "templates": "{identifier}", "size": given.resolution}
    prior = {"templates": "{}", "size": given.resolution} if given.with_prior_preservation else None
    trainer: dict[str, Any] = {
        "accumulate_grad_batches": given.gradient_accumulation_steps, "gradient_clip_val": given.max_grad_norm,
        "precision": PRECISIONS[given.mixed_precision], "max_steps": given.max_train_steps or -1,
    }  # fmt: skip
    trainer |= {} if given.max_train_steps else {"max_epochs": given.num_train_epochs}
    return {
        "model": {
            "base_learning_rate": given.learning_rate * pictures,
            "params": {
                "train_level": [],
                "tuning": loras,
                **step_params(given),
            },
        },
        "data": {"params": {"batch_size": given.train_batch_size, "train": {"params": own}, "validation": None,
                            "reg": prior and {"params": prior}}},
        "lightning": {"modelcheckpoint": {"params": {"every_n_train_steps": given.save_steps}}, "trainer": trainer},
    }  # fmt: skip
