"""Put SD-mini together: the weights of the three training runs as the files that are shipped, in half precision.

    python -m scripts.sd_mini.pack --clip logs/<clip run>/checkpoints/last.ckpt --out models/sd-mini
    python -m scripts.sd_mini.pack --autoencoder logs/<...>/last.ckpt --ldm logs/<...>/last.ckpt --out models/sd-mini

writes clip/model.safetensors (both towers) and model.safetensors (averaged UNet, autoencoder, text tower).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoints import read_weights, save_safetensors
from ldm.cli import (
    Parser,
    run_command,
)
from ldm.config import instantiate_from_config, load_config
from ldm.errors import InputError
from ldm.models.bases import EMA, FIRST_STAGE, TEXT, UNET
from ldm.models.building import load_weights
from ldm.models.clip import CLIP


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def averaged_unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of a run's UNet under the UNet's own names; LDM's averages have names without dots."""
    unet = [name for name in weights if name.startswith(UNET)]
    averages = {name: EMA + name.removeprefix("model.").replace(".", "") for name in unet}
    if lacking := [average for average in averages.values() if average not in weights]:
        raise InputError(f"--ldm: {len(lacking)} averages are not in it, e.g. {lacking[0]}; train with use_ema: true")
    return {name: weights[average] for name, average in averages.items()}


def clip_weights(checkpoint: str, folder: str) -> dict[str, Tensor]:
    """Both towers out of a run's checkpoint. Raises `InputError` unless they fit the CLIP of `folder`."""
    weights = below(read_weights(checkpoint), "clip.")
    load_weights(CLIP(folder).clip, weights, f"--clip {checkpoint}")
    return weights


def half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--clip", help="checkpoint of configs/sd-mini/train/clip.yaml")
    parser.add_argument("--autoencoder", help="checkpoint of configs/sd-mini/train/autoencoder.yaml")
    parser.add_argument("--ldm", help="checkpoint of configs/sd-mini/train/ldm.yaml")
    parser.add_argument("--config", default="configs/sd-mini/model.yaml")
    parser.add_argument("--out", default="models/sd-mini")
    options = parser.parse_args(arguments)
    if not (options.clip or options.ldm) or bool(options.autoencoder) != bool(options.ldm):
        raise InputError("name checkpoints with --clip, or with --autoencoder and --ldm together, or with all three")
    model = load_config(options.config).model
    if options.clip:
        weights = clip_weights(options.clip, model.params.cond_stage_config.params.version)
        save_safetensors(f"{options.out}/clip/model.safetensors", half(weights))
        print(f"{options.out}/clip/model.safetensors")
    if options.ldm:
        weights = averaged_unet(read_weights(options.ldm))
        first_stage = read_weights(options.autoencoder)
        weights |= {FIRST_STAGE + k: v for k, v in first_stage.items() if not k.startswith("loss.")}
        text = below(read_weights(f"{options.out}/clip/model.safetensors"), "text_model.")
        weights |= {f"{TEXT}text_model.{k}": v for k, v in text.items()}
        load_weights(instantiate_from_config(model), weights, "the packed model")
        save_safetensors(f"{options.out}/model.safetensors", half(weights))
        print(f"{options.out}/model.safetensors")


if __name__ == "__main__":
    run_command(main)
