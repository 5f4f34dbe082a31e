"""Reading the reference sets of Stable Diffusion 2.x and SDXL."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from ldm.config import instantiate_from_config

SGM = "sgm.modules.diffusionmodules."
DISCRETIZATION = {"target": SGM + "discretizer.LegacyDDPMDiscretization"}
SD_BETAS = {"linear_start": 0.00085, "linear_end": 0.012}
IDENTITY = {"target": "torch.nn.Identity"}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in fp32 where they are floating point, in memory of their own."""
    return {
        name: value.float().clone() if value.is_floating_point() else value.clone()
        for name, value in load_file(path).items()
    }


def index(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())


def below(prefix: str, state: dict) -> dict:
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def of_sgm(target: str, **params):
    """An object of sgm's by its published name within `sgm.modules.diffusionmodules`."""
    return instantiate_from_config({"target": SGM + target, "params": params})


class Drawn:
    """Stands for torch.randn and its kin, and gives the recorded draws in their order."""

    def __init__(self, draws: torch.Tensor) -> None:
        self.left = list(draws)

    def __call__(self, *_args, **_kwargs) -> torch.Tensor:
        return self.left.pop(0)
