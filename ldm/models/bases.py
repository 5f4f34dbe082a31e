"""Descriptions of the known base models, and of other files that users give by mistake.

A `Base` names the config that builds the model (UNet, first stage, conditioner, prediction, schedule), the names of its
parts in released files and diffusers' folders, and the names and shapes that identify a checkpoint. Another base is
another row of `BASES`; `docs/adding-a-base.md` shows one. This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.errors import InputError

# Prefixes of the parts in our models, after the attributes of `LatentDiffusion`; files may use other names.
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CONDITIONER = "cond_stage_model."
TEXT = CONDITIONER + "transformer."

# Names in checkpoints of LDM's code that a model may lack: averages, constants of the schedule, position ids, losses
# and discriminators of autoencoders, and CLIP's logit scale. The pattern matches whole names.
EMA = "model_ema."
LDM_IGNORED = (
    rf"(.*\.)?({re.escape(EMA)}.+|loss\..+|position_ids|logit_scale|attn_mask|scale_factor|logvar|lvlb_weights"
    r"|betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|denoiser\.sigmas"
    r"|global_step|num_updates|cond_ids|ddim_\w+)"
)

Shapes = Mapping[str, Any]  # weights by name; only names and shapes are used


@dataclass(frozen=True)
class Part:
    """A part of a model in files.

    prefix: the prefix of its weights in our model; released: the prefix in checkpoints, if it differs
    folder, file: its place in diffusers' folders; older: the torch file of older versions
    library, cls: its class in diffusers' `model_index.json`
    spelling: of a text encoder, whose names its weights have here: those of CLIP in transformers, or OpenCLIP's
    """

    prefix: str
    folder: str = ""
    file: str = "diffusion_pytorch_model"
    older: str = "diffusion_pytorch_model"
    library: str = "diffusers"
    cls: str = ""
    released: str | None = None
    spelling: Literal["clip", "open_clip"] = "clip"

    @property
    def in_files(self) -> str:
        """The prefix of its weights in checkpoints."""
        return self.prefix if self.released is None else self.released


@dataclass(frozen=True)
class Base:
    """A family of base models.

    config: the shipped config that builds it, as a path in the repository
    size: side of its pictures in pixels
    parts: `unet`, `vae` and, if it has one, `text_encoder`
    marks: names and shapes of weights that identify a checkpoint, with our names
    pipeline: its class in diffusers; None if its folders are not supported
    others: further entries of the folder's `model_index.json`
    trained_by: the config of a training, for `--base auto`
    text_model: the released text encoder, for configs that name none
    ema: the prefix of averages in its checkpoints
    ignored: a pattern of names in released files that the model may lack
    note: advice for users of such a file that its weights cannot tell
    """

    name: str
    title: str
    config: str
    size: int
    marks: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Part]
    pipeline: str | None = None
    others: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    trained_by: str = ""
    text_model: str = "openai/clip-vit-large-patch14"
    ema: str = EMA
    ignored: str = LDM_IGNORED
    note: str = ""

    @property
    def what(self) -> str:
        """A phrase for such a file, for messages."""
        return f"a checkpoint of {self.title}"

    @property
    def instead(self) -> str:
        """A phrase that says what to do with such a file."""
        return f"use --config {self.config} or another one of that model"

    def recognises(self, weights: Shapes) -> bool:
        """Whether weights belong to this base, with our names or those of released files."""
        return any(
            all(_shape(weights, name) == shape for name, shape in marks.items())
            for marks in (self.marks, {self.released_name(name): shape for name, shape in self.marks.items()})
        )

    def released_name(self, name: str) -> str:
        """Our name of a weight as the name in released files."""
        return _renamed(name, [(part.prefix, part.in_files) for part in self.parts.values()])

    def model_name(self, name: str) -> str:
        """A name in released files as our name."""
        return _renamed(name, [(part.in_files, part.prefix) for part in self.parts.values()])


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclass(frozen=True)
class Foreign:
    """A file that users may give instead of a base checkpoint; it is recognised for a helpful message."""

    what: str
    recognises: Callable[[Shapes], bool]
    instead: str


# --- bases

def _text(prefix: str, spelling: Literal["clip", "open_clip"], number: str = "", cls: str = "CLIPTextModel") -> Part:
    """A text encoder; `number` ends its folder's name."""
    return Part(
        prefix, f"text_encoder{number}", "model", "pytorch_model", "transformers", cls, spelling=spelling
    )


SD_PARTS = {
    "unet": Part(UNET, "unet", cls="UNet2DConditionModel"),
    "vae": Part(FIRST_STAGE, "vae", cls="AutoencoderKL"),
    "text_encoder": _text(TEXT, "clip"),
}
SD_OTHERS = {"scheduler": ("diffusers", "PNDMScheduler"), "tokenizer": ("transformers", "CLIPTokenizer")}
OPEN_CLIP_PARTS = SD_PARTS | {"text_encoder": _text(CONDITIONER + "model.", "open_clip")}
EMBEDDERS = "conditioner.embedders."
SDXL_PARTS = SD_PARTS | {
    "text_encoder": _text(EMBEDDERS + "0.transformer.", "clip"),
    "text_encoder_2": _text(EMBEDDERS + "1.model.", "open_clip", "_2", "CLIPTextModelWithProjection"),
}
SDXL_OTHERS = {
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
INPAINT = "StableDiffusionInpaintPipeline"
LDM_PARTS = {"unet": Part(UNET), "vae": Part(FIRST_STAGE)}

FIRST_LAYER = UNET + "input_blocks.0.0.weight"  # [width of the finest level, latent channels, 3, 3]
CONTEXT = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"  # [width of the coarsest level, of the text]
FIRST_DECODED = FIRST_STAGE + "decoder.conv_in.weight"  # [width of the coarsest level, latent channels, 3, 3]
LABELS = UNET + "label_emb.0.0.weight"  # [width of the time embedding, of the vector]
CODEBOOK = FIRST_STAGE + "quantize.embedding.weight"  # [entries, latent channels]


def _published(name: str, title: str, marks: Mapping[str, tuple[int, ...]], size: int = 256) -> Base:
    """A model of the latent diffusion paper (arXiv 2112.10752)."""
    return Base(name, title, f"configs/latent-diffusion/{name}.yaml", size, marks, LDM_PARTS)


FACES = {FIRST_LAYER: (224, 3, 3, 3), CODEBOOK: (8192, 3)}  # three models of one architecture
BASES = [
    Base(
        "sd-v1", "Stable Diffusion v1", "configs/stable-diffusion/v1-inference.yaml", 512,
        {FIRST_LAYER: (320, 4, 3, 3), CONTEXT: (1280, 768)}, SD_PARTS, "StableDiffusionPipeline", SD_OTHERS,
        trained_by="configs/sd-inject-dreambooth/attn2o-ffni.yaml",
    ),
    Base(
        "sd-v1-inpainting", "Stable Diffusion v1 inpainting",
        "configs/stable-diffusion/v1-inpainting-inference.yaml", 512,
        {FIRST_LAYER: (320, 9, 3, 3), CONTEXT: (1280, 768)}, SD_PARTS, INPAINT, SD_OTHERS,
        trained_by="configs/sd-inpaint-dreambooth/attn2o-ffni.yaml",
    ),
    Base(
        "sd-v2", "Stable Diffusion 2.x", "configs/stable-diffusion/v2-inference.yaml", 512,
        {FIRST_LAYER: (320, 4, 3, 3), CONTEXT: (1280, 1024)}, OPEN_CLIP_PARTS, "StableDiffusionPipeline", SD_OTHERS,
        note="if it is the model of 768 pixels, use --config configs/stable-diffusion/v2-inference-v.yaml, and for "
        "training configs/stable-diffusion/v2-768.yaml as the second --base",
        trained_by="configs/sd2-inject-dreambooth/attn2o-ffni.yaml",
    ),
    Base(
        "sd-v2-inpainting", "Stable Diffusion 2.x inpainting",
        "configs/stable-diffusion/v2-inpainting-inference.yaml", 512,
        {FIRST_LAYER: (320, 9, 3, 3), CONTEXT: (1280, 1024)}, OPEN_CLIP_PARTS, INPAINT, SD_OTHERS,
    ),
    Base(
        "sdxl", "SDXL", "configs/sdxl/sd_xl_base.yaml", 1024,
        {FIRST_LAYER: (320, 4, 3, 3), CONTEXT: (1280, 2048), LABELS: (1280, 2816)}, SDXL_PARTS,
        "StableDiffusionXLPipeline", SDXL_OTHERS,
        trained_by="configs/sdxl-inject-dreambooth/attn2o-ffni.yaml",
    ),
    Base(
        "sd-mini", "SD-mini", "configs/sd-mini/inference.yaml", 64,
        {FIRST_LAYER: (32, 4, 3, 3), CONTEXT: (128, 128)}, SD_PARTS, "StableDiffusionPipeline", SD_OTHERS,
        trained_by="configs/sd-mini/attn2o-ffni.yaml",
    ),
    _published("txt2img-1p4B-eval", "LDM text-to-image, 1.4B", {FIRST_LAYER: (320, 4, 3, 3), CONTEXT: (1280, 1280)}),
    _published("cin256-v2", "LDM ImageNet 256 x 256, VQ-f4", {FIRST_LAYER: (192, 3, 3, 3), CONTEXT: (960, 512)}),
    _published("cin-ldm-vq-f8", "LDM ImageNet 256 x 256, VQ-f8", {FIRST_LAYER: (256, 4, 3, 3), CONTEXT: (1024, 512)}),
    _published(
        "lsun_churches-ldm-kl-8", "LDM LSUN churches", {FIRST_LAYER: (192, 4, 3, 3), FIRST_DECODED: (512, 4, 3, 3)}
    ),
    _published("ffhq-ldm-vq-4", "LDM FFHQ, CelebA-HQ or LSUN bedrooms", FACES),
]  # fmt: skip
DEFAULT = BASES[0]


# --- other files

NO_TRANSFORMER = "this program has UNets alone; use a checkpoint of Stable Diffusion v1, 2.x or SDXL"
USE_SDXL = "use a checkpoint of SDXL's base, or the config of this model if you have one"
LORA_KEY = re.compile(r"(^lora_(unet|te\d?)_)|\.lora_([AB]|down|up)\b|_lora\.(down|up)\.|\.lora_linear_layer\.")


def _any(weights: Shapes, pattern: str) -> bool:
    return any(re.match(pattern, str(name)) for name in weights)


def _shape(weights: Shapes, name: str) -> tuple[int, ...]:
    return tuple(getattr(weights.get(name), "shape", ()))


def _has_text(weights: Shapes) -> bool:
    return _any(weights, re.escape(CONDITIONER))


def _has_unet(weights: Shapes) -> bool:
    return _any(weights, re.escape(UNET))


FOREIGN = [
    Foreign(
        "a hypernetwork of web UIs",
        lambda w: any(isinstance(width, int) and isinstance(w[width], (list, tuple)) for width in w),
        "it transforms the context before keys and values, which no family here does; use a LoRA",
    ),
    Foreign(
        "a checkpoint of SDXL's refiner, or another model with its conditioner",
        lambda w: (_any(w, r"conditioner\.embedders\.") or LABELS in w) and _shape(w, CONTEXT) != (1280, 2048),
        USE_SDXL,
    ),
    Foreign(
        "a Stable Diffusion checkpoint with other input channels (upscaling, depth or editing)",
        lambda w: len(_shape(w, FIRST_LAYER)) == 4 and _shape(w, FIRST_LAYER)[1] not in (3, 4, 9) and _has_text(w),
        "use the checkpoint of a text-to-image or inpainting model",
    ),
    Foreign("a Flux checkpoint", lambda w: _any(w, r"(model\.diffusion_model\.)?double_blocks\.\d"), NO_TRANSFORMER),
    Foreign(
        "a Stable Diffusion 3 checkpoint",
        lambda w: _any(w, r"(model\.diffusion_model\.)?joint_blocks\.\d"),
        NO_TRANSFORMER,
    ),
    Foreign(
        "a LoRA",
        lambda w: FIRST_LAYER not in w and any(LORA_KEY.search(str(name)) for name in w),
        "give it with --adapter_path, and the checkpoint of its base model here",
    ),
    Foreign(
        "an autoencoder alone",
        lambda w: not _has_unet(w) and _any(w, r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid)"),
        "give the checkpoint of a whole model",
    ),
    Foreign(
        "the UNet of a diffusers folder alone",
        lambda w: _any(w, r"down_blocks\.\d+\.") and _any(w, r"time_embedding\.") and _any(w, r"up_blocks\.\d+\."),
        "give the folder with model_index.json to ldm convert --to checkpoint",
    ),
    Foreign(
        "the text encoder of a diffusers folder alone",
        lambda w: not _has_unet(w) and _any(w, r"text_model\.encoder\.layers\."),
        "give the folder with model_index.json to ldm convert --to checkpoint",
    ),
]


def base_of(weights: Shapes) -> Base | None:
    """The base of the weights, by names and shapes; None if it is unknown."""
    return next((base for base in BASES if base.recognises(weights)), None)


def recognise(weights: Shapes) -> Base | Foreign | None:
    """The base or other kind of the weights, by names and shapes."""
    return base_of(weights) or next((one for one in FOREIGN if one.recognises(weights)), None)


def holds_unet(names: Iterable[Any]) -> bool:
    """Whether names belong to a whole model: some have the prefix of a base's UNet."""
    prefixes = tuple({base.parts["unet"].in_files for base in BASES})
    return any(str(name).startswith(prefixes) for name in names)


# Parts that a checkpoint may lack: the prefix, a name, and the option that gives it.
MISSABLE = [
    (FIRST_STAGE, "autoencoder: give one with --vae FILE_OR_FOLDER (or checkpoint.vae in the config)"),
    *(
        (prefix, f"{name}: give one with --text_encoder FILE_OR_FOLDER (or checkpoint.text_encoder in the config)")
        for prefix, name in (
            (CONDITIONER, "text encoder"),
            (f"{EMBEDDERS}0.", "first text encoder (CLIP ViT-L)"),
            (f"{EMBEDDERS}1.", "second text encoder (OpenCLIP bigG)"),
        )
    ),
]


def missing_part(lacking: Iterable[str], weights: Shapes) -> str | None:
    """What is said of the first part that the weights of a UNet lack altogether; None if they lack something else."""
    lacking = list(lacking)
    if not _has_unet(weights) or any(name.startswith(UNET) for name in lacking):
        return None
    return next(
        (
            told for prefix, told in MISSABLE
            if any(name.startswith(prefix) for name in lacking) and not _any(weights, re.escape(prefix))
        ),
        None,
    )  # fmt: skip


def is_ignored(name: str) -> bool:
    """Whether a name in released files may be absent from a model."""
    return any(re.fullmatch(pattern, name) for pattern in dict.fromkeys(base.ignored for base in BASES))


def in_model_names(weights: Shapes) -> Shapes:
    """The weights of a released file with our names."""
    base = base_of(weights)
    return weights if base is None else {base.model_name(name): value for name, value in weights.items()}


def in_released_names(weights: Shapes) -> Shapes:
    """The weights of our model with the names of released files."""
    base = base_of(weights)
    return weights if base is None else {base.released_name(name): value for name, value in weights.items()}


def explained(error: InputError, weights: Shapes, source: str, model: Shapes | None = None) -> InputError:
    """An error about weights that do not fit. If their kind explains it, the message begins with that.

    `model` is the state of the model that they were loaded into; its own base is not mentioned.
    """
    found = recognise(weights)
    if found is None or (model is not None and found is recognise(model)):
        return error
    detail = str(error).removeprefix(f"{source} ")
    return InputError(f"{source} is {found.what}: {found.instead} ({detail})")
