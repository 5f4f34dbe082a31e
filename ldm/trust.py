"""Floor 0: what files that the user did not write may have imported.

A file is data: what it names is looked up in a table of ours. The user's own command line may add to it
(`--allow_family`, `--trust_config`), and so may packages that are installed (the entry points `ldm.families`).
"""

from __future__ import annotations

import os
import re
import site
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

GROUP = "ldm.families"

# Families that the command line names with --allow_family; `ldm.cli.Parser` sets it anew for each command.
allowed_families: list[str] = []
# Whether --trust_config was given: the config of a run that is gone on with may then name anything.
trust_config = False

# What the stored config of a run may name as a target: classes that only compute, read and draw. Whoever writes one
# that configs are to name adds it here. Patterns are matched whole.
TARGETS = (
    r"ldm\.models\.diffusion\.ddpm\.(LatentDiffusion|DDPM)",
    r"ldm\.models\.diffusion\.(inpainting\.LatentInpaintDiffusion|engine\.DiffusionEngine|wrapper\.OpenAIWrapper)",
    r"ldm\.models\.diffusion\.denoiser\.(Denoiser|DiscreteDenoiser|(EDM|Eps|V)Scaling|VScalingWithEDMcNoise)",
    r"ldm\.models\.diffusion\.discretizer\.(Discretization|EDMDiscretization|LegacyDDPMDiscretization)",
    r"ldm\.models\.diffusion\.guiders\.(VanillaCFG|IdentityGuider)",
    r"ldm\.models\.diffusion\.edm_samplers\.(BaseDiffusionSampler|EDMSampler|AncestralSampler|LinearMultistepSampler)",
    r"ldm\.models\.diffusion\.edm_samplers\.(EulerEDM|HeunEDM|EulerAncestral|DPMPP2SAncestral|DPMPP2M)Sampler",
    r"ldm\.models\.diffusion\.sigma_loss\.(StandardDiffusionLoss|EDMSampling|DiscreteSampling)",
    r"ldm\.models\.diffusion\.sigma_loss\.(Unit|EDM|V|Eps)Weighting",
    r"ldm\.modules\.diffusionmodules\.labels\.Timestep",
    r"ldm\.models\.diffusion\.custom\.CustomDiffusion",
    r"ldm\.models\.autoencoder\.(AutoencoderKL|VQModel|VQModelInterface|IdentityFirstStage)",
    r"ldm\.models\.clip\.CLIP",
    r"ldm\.modules\.diffusionmodules\.openaimodel\.UNetModel",
    r"ldm\.modules\.encoders\.modules\.(FrozenCLIPEmbedder|FrozenCLIPEmbedderWrapper|BERTEmbedder|ClassEmbedder)",
    r"ldm\.modules\.encoders\.modules\.(FrozenOpenCLIPEmbedder2?|GeneralConditioner|ConcatTimestepEmbedderND)",
    r"ldm\.modules\.encoders\.open_clip\.FrozenOpenCLIPEmbedder2?",
    r"ldm\.modules\.encoders\.conditioner\.(GeneralConditioner|ConcatTimestepEmbedderND)",
    r"ldm\.modules\.encoders\.bert\.BERTEmbedder",
    r"ldm\.modules\.encoders\.remembered\.RememberingCLIPEmbedder",
    r"ldm\.modules\.losses\.contperceptual\.LPIPSWithDiscriminator",
    r"ldm\.modules\.losses\.vqperceptual\.VQLPIPSWithDiscriminator",
    r"ldm\.modules\.losses\.late\.LateDiscriminator",
    r"ldm\.data\.(dreambooth\.PersonalizedBase|masked\.MaskedPictures|folder\.CaptionedFolder)",
    r"ldm\.data\.captioned\.CaptionedPictures",
    r"ldm\.data\.(custom\.MaskBase|concepts\.ConceptPictures)",
    r"ldm\.data\.(faces\.(CelebAHQ|FFHQ)(Train|Validation)|simple\.(hf_dataset|TextOnly))",
    r"ldm\.data\.(lsun\.LSUN(Base|(Churches|Bedrooms|Cats)(Train|Validation))|imagenet\.ImageNet(SR|)(Train|Validation))",
    r"torchvision\.transforms\.(Resize|RandomCrop|CenterCrop|RandomHorizontalFlip)",  # read by name, not imported
    r"ldm\.tuning\.embedding_manager\.embedding_manager",
    r"ldm\.data\.latents\.CachedLatents",
    r"ldm\.train\.datamodule\.DataModuleFromConfig",
    r"ldm\.train\.callbacks\.(ImageLogger|EpochReport)",
    r"ldm\.train\.compiled\.(ChannelsLast|Compiled)",
    r"ldm\.lr_scheduler\.(Lambda(WarmUpCosineScheduler2?|LinearScheduler)|Named(Schedule|Stages))",
    r"bitsandbytes\.optim\.(Paged)?AdamW8bit",
    r"prodigyopt\.Prodigy|dadaptation\.DAdaptAdam|lion_pytorch\.Lion|schedulefree\.AdamWScheduleFree",
    r"ldm\.muon\.Muon",
    r"ldm\.tuning\.(position\.PositionAdapters|lora\.LoRA|cross_attention\.(CrossAttention|ModifierTokens))",
    r"ldm\.tuning\.(textual_inversion\.TextualInversion|full\.(UNet|ConditionStage|ByName)|biases\.Biases|norms\.Norms)",
    r"ldm\.tuning\.search\.RouteSearch",
    r"torch\.(nn|optim|optim\.lr_scheduler)\.[A-Z][A-Za-z0-9]*",
    r"pytorch_lightning\.loggers\.(TensorBoardLogger|CSVLogger|WandbLogger|MLFlowLogger)",
    r"pytorch_lightning\.callbacks\.(LearningRateMonitor|EarlyStopping|Timer|ModelCheckpoint|ModelSummary|"
    r"RichProgressBar|TQDMProgressBar|DeviceStatsMonitor|GradientAccumulationScheduler|StochasticWeightAveraging)",
)


def is_ours(target: str) -> bool:
    """Whether a dotted target is in `TARGETS`. Nothing is imported."""
    return any(re.fullmatch(pattern, target) for pattern in TARGETS)


def foreign_targets(config: Any, aliases: dict[str, str]) -> list[str]:
    """The targets, anywhere in a config of plain containers, that are neither ours nor allowed by the user."""
    allowed = (*allowed_families, *installed_families().values())
    named = dict.fromkeys(value for key, value in _leaves(config) if key == "target" and isinstance(value, str))
    return [name for name in named if not is_ours(aliases.get(name, name)) and name not in allowed]


def interpolations(config: Any) -> list[str]:
    """The values and keys of a config that OmegaConf would replace by something else, `${oc.env:HOME}` for one."""
    return [text for leaf in _leaves(config) for text in leaf if isinstance(text, str) and "${" in text]


# What the loggers, callbacks and Trainer of Lightning call the places that they write to, and names within those.
PLACES = ("save_dir", "dir", "dirpath", "default_root_dir", "root_dir", "log_dir", "path")
NAMES = ("filename", "name", "version", "sub_dir", "prefix", "CHECKPOINT_NAME_LAST")


def paths_outside(lightning: Any, folder: Path) -> list[str]:
    """The paths in a `lightning` section that lie outside a run's folder, which no run of a stranger is to write to."""
    found = []
    for key, value in _leaves(lightning):
        if not isinstance(value, str):
            continue
        inside = Path(os.path.abspath(value)).is_relative_to(folder) and Path(value).resolve().is_relative_to(folder)
        if key in PLACES and not inside:
            found.append(value)
        if key in NAMES and (os.path.isabs(value) or ".." in re.split(r"[/\\\\]", value)):
            found.append(value)
    return found


def _leaves(config: Any, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """(the key that it lies under, value) of everything in a config that is no container."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _leaves(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _leaves(value, key)
    else:
        yield key, config


def installed_families() -> dict[str, str]:
    """The entry points `ldm.families` of installed packages: name -> dotted target.

    Only what lies in the interpreter's own folders of packages counts: a `*.dist-info` in the working directory, beside
    a script or on PYTHONPATH is not installed.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions(path=_package_folders()):
        for entry in distribution.entry_points.select(group=GROUP):
            found.setdefault(entry.name, entry.value.partition("[")[0].strip().replace(":", "."))
    return found


@cache
def _package_folders() -> list[str]:
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        named.append(site.getusersitepackages())
    return list(dict.fromkeys(str(Path(folder).resolve()) for folder in named))
