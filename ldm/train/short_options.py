"""The short options of training for the common choices: what they change in a config."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config import get_obj_from_str, parameters_of, plain, unet_params
from ldm.errors import InputError, did_you_mean
from ldm.schema import CheckpointParams
from ldm.train.sample_prompts import read_prompts

log = logging.getLogger(__name__)

NAMES = ("lr", "rank", "alpha", "family", "route")
KINDS = ("lora", "rslora", "dora", "loha", "lokr", "oft", "boft")  # of the family `lora`
WIDTHS = {"transformer_adp_config": 60, "resblock_adp_config": 7}  # of the published routes
RESIDUAL = {"resi", "reso"}  # positions in residual blocks

SAMPLES = "lightning.callbacks.image_logger"
# Options that are keys of the config under another name. A resumed run takes them, too.
KEYS = {
    "checkpoints_total_limit": "lightning.modelcheckpoint.params.total_limit",
    "save_every_minutes": "lightning.modelcheckpoint.params.every_n_minutes",
    "early_stopping": "lightning.monitor.early_stopping",
    "save_best": "lightning.monitor.save_best",
    "monitor": "lightning.monitor.metric",
    "monitor_mode": "lightning.monitor.mode",
    "logger": "lightning.logger",
    "sample_every_n_steps": f"{SAMPLES}.params.batch_frequency",
    "sample_prompts": f"{SAMPLES}.params.prompts",
    "vae": "checkpoint.vae",
    "text_encoder": "checkpoint.text_encoder",
    "ema": "checkpoint.ema",
}


def changed(config: DictConfig, options: argparse.Namespace, is_resumed: bool) -> DictConfig:
    """The config with `--lr`, `--rank`, `--alpha`, `--family`, `--route` and those of `KEYS`. Raises `InputError`."""
    keys = {key: getattr(options, name, None) for name, key in KEYS.items()}
    if prompts := keys.get(f"{SAMPLES}.params.prompts"):
        keys[f"{SAMPLES}.params.prompts"] = read_prompts(prompts)
    if asked := {key: value for key, value in keys.items() if value is not None}:
        config = OmegaConf.create(plain(config))
        for key, value in asked.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        if any(key.startswith(SAMPLES) for key in asked):
            set_samples(config)
    given = {name: getattr(options, name, None) for name in NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    if is_resumed and (fixed := [f"--{name}" for name in given if name != "lr"]):
        raise InputError(f"-r goes on with what the run trains; leave {', '.join(fixed)} out, or start a new run")
    if not given:
        return config
    config = OmegaConf.create(plain(config))
    if "family" in given:
        set_family(config, given["family"])
    if "route" in given:
        set_route(config, given["route"])
    if "rank" in given:
        set_rank(config, given["rank"])
    if "alpha" in given and not set_argument(config, "alpha", given["alpha"]):
        raise InputError(f"--alpha: no family of this config takes it; {HINT}")
    if "lr" in given:
        set_rate(config, given["lr"])
    return config


def set_samples(config: DictConfig) -> None:
    """Draw sample pictures in a config that has no image logger; its interval is that of the checkpoints."""
    logger = OmegaConf.select(config, SAMPLES)
    if logger.get("target") is None:
        logger.target = "ldm.train.callbacks.ImageLogger"
    if logger.params.get("batch_frequency") is None:
        logger.params.batch_frequency = CheckpointParams().every_n_train_steps
    if logger.params.get("disabled"):
        logger.params.disabled = False


HINT = "name one with --family lora, or a config such as configs/lora/attention.yaml"


def entries(config: DictConfig) -> list[Any]:
    """The entries of `tuning`, as parts of the config."""
    tuning = OmegaConf.select(config, "model.params.tuning")
    return list(tuning) if OmegaConf.is_list(tuning) else [tuning] if tuning is not None else []


def set_family(config: DictConfig, name: str) -> None:
    """Replace what learns by one family, with its defaults."""
    from ldm import trust
    from ldm.tuning.table import FAMILIES

    known = {*KINDS, *FAMILIES, *trust.installed_families()}
    if name not in known:
        raise InputError(f"--family {name}: there is no such family{did_you_mean(name, sorted(known))}")
    entry = {"family": "lora", "params": {"kind": name}} if name in KINDS else {"family": name}
    params = f"{unet_params(config)}.adapter_config"
    if OmegaConf.select(config, params) and name != "position":
        log.info("--family %s takes the place of the position adapters of the config", name)
        OmegaConf.update(config, params, None, merge=False)
    OmegaConf.update(config, "model.params.tuning", [entry], merge=False, force_add=True)
    OmegaConf.update(config, "model.params.train_level", [], merge=False, force_add=True)


def set_route(config: DictConfig, route: str) -> None:
    """Replace the position adapters by one that reads and writes where the route says: `attn2o-ffni`."""
    reads, dash, writes = route.partition("-")
    if not reads or not dash or not writes or "-" in writes:
        raise InputError(f"--route {route}: expected where an adapter reads and writes, such as attn2o-ffni")
    kind = "resblock_adp_config" if {reads, writes} <= RESIDUAL else "transformer_adp_config"
    place = f"{unet_params(config)}.adapter_config"
    old = OmegaConf.select(config, f"{place}.{kind}")
    first = (old[0] if OmegaConf.is_list(old) else old) if old else {}
    entry = {"type": "inout", "mid_dim": WIDTHS[kind], **plain(first), "din": reads, "dout": writes}
    OmegaConf.update(config, place, {kind: [entry]}, merge=False, force_add=True)
    levels = plain(OmegaConf.select(config, "model.params.train_level")) or []
    levels = [one for one in ([levels] if isinstance(levels, str) else levels) if one not in ("unet", "adapter")]
    OmegaConf.update(config, "model.params.train_level", [*levels, "adapter"], merge=False, force_add=True)


def set_rank(config: DictConfig, rank: int) -> None:
    """The rank of families that have one; without such a family, the width of the position adapters."""
    if set_argument(config, "rank", rank):
        return
    adapters = OmegaConf.select(config, f"{unet_params(config)}.adapter_config") or {}
    found = [one for kind in adapters.values() if kind for one in (kind if OmegaConf.is_list(kind) else [kind])]
    for one in found:
        one["mid_dim"] = rank
    if not found:
        raise InputError(f"--rank: this config tunes nothing that has a rank; {HINT}")


def set_argument(config: DictConfig, name: str, value: Any) -> bool:
    """Set an argument of all families that take it; whether one does."""
    from ldm.tuning.table import named

    found = False
    for entry in entries(config):
        target = entry.get("target") or named(entry.get("family"))
        if name in (parameters_of(get_obj_from_str(target))[1] or []):
            entry["params"] = {**(plain(entry.get("params")) or {}), name: value}
            found = True
    return found


def set_rate(config: DictConfig, rate: float) -> None:
    OmegaConf.update(config, "model.base_learning_rate", rate, force_add=True)
    for number, entry in enumerate(entries(config)):
        if entry.get("learning_rate") is not None:
            log.warning(
                "--lr is not for tuning.%d, which has a learning rate of its own, %g: tuning.%d.learning_rate=%g",
                number, entry["learning_rate"], number, rate,
            )  # fmt: skip
