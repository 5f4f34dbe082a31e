"""Conditioning models: the frozen CLIP text encoder of Stable Diffusion v1, and class labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import read_weights
from ldm.config import find_file
from ldm.errors import InputError
from ldm.modules.encoders.bert import BERTEmbedder  # noqa: F401 (YAML files name it here)
from ldm.modules.encoders.claims import building, read_text_tower
from ldm.modules.encoders.cleaning import around, clip_text
from ldm.modules.encoders.conditioner import ConcatTimestepEmbedderND, GeneralConditioner  # noqa: F401 (as in sgm)
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2  # noqa: F401
from ldm.modules.encoders.tokenizers import load_tokenizer, refuse_code
from ldm.modules.encoders.tokens import LearnsWords, NewTokens

# Architecture of openai/clip-vit-large-patch14, the text encoder of Stable Diffusion v1 (arXiv 2103.00020, table 20).
CLIP_VIT_L_14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


class FrozenCLIPEmbedder(LearnsWords):
    """Prompts to the last hidden states of a CLIP text encoder, [b, max_length, d].

    `version` is a local folder with a CLIP `config.json` (and, if the encoder is to be used without a checkpoint of the
    whole model, `model.safetensors`), or the name of the encoder of Stable Diffusion v1. Its weights come with the
    checkpoint of the whole model. The tokenizer is loaded when the first prompt is read: from `tokenizer` (a folder
    with vocab.json and merges.txt), from `version` if that is a folder, from models/<name>, or else the vocabulary that
    comes with this package. Nothing is downloaded. Text is cleaned as the published tokenizer does.

    State-dict names are those of released checkpoints (`transformer.text_model.*` and `position_ids`), whichever
    generation of transformers is installed; both spellings are read.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,  # unused, LDM's argument: the module follows its parent
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        always_return_pooled: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        if layer not in ("last", "pooled", "hidden"):
            raise InputError(f"FrozenCLIPEmbedder: layer must be last, pooled or hidden, got {layer!r}")
        self.layer, self.layer_idx, self.always_return_pooled = layer, layer_idx, always_return_pooled
        self.version, self.tokenizer_folder = version, tokenizer
        folder = find_file(version)
        if (folder / "config.json").is_file():
            with building(refuse_code(folder)):
                config = CLIPTextConfig(**read_text_tower(folder))
        elif version == "openai/clip-vit-large-patch14":
            config = CLIPTextConfig(**CLIP_VIT_L_14)
        else:
            raise InputError(
                f"text encoder {version!r}: expected a folder with config.json or openai/clip-vit-large-patch14"
            )
        self.max_length = min(max_length, config.max_position_embeddings)  # the limit of the encoder
        layers = config.num_hidden_layers
        if layer == "hidden" and (layer_idx is None or abs(layer_idx) > layers):
            raise InputError(f"FrozenCLIPEmbedder: layer hidden needs a layer_idx from 0 to {layers}, got {layer_idx}")
        with building(folder):
            self.transformer = CLIPTextModel(config)
        self.new_tokens = NewTokens(self.token_embedding)
        self._register_state_dict_hook(_to_released_names)
        self._register_load_state_dict_pre_hook(self._from_any_names)
        if (folder / "model.safetensors").is_file() and self.transformer.device.type != "meta":
            weights = read_weights(folder / "model.safetensors")
            self.load_state_dict({f"transformer.{k}": v for k, v in weights.items() if k.startswith("text_model.")})
        if freeze:
            self.freeze()

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of the vocabulary, [vocab_size, d]."""
        return self._text_model.embeddings.token_embedding

    @property
    def _text_model(self) -> nn.Module:
        """The part that transformers 5 merged into CLIPTextModel."""
        return getattr(self.transformer, "text_model", self.transformer)

    def _from_any_names(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        outer = prefix + "transformer."
        inner = outer + ("text_model." if hasattr(self.transformer, "text_model") else "")
        for name in [name for name in state if name.startswith(outer)]:
            value = state.pop(name)
            if not name.endswith("position_ids"):
                state[inner + name.removeprefix(outer).removeprefix("text_model.")] = value

    def freeze(self) -> None:
        """Evaluation mode, no gradients."""
        self.transformer.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The CLIP tokenizer. If there is none, raises an `InputError` that says which files to put where."""
        is_clips = self.transformer.config.vocab_size == CLIP_VIT_L_14["vocab_size"]
        files = ["vocab.json", "merges.txt"]
        return load_tokenizer("CLIPTokenizer", self.version, files, self.tokenizer_folder, shipped=is_clips)

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Token ids [b, max_length], padded and cut to length."""
        names = ["<|startoftext|>", "<|endoftext|>", *self.new_tokens.vectors]
        texts = [self.new_tokens.spell(t) for t in ([text] if isinstance(text, str) else text)]
        batch = self.tokenizer(
            [around(clip_text, t, names) for t in texts],
            truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt",
        )  # fmt: skip
        return batch["input_ids"]

    def tokens_of(self, text: str) -> list[int]:
        """All token ids of a text, without markers and without limit."""
        names = ["<|startoftext|>", "<|endoftext|>", *self.new_tokens.vectors]
        cleaned = around(clip_text, self.new_tokens.spell(text), names)
        return self.tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"]

    def with_markers(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of at most max_length - 2 token ids as [b, max_length]: markers around them, padding behind."""
        start, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        framed = [[start, *row, end] for row in rows]
        return torch.tensor([row + [pad] * (self.max_length - len(row)) for row in framed])

    def forward(self, text: str | Sequence[str]) -> Tensor | tuple[Tensor, Tensor]:
        """Prompts to hidden states [b, max_length, d]; with `always_return_pooled` also the pooled state [b, d].

        `layer`: `last` is the last layer's with the final norm, `hidden` that after `layer_idx` layers without it, and
        `pooled` the state of the first end marker as the only token, [b, 1, d].
        """
        return self.encode_ids(self.tokenize(text))

    def encode_ids(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The same as `forward`, from token ids [b, max_length]."""
        ids = ids.to(self.transformer.device, non_blocking=True)
        out = self.transformer(input_ids=ids, output_hidden_states=self.layer == "hidden")
        last = out.last_hidden_state
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        z = {
            "last": lambda: last,
            "pooled": lambda: pooled[:, None],
            "hidden": lambda: out.hidden_states[self.layer_idx],
        }[self.layer]()
        return (z, pooled) if self.always_return_pooled else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """LDM's name for `forward`."""
        return self(text)


def _to_released_names(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    outer = prefix + "transformer."
    for name in [name for name in state if name.startswith(outer)]:
        value = state.pop(name)
        state[outer + "text_model." + name.removeprefix(outer).removeprefix("text_model.")] = value
    positions = module._text_model.embeddings.position_ids
    state[outer + "text_model.embeddings.position_ids"] = positions


class FrozenCLIPEmbedderWrapper(FrozenCLIPEmbedder):
    """The encoder in Custom Diffusion's YAML: `modifier_token` names the words that tuning adds, `<new1>+<new2>`."""

    def __init__(self, modifier_token: str = "", **clip: Any) -> None:
        super().__init__(**clip)
        self.modifier_token = modifier_token.split("+")


class ClassEmbedder(nn.Module):
    """Class labels to one learnt context token each, [b, 1, embed_dim]."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor] | Tensor, key: str | None = None) -> Tensor:
        labels = batch if isinstance(batch, torch.Tensor) else batch[key or self.key]
        return self.embedding(labels.reshape(-1))[:, None]
