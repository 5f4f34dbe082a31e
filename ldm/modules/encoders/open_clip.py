"""The text encoders of Stable Diffusion 2.x and SDXL: text towers of OpenCLIP, with the names of released files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import find_file
from ldm.errors import InputError, did_you_mean, short
from ldm.modules.encoders.open_clip_tokenizer import OpenCLIPTokenizer
from ldm.modules.encoders.tokens import LearnsWords, NewTokens


def _tower(width: int, heads: int, layers: int, embed_dim: int | None = None) -> dict[str, int]:
    return {"width": width, "heads": heads, "layers": layers, "embed_dim": embed_dim or width}


# Text towers of OpenCLIP by name. The suffix `-quickgelu` means OpenAI's activation.
TOWERS = {
    "ViT-B-32": _tower(512, 8, 12),
    "ViT-B-16": _tower(512, 8, 12),
    "ViT-L-14": _tower(768, 12, 12),
    "ViT-L-14-336": _tower(768, 12, 12),
    "ViT-H-14": _tower(1024, 16, 24),
    "ViT-H-16": _tower(1024, 16, 24),
    "ViT-g-14": _tower(1024, 16, 24),
    "ViT-bigG-14": _tower(1280, 20, 32),
}
DEFAULTS = {"context_length": 77, "vocab_size": 49408, "quick_gelu": False, "mlp_ratio": 4.0}
LARGEST = {"context_length": 2**16, "vocab_size": 10**6, "width": 2**13, "heads": 2**10, "layers": 128,
           "embed_dim": 2**13}  # fmt: skip
ACTIVATIONS = {False: F.gelu, True: lambda x: x * torch.sigmoid(1.702 * x)}


def text_config(arch: str | Mapping) -> dict[str, Any]:
    """The sizes of a text tower by its name in `TOWERS`, or as open_clip's JSON has them, flat or under `text_cfg`.

    Raises `InputError` for an unknown name, for unknown keys and for sizes that make no sense.
    """
    if isinstance(arch, str):
        name = arch.removesuffix("-quickgelu")
        if name not in TOWERS:
            raise InputError(
                f"OpenCLIP: unknown arch {arch!r}; its text_cfg may stand in its place{did_you_mean(arch, TOWERS)}"
            )
        return {**DEFAULTS, **TOWERS[name], "quick_gelu": arch != name}
    if not isinstance(arch, Mapping):
        raise InputError(f"OpenCLIP: arch must be a name or a mapping with width, heads, layers, got {short(arch)}")
    nested = arch.get("text_cfg") or {}
    outer = {key: value for key, value in arch.items() if key not in ("text_cfg", "vision_cfg", "custom_text")}
    config = {**DEFAULTS, **outer, **nested}
    config.setdefault("embed_dim", config.get("width"))
    for key, most in LARGEST.items():
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f"OpenCLIP: {key} of arch must be a whole number from 1 to {most}, got {short(value)}")
    if unknown := sorted(config.keys() - LARGEST.keys() - DEFAULTS.keys()):
        raise InputError(f"OpenCLIP: {unknown[0]} of arch is unknown{did_you_mean(unknown[0], [*LARGEST, *DEFAULTS])}")
    if config["width"] % config["heads"]:
        raise InputError(f"OpenCLIP: width {config['width']} of arch is no multiple of its {config['heads']} heads")
    return config


class Attention(nn.Module):
    """Causal self-attention over tokens [b, n, d], with q, k and v in one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # arXiv 1706.03762, eq. 1
        return self.out_proj(rearrange(h, "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """[b, n, d] to width `inner` and back; the activation is the exact GELU or OpenAI's approximation."""

    def __init__(self, width: int, inner: int, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = ACTIVATIONS[quick_gelu]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on the normed value and added to it."""

    def __init__(self, width: int, heads: int, inner: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width, inner, quick_gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """Token ids to hidden states (arXiv 2103.00020, section 2.4), with open_clip's state-dict names.

    `logit_scale` belongs to its contrastive training and is unused here.
    """

    def __init__(self, context_length: int, vocab_size: int, width: int, heads: int, layers: int, embed_dim: int,
                 quick_gelu: bool, mlp_ratio: float) -> None:  # fmt: skip
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        blocks = [Block(width, heads, int(width * mlp_ratio), quick_gelu) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, ids: Tensor, skipped: int = 0) -> tuple[Tensor, Tensor]:
        """Ids [b, n] to hidden states [b, n, width] before the last layer, and after it; without the final norm.

        With `skipped` 1 the last layer is not computed, and both are the states before it.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        *blocks, last = self.transformer["resblocks"]
        for block in blocks:
            x = block(x)
        return x, x if skipped else last(x)

    def pooled(self, last: Tensor, ids: Tensor, end: int) -> Tensor:
        """The state [b, embed_dim] of each prompt's first end marker in normed hidden states, projected."""
        ends = (ids == end).int().argmax(dim=-1)
        return last[torch.arange(len(ids), device=ids.device), ends] @ self.text_projection


class OpenCLIPText(LearnsWords):
    """Common to both embedders: the tower, its tokenizer, learnt words."""

    layers: Sequence[str] = ("last", "penultimate")

    def __init__(self, arch: str | Mapping, max_length: int, freeze: bool, layer: str, tokenizer: str | None) -> None:
        super().__init__()
        if layer not in self.layers:
            raise InputError(f"{type(self).__name__}: layer must be {' or '.join(self.layers)}, got {layer!r}")
        self.layer, self.arch, self.tokenizer_folder = layer, text_config(arch), tokenizer
        self.max_length = min(max_length, self.arch["context_length"])
        self.model = TextTower(**self.arch)
        self.new_tokens = NewTokens(self.token_embedding)
        if freeze:
            self.freeze()

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of the vocabulary, [vocab_size, width]."""
        return self.model.token_embedding

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        self.model.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> OpenCLIPTokenizer:
        """The tokenizer of the folder `tokenizer`, else CLIP's, which this package includes. Raises `InputError`."""
        folder = self.tokenizer_folder
        found = OpenCLIPTokenizer(None if folder is None else Path(find_file(folder)))
        if found.eos_token_id >= self.arch["vocab_size"]:
            raise InputError(
                f"the vocabulary of the tokenizer has more than the {self.arch['vocab_size']} entries of this text "
                "encoder: name a folder with its vocab.json and merges.txt as tokenizer"
            )
        return found

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Token ids [b, max_length], cut to length, zeros behind the end."""
        texts = [text] if isinstance(text, str) else text
        return self.tokenizer.padded([self.new_tokens.spell(one) for one in texts], self.max_length)

    def tokens_of(self, text: str) -> list[int]:
        """All token ids of a text, without markers and without limit."""
        return self.tokenizer.encode(self.new_tokens.spell(text))

    def with_markers(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of at most max_length - 2 token ids as [b, max_length]: markers around them, zeros behind."""
        framed = [[self.tokenizer.bos_token_id, *row, self.tokenizer.eos_token_id] for row in rows]
        return torch.tensor([row + [0] * (self.max_length - len(row)) for row in framed])

    def _ids(self, text: str | Sequence[str]) -> Tensor:
        return self.tokenize(text).to(self.token_embedding.weight.device, non_blocking=True)

    def encode(self, text: str | Sequence[str]) -> Any:
        """LDM's name for `forward`."""
        return self(text)


class FrozenOpenCLIPEmbedder(OpenCLIPText):
    """Prompts to hidden states [b, max_length, width] with the final norm: the text encoder of Stable Diffusion 2.x.

    `arch`: see `text_config`. `layer`: the state after the last layer, or after the penultimate one. `version` and
    `device` are unused: weights come with the checkpoint of the whole model, and the module follows its parent.
    Raises `InputError`.
    """

    def __init__(
        self,
        arch: str | Mapping = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(arch, max_length, freeze, layer, tokenizer)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Prompts to [b, max_length, width]."""
        return self.encode_ids(self._ids(text))

    def encode_ids(self, ids: Tensor) -> Tensor:
        """The same as `forward`, from token ids [b, max_length]."""
        ids = ids.to(self.token_embedding.weight.device, non_blocking=True)
        _, hidden = self.model(ids, skipped=int(self.layer == "penultimate"))
        return self.model.ln_final(hidden)


class FrozenOpenCLIPEmbedder2(OpenCLIPText):
    """Prompts to hidden states and a pooled vector: the second text encoder of SDXL.

    With `legacy` it works as `FrozenOpenCLIPEmbedder`. Without it, the hidden states have no final norm, and
    `always_return_pooled` adds the pooled vector [b, embed_dim] of the last layer, with the final norm. Other arguments
    are the same. Raises `InputError`, also for `legacy` with `always_return_pooled`.
    """

    def __init__(
        self,
        arch: str | Mapping = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        always_return_pooled: bool = False,
        legacy: bool = True,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(arch, max_length, freeze, layer, tokenizer)
        if legacy and always_return_pooled:
            raise InputError("FrozenOpenCLIPEmbedder2: always_return_pooled needs legacy: false")
        self.legacy, self.always_return_pooled = legacy, always_return_pooled

    def forward(self, text: str | Sequence[str]) -> Tensor | tuple[Tensor, Tensor]:
        """Prompts to [b, max_length, width], and with `always_return_pooled` [b, embed_dim] beside it."""
        ids = self._ids(text)
        before, last = self.model(ids)
        hidden = before if self.layer == "penultimate" else last
        if self.legacy:
            return self.model.ln_final(hidden)
        if not self.always_return_pooled:
            return hidden
        return hidden, self.model.pooled(self.model.ln_final(last), ids, self.tokenizer.eos_token_id)
