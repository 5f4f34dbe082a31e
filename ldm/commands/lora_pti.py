"""Pivotal tuning in one run: first the new words learn, then LoRA around them.

    ldm lora-pti --instance_data_dir photos --pretrained_model_name_or_path models/sd-v1-4.ckpt --output_dir out \\
        --placeholder_tokens "<s1>|<s2>" --initializer_tokens "dog|<rand-0.017>" --use_template object

writes <output_dir>/final_lora.safetensors (cloneofsimo's format, with the words inside) and the run beside it. LoRA is
on the UNet and the text encoder. The run is that of `ldm train` with --config; overrides of the config may follow:
data.params.num_workers=0.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

from ldm.cli import Parser, boolean, keep_rest, seed_number, underscores
from ldm.errors import InputError
from ldm.lr_scheduler import NamedSchedule
from ldm.models.bases import CONDITIONER, UNET

log = logging.getLogger(__name__)

PATHS = ("instance_data_dir", "pretrained_model_name_or_path", "output_dir")
TEMPLATES = {
    "object": ["a photo of {identifier}", "a picture of {identifier}", "a close-up of {identifier}", "{identifier}"],
    "style": [
        "a painting in the style of {identifier}",
        "a picture in the style of {identifier}",
        "{identifier} style",
    ],
}
INPAINTING = {"conditioning_key": "hybrid", "concat_keys": ["mask", "masked_image"], "masked_image_key": "masked_image",
              "finetune_keys": None}  # fmt: skip
ATTENTION = [f"{UNET}*.attn[12].to_*", f"{UNET}*.ff.net.0.proj"]  # Attention, GEGLU
RESIDUAL = [f"{UNET}*.{layer}" for layer in ("in_layers.2", "out_layers.3", "emb_layers.1", "skip_connection")]
TEXT = [f"{CONDITIONER}*.self_attn.*_proj"]
# Published arguments without a counterpart here, with the only value that is accepted...
FIXED = {"use_8bit_adam": "False", "log_wandb": "False", "pretrained_vae_name_or_path": "None", "revision": "None",
         "extra_args": "None"}  # fmt: skip
# ... and those that change nothing here; which of them were given is said.
IGNORED = ("color_jitter", "sample_batch_size", "cached_latents", "wandb_log_prompt_cnt", "wandb_project_name",
           "wandb_entity", "proxy_token", "enable_xformers_memory_efficient_attention", "lora_unet_target_modules",
           "lora_clip_target_modules")  # fmt: skip


def add_arguments(p: Parser) -> None:
    p.allow_abbrev, p.respell, p.rest = False, underscores, keep_rest  # the training reads or refuses the rest
    p.add_argument("--instance_data_dir", required=True, help="photographs of the subject")
    p.add_argument("--pretrained_model_name_or_path", required=True, help="a checkpoint, a diffusers folder, or "
                   "the name of one in the hub's cache")  # fmt: skip
    p.add_argument("--output_dir", required=True)
    p.add_argument("--config", default="configs/textual-inversion/pivotal.yaml", help="(default %(default)s)")
    p.add_argument("--placeholder_tokens", default="", help="the new words, joined by |")
    p.add_argument("--placeholder_token_at_data", metavar="A|B", help="B stands for the subject in captions")
    p.add_argument("--initializer_tokens", help="for each word: a known one, <rand-0.017> (the default) or <zero>")
    p.add_argument("--use_template", choices=tuple(TEMPLATES), help="captions (default: those of the config)")
    p.add_argument("--class_word", help="follows the words in the captions of the config: <s1> dog (default: nothing)")
    p.add_argument("--out_name", default="final_lora", help="name of the LoRA (default final_lora)")
    p.add_argument("--seed", type=seed_number, default=42)
    p.add_argument("--resolution", type=int, help="pixels (default: those of the config)")
    p.add_argument("--device", help="cuda:1, cuda (all), mps or cpu (default: the best there is)")
    p.add_argument("--force", action="store_true", help="overwrite what exists")
    for name, value in (
        ("train_batch_size", 1), ("max_train_steps_tuning", 1000), ("max_train_steps_ti", 1000), ("save_steps", 100),
        ("gradient_accumulation_steps", 1), ("lora_rank", 4), ("lr_warmup_steps", 0), ("lr_warmup_steps_lora", 0),
        ("lora_dropout_p", 0.0), ("lora_scale", 1.0), ("learning_rate_unet", 1e-4), ("learning_rate_text", 1e-5),
        ("learning_rate_ti", 5e-4), ("weight_decay_ti", 0.0), ("weight_decay_lora", 1e-3), ("mask_temperature", 1.0),
    ):  # fmt: skip
        p.add_argument(f"--{name}", type=type(value), default=value, help=f"(default {value})")
    for name, value, text in (
        ("train_text_encoder", True, "LoRA on the text encoder too"),
        ("perform_inversion", True, "the first stage"),
        ("use_extended_lora", False, "residual blocks too"),
        ("clip_ti_decay", True, "keep the words' norms near those of known words"),
        ("continue_inversion", False, "the words learn on in the second stage, at their rate"),
        ("scale_lr", False, "multiply learning rates by batch size and accumulation"),
        ("gradient_checkpointing", False, "less memory, slower"),
        ("use_mask_captioned_data", False, "0.src.jpg, 0.mask.png, ... and caption.txt in --instance_data_dir"),
        ("use_face_segmentation_condition", False, "the loss counts where 0.mask.png, ... of the pictures are white"),
        ("train_inpainting", False, "on an inpainting model: a random part of each picture is painted"),
    ):
        p.add_argument(
            f"--{name}", type=boolean, nargs="?", const=True, default=value, help=f"{text} (default {value})"
        )
    p.add_argument("--continue_inversion_lr", type=float, help="rate of the words in the second stage, "
                   "with --continue_inversion (default: --learning_rate_ti)")  # fmt: skip
    for name, stage in (("lr_scheduler", "first"), ("lr_scheduler_lora", "second")):
        p.add_argument(f"--{name}", choices=tuple(NamedSchedule.WAYS), default="linear",
                       help=f"schedule of the {stage} stage (default linear)")  # fmt: skip
    for name in (*FIXED, *IGNORED):
        p.add_argument(f"--{name}", nargs="?", const="True", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    from ldm.interchange.command import to_be_written

    for name, value in FIXED.items():
        if getattr(given, name) not in (None, value):
            raise InputError(f"--{name} {getattr(given, name)} has no counterpart here; only {value} is accepted")
    ignored = [f"--{name}" for name in IGNORED if getattr(given, name) is not None]
    if ignored:
        log.warning("%s: without effect here", ", ".join(ignored))
    output = to_be_written(Path(given.output_dir) / f"{given.out_name}.safetensors", given.force)
    with tempfile.TemporaryDirectory() as work:
        folder = train(given, Path(work))
    if folder is None:
        return
    from ldm.interchange import own
    from ldm.interchange.command import skeleton, write_lora

    lora = own.lora(folder)
    if lora.layers:
        write_lora(output, lora, skeleton(given.config), "cloneofsimo")
    print(
        f"{output}  {len(lora.layers)} layers, words {', '.join(lora.tokens) or 'none'}; the run is in {folder.parent}"
    )


def train(given: argparse.Namespace, work: Path) -> Path | None:
    """Train; the folder with what was learnt last, or None in all processes but the first."""
    from omegaconf import OmegaConf

    given.instance_data_dir = pictures(given)
    from ldm.train import dreambooth
    from ldm.train.options import dreambooth_parser, parse
    from ldm.train.run_folder import step_folders

    OmegaConf.save(OmegaConf.create(config_of(given)), work / "pti.yaml")
    words = [
        "--base", given.config, str(work / "pti.yaml"), "-t", "--actual_resume",
        given.pretrained_model_name_or_path, "--data_root", given.instance_data_dir, "--logdir",
        given.output_dir, "-n", "pti", "--seed", str(given.seed),
        *device_options(given.device or "auto"), *given.rest,
    ]  # fmt: skip
    run = dreambooth.plan(*(parsed := parse(dreambooth_parser(__doc__), words)))
    if not dreambooth.train(run, parsed[0]).is_global_zero:
        return None
    return step_folders(run.checkpoints)[-1]


def pictures(given: argparse.Namespace) -> str:
    """The folder of the photographs; with masks, a copy in the output folder that has them as a training reads them.

    Raises `InputError`.
    """
    if not (given.use_mask_captioned_data or given.use_face_segmentation_condition):
        return given.instance_data_dir
    if given.train_inpainting:
        raise InputError("--train_inpainting: its masks are random; leave masks of the photographs out")
    from ldm.checkpoints import atomic_write
    from ldm.data.published_masks import with_captions, with_masks

    data, _, subject = (given.placeholder_token_at_data or "").partition("|")
    with atomic_write(Path(given.output_dir) / "pictures") as beside:
        if given.use_mask_captioned_data:
            with_captions(given.instance_data_dir, beside, {data: subject} if data else {})
        else:
            with_masks(given.instance_data_dir, beside)
    return str(Path(given.output_dir) / "pictures")


def shown(given: argparse.Namespace, subject: str) -> dict[str, Any]:
    """The data set of the photographs, plain, masked or inpainted; `subject` stands for them in captions."""
    params: dict[str, Any] = {"identifier": subject} if subject else {}
    params |= {"templates": TEMPLATES[given.use_template]} if given.use_template else {}
    params |= {"size": given.resolution} if given.resolution else {}
    if given.train_inpainting:
        return {"target": "ldm.data.masked.MaskedPictures", "params": params}
    if not (given.use_mask_captioned_data or given.use_face_segmentation_condition):
        return {"params": params}
    params |= {"masks": {"source": "label", "rest": rest_of(given.mask_temperature)}}
    params |= {"captions": "txt"} if given.use_mask_captioned_data else {}
    return {"target": "ldm.data.folder.CaptionedFolder", "params": params}


def rest_of(temperature: float) -> float:
    """The weight of the squared error where a mask is black.

    The published code multiplies prediction and target by ((m + 0.01) / 1.01) ** temperature for a mask m in 0 .. 1.
    """
    return (0.01 / 1.01) ** (2 * temperature)


def device_options(device: str) -> list[str]:
    """A device in torch's words as options of training: `cuda:1` is that GPU alone, `cuda` are all there are."""
    kind, _, index = device.partition(":")
    return ["--gpus", f"{index},"] if kind == "cuda" and index else ["--accelerator", {"cuda": "gpu"}.get(kind, kind)]


def config_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the arguments change in the config."""
    words, starts = words_of(given)
    first = given.max_train_steps_ti if given.perform_inversion and words else 0
    total = first + given.max_train_steps_tuning
    subject = (given.placeholder_token_at_data or "").partition("|")[2] or "".join(words)
    stages = [
        {"name": name, "steps": steps, "warmup": warmup}
        for name, steps, warmup in (
            (given.lr_scheduler, first, given.lr_warmup_steps),
            (given.lr_scheduler_lora, total - first, given.lr_warmup_steps_lora),
        )
        if steps
    ]
    data = shown(given, subject)
    unet: dict[str, Any] = {"use_checkpoint": True} if given.gradient_checkpointing else {}
    config = {
        "dreambooth": {"class_word": given.class_word},
        "model": {
            "base_learning_rate": rate_of(given, "unet"),
            "params": {
                "train_level": [],
                "tuning": [*inversion(given, words, starts, first), *loras(given, first)],
                "unet_config": {"params": unet},
                "optimizer_config": {
                    "target": "torch.optim.AdamW", "params": {"weight_decay": given.weight_decay_lora},
                },
                "scheduler_config": {
                    "target": "ldm.lr_scheduler.NamedStages", "params": {"stages": stages},
                },
            },
        },
        "data": {"params": {"batch_size": given.train_batch_size, "train": data, "reg": None, "validation": data}},
        "lightning": {
            "modelcheckpoint": {"params": {"every_n_train_steps": given.save_steps}},
            "trainer": {"max_steps": total, "accumulate_grad_batches": given.gradient_accumulation_steps},
        },
    }  # fmt: skip
    return for_inpainting(config) if given.train_inpainting else config


def for_inpainting(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the model of inpainting."""
    params = config["model"]["params"]
    params |= INPAINTING | {"unet_config": {"params": params["unet_config"]["params"] | {"in_channels": 9}}}
    config["model"]["target"] = "ldm.models.diffusion.inpainting.LatentInpaintDiffusion"
    # its pictures begin with noise alone, which an inpainting model cannot do
    config["lightning"]["callbacks"] = {"image_logger": None}
    return config


def words_of(given: argparse.Namespace) -> tuple[list[str], list[str | float]]:
    """The new words and what they start from. Raises `InputError` where the two lists do not match."""
    words = [word for word in given.placeholder_tokens.split("|") if word]
    named = given.initializer_tokens.split("|") if given.initializer_tokens else ["<rand-0.017>"] * len(words)
    if len(named) != len(words):
        raise InputError(
            f"{len(named)} --initializer_tokens for {len(words)} --placeholder_tokens; expected one for each"
        )
    starts: list[str | float] = []
    for name in named:
        if name.startswith("<rand"):
            try:
                starts.append(float(name.strip("<>").partition("-")[2]))
            except ValueError:
                raise InputError(f"--initializer_tokens: expected <rand-0.017> or the like, got {name}") from None
        else:
            starts.append(0.0 if name == "<zero>" else name)
    if 0.0 in starts and given.clip_ti_decay:
        raise InputError("a word that starts at <zero> has no norm to keep; add --clip_ti_decay False")
    return words, starts


def rate_of(given: argparse.Namespace, part: str, rate: float | None = None) -> float:
    """A learning rate (`rate`, or that of `unet`, `text` or `ti`); `--scale_lr` multiplies by pictures per step."""
    pictures = given.train_batch_size * given.gradient_accumulation_steps if given.scale_lr else 1
    return pictures * (getattr(given, f"learning_rate_{part}") if rate is None else rate)


def inversion(given: argparse.Namespace, words: list[str], starts: list[str | float], first: int) -> list[dict]:
    """The first stage, of `first` steps. Without one the words stay at their start: they learn when all is over."""
    if not words:
        return []
    params = {
        "words": {word: {"init_word": start} for word, start in zip(words, starts, strict=True)},
        "norm_weight": 100.0 if given.clip_ti_decay else 0.0,
        "seed": given.seed,
    }
    whole, over = [0, None], [given.max_train_steps_tuning, None]
    steps = whole if given.continue_inversion else [0, first] if first else over
    target = "ldm.tuning.textual_inversion.TextualInversion"
    entry = {"target": target, "params": params, "learning_rate": rate_of(given, "ti"), "steps": steps}
    if given.continue_inversion and given.continue_inversion_lr is not None:
        later = rate_of(given, "ti", given.continue_inversion_lr)
        entry |= {"rate_from": [first, later]} if first else {"learning_rate": later}
    return [entry | {"weight_decay": given.weight_decay_ti}]


def loras(given: argparse.Namespace, first: int) -> list[dict]:
    """The second stage."""
    targets = {"unet": ATTENTION + RESIDUAL * given.use_extended_lora}
    targets |= {"text": TEXT} if given.train_text_encoder else {}
    size = {"rank": given.lora_rank, "alpha": given.lora_scale * given.lora_rank, "dropout": given.lora_dropout_p}
    return [
        {
            "target": "ldm.tuning.lora.LoRA",
            "params": {"targets": patterns, **size, "seed": given.seed},
            "learning_rate": rate_of(given, part),
            "steps": [first, None],
        }
        for part, patterns in targets.items()
    ]
