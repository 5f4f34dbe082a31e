"""The shipped configs for bases other than SD v1, with every width reduced, as files that whole runs read."""

from pathlib import Path

from omegaconf import OmegaConf

from ldm.config import load_config, unet_params
from tests.conftest import ROOT

TEXT = {"width": 16, "heads": 2, "layers": 2}
FIRST_STAGE = {"resolution": 32, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1}
UNET = {
    "model_channels": 32, "attention_resolutions": [1], "num_res_blocks": 1, "channel_mult": [1, 2],
    "num_head_channels": 16, "context_dim": 16, "use_checkpoint": False, "use_fp16": False,
}  # fmt: skip
SDXL_UNET = {**UNET, "transformer_depth": [1, 2], "adm_in_channels": 16 + 6 * 8, "context_dim": 32}
CLIP = {"version": str(ROOT / "models/sd-mini/clip"), "max_length": 32}
INPAINTING_UNET = {**UNET, "num_heads": 2, "num_head_channels": -1, "context_dim": 128}


def narrow(path: str, folder: Path, **changes) -> Path:
    """A config of `configs/` on a tiny base of random weights, for pictures of 32 pixels; the file that holds it."""
    config = load_config(ROOT / "configs" / path)
    params, is_sdxl = config.model.params, "network_config" in config.model.params
    unet, adapters = OmegaConf.select(config, unet_params(config)), {}
    for kind in unet.get("adapter_config") or {}:
        adapters[kind] = unet.adapter_config[kind]
    is_inpainting = unet.in_channels == 9
    unet.update(SDXL_UNET if is_sdxl else INPAINTING_UNET if is_inpainting else UNET)
    if not (is_sdxl or is_inpainting):
        unet.num_heads = -1
    params.image_size = 8
    params.first_stage_config.params.ddconfig.update(FIRST_STAGE)
    if is_sdxl:
        entries = params.conditioner_config.params.emb_models
        entries[0].update({"target": "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {"arch": TEXT}})
        entries[1].params.arch = TEXT
        for entry in entries[2:]:
            entry.params.outdim = 8
    else:
        params.cond_stage_config.params = CLIP if is_inpainting else {"arch": TEXT, "layer": "penultimate"}
    for name in ("train", "reg", "validation"):
        if config.data.params.get(name):
            config.data.params[name].params.update({"size": 32, "templates": "photo of a {}"})
    config.data.params.num_workers = 0
    config.lightning.trainer.update({"max_steps": 2, "precision": 32, "log_every_n_steps": 1, "benchmark": False})
    config.checkpoint = {"path": None, "random_seed": 0}
    if config.lightning.callbacks.get("image_logger"):
        config.lightning.callbacks.image_logger.params.update({"steps": 2, "batch_frequency": 1000})
    for name, value in changes.items():
        OmegaConf.update(config, name, value)
    file = folder / f"{Path(path).parent.name}-{Path(path).name}"
    OmegaConf.save(config, file)
    return file
