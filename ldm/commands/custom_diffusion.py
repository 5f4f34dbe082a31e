"""Train Custom Diffusion by the flags of diffusers' training program, one or several concepts.

    ldm custom-diffusion --pretrained_model_name_or_path models/sd-v1-4.ckpt --output_dir logs/cat \\
        --instance_data_dir data/cat --instance_prompt "photo of a <new1> cat" --modifier_token "<new1>" \\
        --class_data_dir real_reg/cat --class_prompt cat --with_prior_preservation --real_prior

writes <output_dir>/delta.bin (Custom Diffusion's layout for diffusers) and the run beside it. The loss is that of the
photographs plus --prior_loss_weight times that of as many class pictures. Overrides of the config may follow:
data.params.num_workers=0.
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

OWN, CLASS = ("instance_data_dir", "instance_prompt"), ("class_data_dir", "class_prompt")
PICTURES, CAPTIONS = "images.txt", "caption.txt"  # what `ldm class-pictures` writes into a folder of real pictures
PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
# Published arguments that change nothing here; which of them were given is said.
IGNORED = ("revision", "tokenizer_name", "center_crop", "sample_batch_size", "use_8bit_adam", "push_to_hub",
           "hub_token", "hub_model_id", "logging_dir", "allow_tf32", "prior_generation_precision", "local_rank",
           "set_grads_to_none", "enable_xformers_memory_efficient_attention",
           "no_safe_serialization")  # fmt: skip


def add_arguments(p: Parser) -> None:
    p.allow_abbrev, p.rest = False, keep_rest  # the training reads or refuses the rest
    what = p.add_argument_group("concepts")
    what.add_argument("--instance_data_dir", metavar="DIR", help="photographs of the concept")
    what.add_argument("--instance_prompt", type=text, help="what they show: photo of a <new1> cat")
    what.add_argument("--class_data_dir", metavar="DIR", help=f"class pictures; with {PICTURES} and {CAPTIONS} in it, "
                      "those pictures under those captions")  # fmt: skip
    what.add_argument("--class_prompt", type=text, help="what the class pictures show, e.g. cat")
    what.add_argument("--concepts_list", metavar="JSON", help="several concepts: a list with these four keys for each")
    what.add_argument("--modifier_token", metavar="<new1>+<new2>", help="words that learn")
    what.add_argument("--initializer_token", metavar="ktn+pll", help="what they start from (default: rare words)")
    what.add_argument("--with_prior_preservation", action="store_true", help="train on class pictures, too")
    what.add_argument("--real_prior", action="store_true", help="the class pictures are there; draw none")
    what.add_argument("--prior_loss_weight", type=float, default=1.0, help="of the class pictures (default 1)")
    what.add_argument("--num_class_images", type=int, default=200, help="draw class pictures up to so many (default "
                      "200)")  # fmt: skip
    files = p.add_argument_group("files")
    files.add_argument("--pretrained_model_name_or_path", required=True, metavar="BASE",
                       help="a checkpoint, a diffusers folder, or the name of one in the hub's cache")  # fmt: skip
    files.add_argument("--output_dir", default="custom-diffusion-model", help="(default %(default)s)")
    files.add_argument("--config", default="configs/custom-diffusion/finetune_addtoken.yaml", help="(default "
                       "%(default)s)")  # fmt: skip
    files.add_argument("--force", action="store_true", help="overwrite what exists")
    files.add_argument("--resume_from_checkpoint", help=argparse.SUPPRESS)
    how = p.add_argument_group("how to train")
    how.add_argument("--freeze_model", choices=("crossattn_kv", "crossattn"), default="crossattn_kv",
                     help="the part of the UNet that learns (default crossattn_kv)")  # fmt: skip
    how.add_argument("--seed", type=seed_number, default=42)
    how.add_argument("--device", help="cuda:1, cuda (all), mps or cpu (default: the best there is)")
    how.add_argument("--max_train_steps", type=int, help="(default: --num_train_epochs)")
    how.add_argument("--lr_scheduler", choices=tuple(NamedSchedule.WAYS), default="constant", help="(default constant)")
    how.add_argument("--mixed_precision", choices=tuple(PRECISIONS), default="no", help="(default no)")
    how.add_argument("--report_to", choices=("tensorboard", "wandb"), default="tensorboard", help="(default "
                     "tensorboard)")  # fmt: skip
    for name, value, help_text in (
        ("resolution", 512, "pixels"), ("train_batch_size", 4, "photographs in a batch"), ("num_train_epochs", 1, ""),
        ("gradient_accumulation_steps", 1, ""), ("checkpointing_steps", 250, "steps between checkpoints"),
        ("dataloader_num_workers", 2, ""), ("learning_rate", 1e-5, ""), ("lr_warmup_steps", 500, ""),
        ("adam_beta1", 0.9, ""), ("adam_beta2", 0.999, ""), ("adam_weight_decay", 1e-2, ""), ("adam_epsilon", 1e-8, ""),
        ("max_grad_norm", 1.0, "gradients are clipped to it"), ("num_validation_images", 2, ""),
        ("validation_steps", 50, "steps between sample pictures"),
    ):  # fmt: skip
        how.add_argument(f"--{name}", type=type(value), default=value, help=f"{help_text} (default {value})".strip())
    how.add_argument("--validation_prompt", type=text, help="of sample pictures in the run's images/")
    for name, help_text in (
        ("scale_lr", "multiply the rate by pictures per step"), ("hflip", "flip pictures at random"),
        ("noaug", "do not rescale the photographs at random"), ("gradient_checkpointing", "less memory, slower"),
    ):  # fmt: skip
        how.add_argument(f"--{name}", type=boolean, nargs="?", const=True, default=False, help=help_text)
    for name in IGNORED:
        p.add_argument(f"--{name}", nargs="?", const="True", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    from ldm.interchange import by_name, own
    from ldm.interchange.command import to_be_written
    from ldm.interchange.formats import Context

    if given.resume_from_checkpoint:
        raise InputError("--resume_from_checkpoint: go on with the run in --output_dir by ldm train -t -r <its folder>")
    if ignored := [f"--{name}" for name in IGNORED if getattr(given, name) is not None]:
        log.warning("%s: without effect here", ", ".join(ignored))
    output = to_be_written(Path(given.output_dir) / "delta.bin", given.force)
    concepts = concepts_of(given)
    with tempfile.TemporaryDirectory() as work:
        folder = train(given, concepts, Path(work))
    if folder is None:
        return
    delta = own.delta(folder)
    by_name("delta-diffusers").write(output, delta, Context())
    words = ", ".join(delta.tokens) or "none"
    print(f"{output}  {len(delta.weights)} weights, words {words}; the run is in {folder.parent.parent}")


def concepts_of(given: argparse.Namespace) -> list[dict[str, str]]:
    """The concepts by the keys of diffusers. Raises `InputError` for what is missing or contradicts itself."""
    alone = {key: getattr(given, key) for key in OWN + CLASS if getattr(given, key)}
    if given.concepts_list and alone:
        raise InputError(f"--concepts_list names the concepts; leave --{', --'.join(alone)} out")
    concepts = listed_concepts(given.concepts_list) if given.concepts_list else [alone]
    where = f"--concepts_list {given.concepts_list}: " if given.concepts_list else ""
    wanted = OWN + (CLASS if given.with_prior_preservation else ())
    for concept in concepts:
        if unknown := sorted(concept.keys() - {*OWN, *CLASS}):
            raise InputError(f"{where}unknown key {unknown[0]}; expected {', '.join(OWN + CLASS)}")
        if lacking := [key for key in wanted if not isinstance(concept.get(key), str)]:
            raise InputError(f"{where}each concept needs {', '.join(wanted)}; --{lacking[0]} is missing")
    if words := _not_said(given.modifier_token, concepts):
        raise InputError(f"no instance prompt has the word {words[0]} of --modifier_token")
    return concepts


def listed_concepts(path: str) -> list[dict[str, str]]:
    """The mappings of a `concepts_list` file. Raises `InputError`."""
    from ldm.files import read_json

    concepts = read_json(path)
    if isinstance(concepts, list) and concepts and all(isinstance(one, dict) for one in concepts):
        return concepts
    raise InputError(f"--concepts_list {path}: expected a JSON list of mappings with {', '.join(OWN + CLASS)}")


def _not_said(modifier_token: str | None, concepts: list[dict[str, str]]) -> list[str]:
    """The words to learn that no instance prompt has."""
    prompts = " ".join(concept["instance_prompt"] for concept in concepts)
    return [word for word in (modifier_token or "").split("+") if word and word not in prompts]


def train(given: argparse.Namespace, concepts: list[dict[str, str]], work: Path) -> Path | None:
    """Train; the folder with what was learnt last, or None in all processes but the first."""
    from omegaconf import OmegaConf

    from ldm.commands.lora_pti import device_options
    from ldm.train import dreambooth
    from ldm.train import run as runs
    from ldm.train.options import dreambooth_parser, parse
    from ldm.train.run_folder import step_folders

    OmegaConf.save(OmegaConf.create(config_of(given, concepts)), work / "custom.yaml")
    first = concepts[0]
    words = [
        "--base", given.config, str(work / "custom.yaml"), "-t", "--actual_resume", given.pretrained_model_name_or_path,
        "--data_root", first["instance_data_dir"], "--logdir", given.output_dir, "-n", "custom-diffusion", "--seed",
        str(given.seed), *device_options(given.device or "auto"), *given.rest,
    ]  # fmt: skip
    if given.with_prior_preservation:
        number = 0 if given.real_prior else given.num_class_images
        words += ["--reg_data_root", pictures_of(first["class_data_dir"]), "--class_word", first["class_prompt"]]
        words += ["--num_class_images", str(number)]
    if given.modifier_token:
        words += ["--modifier_token", given.modifier_token]
        words += ["--init_word", given.initializer_token] if given.initializer_token else []
    run = dreambooth.plan(*parse(dreambooth_parser(__doc__), words))
    with runs.before_the_first_step():
        model = runs.base_model(run)
        if given.with_prior_preservation and not given.real_prior:
            for one in concepts:
                folder = Path(one["class_data_dir"])
                runs.prepare_class_pictures(run, model, folder, one["class_prompt"], given.num_class_images)
    if not runs.train(run, model, test=False).is_global_zero:
        return None
    return step_folders(run.checkpoints)[-1]


def pictures_of(folder: str) -> str:
    """The folder that directly holds the pictures of a folder of class pictures."""
    return str(Path(folder) / "images") if (Path(folder) / PICTURES).is_file() else folder


def pictures_and_captions(folder: str, prompt: str) -> dict[str, str]:
    """A class folder as the arguments of `MaskBase`."""
    lists = [Path(folder) / name for name in (PICTURES, CAPTIONS)]
    if all(path.is_file() for path in lists):
        return dict(zip(("datapath", "caption"), map(str, lists), strict=True))
    return {"datapath": folder, "caption": prompt}


def config_of(given: argparse.Namespace, concepts: list[dict[str, str]]) -> dict[str, Any]:
    """What the arguments change in the config."""
    common = {"size": given.resolution, "flip_p": 0.5 if given.hflip else 0.0, "templates": "{}"}
    sets: dict[str, Any] = {
        "train": shown([{"datapath": one["instance_data_dir"], "caption": one["instance_prompt"]} for one in concepts],
                       common | {"aug": not given.noaug}),
        "train2": None,
    }  # fmt: skip
    if given.with_prior_preservation:
        classes = [pictures_and_captions(one["class_data_dir"], one["class_prompt"]) for one in concepts]
        sets["reg"] = shown(classes, common | {"aug": False})
    pictures = 2 if given.with_prior_preservation else 1
    trainer: dict[str, Any] = {
        "accumulate_grad_batches": given.gradient_accumulation_steps, "gradient_clip_val": given.max_grad_norm,
        "precision": PRECISIONS[given.mixed_precision], "max_steps": given.max_train_steps or -1,
    }  # fmt: skip
    trainer |= {} if given.max_train_steps else {"max_epochs": given.num_train_epochs}
    prompts = [given.validation_prompt] if given.validation_prompt else None
    lightning: dict[str, Any] = {
        "modelcheckpoint": {"params": {"every_n_train_steps": given.checkpointing_steps}},
        "callbacks": {"image_logger": {"params": {"disabled": prompts is None, "prompts": prompts,
                                                  "max_images": given.num_validation_images,
                                                  "batch_frequency": given.validation_steps}}},
        "trainer": trainer,
    }  # fmt: skip
    if given.report_to == "wandb":
        lightning["logger"] = {"target": "pytorch_lightning.loggers.WandbLogger"}
    return {
        "dreambooth": {"scale_lr": given.scale_lr},
        "model": {
            # the published program counts class pictures as pictures of the step where it scales the rate
            "base_learning_rate": given.learning_rate * (pictures if given.scale_lr else 1),
            "params": {
                "freeze_model": given.freeze_model.replace("_", "-"),
                "add_token": bool(given.modifier_token),
                "cond_stage_trainable": False,
                **step_params(given),
            },
        },
        "data": {"params": {"batch_size": given.train_batch_size, "num_workers": given.dataloader_num_workers, **sets}},
        "lightning": lightning,
    }  # fmt: skip


def step_params(given: argparse.Namespace) -> dict[str, Any]:
    """What the flags of diffusers' scripts say of the loss, the UNet's memory and the optimizer, as `model.params`."""
    betas = [given.adam_beta1, given.adam_beta2]
    return {
        "reg_weight": given.prior_loss_weight,
        "unet_config": {"params": {"use_checkpoint": True}} if given.gradient_checkpointing else {},
        "optimizer_config": {
            "target": "torch.optim.AdamW",
            "params": {"betas": betas, "weight_decay": given.adam_weight_decay, "eps": given.adam_epsilon},
        },
        "scheduler_config": {"target": "ldm.lr_scheduler.NamedSchedule", "params": schedule(given)},
    }


def schedule(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `NamedSchedule`. As in diffusers, `constant` has no warm-up. Raises `InputError`."""
    if given.lr_scheduler == "constant":
        return {"name": "constant"}
    if not given.max_train_steps or given.max_train_steps <= given.lr_warmup_steps:
        raise InputError(
            f"--lr_scheduler {given.lr_scheduler} needs --max_train_steps above --lr_warmup_steps "
            f"{given.lr_warmup_steps}, got {given.max_train_steps}"
        )
    return {"name": given.lr_scheduler, "steps": given.max_train_steps, "warmup": given.lr_warmup_steps}


def shown(concepts: list[dict[str, str]], common: dict[str, Any]) -> dict[str, Any]:
    """A data set of the config."""
    return {"target": "ldm.data.concepts.ConceptPictures", "params": {"concepts": concepts, **common}}
