"""The Python interface of `lora_diffusion` (cloneofsimo's lora) on diffusers' models.

    from ldm.compat.lora_diffusion import inject_trainable_lora, patch_pipe, tune_lora_scale

replaces `from lora_diffusion import ...`; nothing else changes. It works on a `UNet2DConditionModel`, a
`CLIPTextModel` and a `StableDiffusionPipeline`. Layers are numbered in the order of published files for every version
of diffusers. Differences from the published package: files are never unpickled, a LoRA that does not fit is refused
before a model is changed, ranks are those of the tensors, and `set_lora_diag` supports convolutions.
"""

from ldm.compat.lora_diffusion.files import (
    convert_loras_to_safeloras,
    convert_loras_to_safeloras_with_embeds,
    load_safeloras,
    load_safeloras_both,
    load_safeloras_embeds,
    monkeypatch_or_replace_safeloras,
    parse_safeloras,
    parse_safeloras_embeds,
    save_lora_as_json,
    save_lora_weight,
    save_safeloras,
    save_safeloras_with_embeds,
)
from ldm.compat.lora_diffusion.layers import (
    DEFAULT_TARGET_REPLACE,
    TEXT_ENCODER_DEFAULT_TARGET_REPLACE,
    TEXT_ENCODER_EXTENDED_TARGET_REPLACE,
    UNET_DEFAULT_TARGET_REPLACE,
    UNET_EXTENDED_TARGET_REPLACE,
    LoraInjectedConv2d,
    LoraInjectedLinear,
)
from ldm.compat.lora_diffusion.patching import (
    collapse_lora,
    extract_lora_as_tensor,
    extract_lora_up_downs,
    extract_lora_ups_down,
    inject_trainable_lora,
    inject_trainable_lora_extended,
    inspect_lora,
    monkeypatch_add_lora,
    monkeypatch_lora,
    monkeypatch_or_replace_lora,
    monkeypatch_or_replace_lora_extended,
    monkeypatch_remove_lora,
    monkeypatch_replace_lora,
    set_lora_diag,
    tune_lora_scale,
)
from ldm.compat.lora_diffusion.pipelines import (
    LoRAManager,
    apply_learned_embed_in_clip,
    load_learned_embed_in_clip,
    patch_pipe,
    save_all,
)

__all__ = [
    "DEFAULT_TARGET_REPLACE",
    "TEXT_ENCODER_DEFAULT_TARGET_REPLACE",
    "TEXT_ENCODER_EXTENDED_TARGET_REPLACE",
    "UNET_DEFAULT_TARGET_REPLACE",
    "UNET_EXTENDED_TARGET_REPLACE",
    "LoRAManager",
    "LoraInjectedConv2d",
    "LoraInjectedLinear",
    "apply_learned_embed_in_clip",
    "collapse_lora",
    "convert_loras_to_safeloras",
    "convert_loras_to_safeloras_with_embeds",
    "extract_lora_as_tensor",
    "extract_lora_up_downs",
    "extract_lora_ups_down",
    "inject_trainable_lora",
    "inject_trainable_lora_extended",
    "inspect_lora",
    "load_learned_embed_in_clip",
    "load_safeloras",
    "load_safeloras_both",
    "load_safeloras_embeds",
    "monkeypatch_add_lora",
    "monkeypatch_lora",
    "monkeypatch_or_replace_lora",
    "monkeypatch_or_replace_lora_extended",
    "monkeypatch_or_replace_safeloras",
    "monkeypatch_remove_lora",
    "monkeypatch_replace_lora",
    "parse_safeloras",
    "parse_safeloras_embeds",
    "patch_pipe",
    "save_all",
    "save_lora_as_json",
    "save_lora_weight",
    "save_safeloras",
    "save_safeloras_with_embeds",
    "set_lora_diag",
    "tune_lora_scale",
]
