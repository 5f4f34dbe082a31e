"""Package `ldm` and the two programs; the exact tested versions are in constraints.txt."""

from setuptools import find_packages, setup

TEST = ["hypothesis>=6.100", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.9"]
PEERS = ["diffusers>=0.31"]  # the other side of file formats, and what timings are compared with
LORA_COMMANDS = ["lora_add", "lora_distill", "lora_pti"]

setup(
    name="position-adapters-ldm",
    version="0.1.0",
    description="Small adapters wired into the frozen UNet of a latent diffusion model at named positions",
    author="the authors",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["ldm", "ldm.*"]), "ldm_scripts"],
    package_dir={"ldm_scripts": "scripts"},  # a name of its own among the installed packages
    py_modules=["main_dream_booth", "sample"],
    entry_points={"console_scripts": [f"{name} = ldm_scripts.{name}:command" for name in LORA_COMMANDS]},
    install_requires=[
        "torch>=2.4",
        "pytorch-lightning>=2.2,<3",
        "transformers>=4.46,<6",
        "omegaconf>=2.3",
        "pydantic>=2.7,<3",
        "einops>=0.7",
        "kornia>=0.7",
        "peft>=0.18",
        "pillow>=10",
        "regex>=2023.3",  # patterns out of files, which `re` cannot be stopped at
        "numpy>=1.26",
        "tqdm>=4.66",
        "safetensors>=0.4.3",
        "tensorboard>=2.15",
        "psutil>=5.9",  # a training in the background, by its number and the time of its start
    ],
    extras_require={
        "test": TEST + PEERS,
        "bench": PEERS,
        # Its metadata also asks for torchvision, which nothing here imports: `pip install .[vq]` brings both, while
        # `pip install --no-deps -r requirements-vq.txt` (what the Makefile does) brings only what is used.
        "vq": ["taming-transformers-rom1504>=0.0.6"],
        "wandb": ["wandb>=0.17"],
    },
)
