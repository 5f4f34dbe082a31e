"""Conditioning models: the frozen CLIP text encoder of Stable Diffusion v1, and class labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import read_weights
from ldm.config import find_file
from ldm.errors import InputError
from ldm.modules.encoders.bert import BERTEmbedder  # noqa: F401 (YAML files name it here)
from ldm.modules.encoders.claims import building, read_text_tower
from ldm.modules.encoders.tokenizers import load_tokenizer, refuse_code
from ldm.modules.encoders.tokens import NewTokens, read_embeddings

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


class FrozenCLIPEmbedder(nn.Module):
    """Prompts to the last hidden states of a CLIP text encoder, [b, max_length, d].

    `version` is a local folder with a CLIP `config.json` (and, if the encoder is to be used without a checkpoint of the
    whole model, `model.safetensors`), or the name of the encoder of Stable Diffusion v1. Its weights come with the
    checkpoint of the whole model. The tokenizer is loaded when the first prompt is read: from `tokenizer` (a folder
    with vocab.json and merges.txt), from `version` if that is a folder, from models/<name>, or from the hub's cache.

    State-dict names are those of released checkpoints (`transformer.text_model.*` and `position_ids`), whichever
    generation of transformers is installed; both spellings are read.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,  # LDM's argument; the module is where its parent is
        max_length: int = 77,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

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
        self.max_length = min(max_length, config.max_position_embeddings)  # what the encoder can take
        with building(folder):
            self.transformer = CLIPTextModel(config)
        self.new_tokens = NewTokens(self._text_model.embeddings.token_embedding)
        self._register_state_dict_hook(_to_released_names)
        self._register_load_state_dict_pre_hook(self._from_any_names)
        if (folder / "model.safetensors").is_file() and self.transformer.device.type != "meta":
            weights = read_weights(folder / "model.safetensors")
            self.load_state_dict({f"transformer.{k}": v for k, v in weights.items() if k.startswith("text_model.")})
        self.freeze()

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
        """The CLIP tokenizer. Raises `InputError` that says which two files to put where, if there is none."""
        return load_tokenizer("CLIPTokenizer", self.version, ["vocab.json", "merges.txt"], self.tokenizer_folder)

    def add_token(self, word: str, vectors: Tensor) -> None:
        """Teach the encoder a word with its own vectors [v, d]. Raises `InputError` for a width that does not fit."""
        width = self._text_model.embeddings.token_embedding.embedding_dim
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise InputError(
                f"token {word!r}: its vectors have shape {list(vectors.shape)}, this text encoder takes [n, {width}]"
            )
        if word in self.new_tokens.words:
            raise InputError(f"token {word!r} exists already; give the new one another name")
        names = self.new_tokens.add(word, vectors.to(self.transformer.device))
        self.tokenizer.add_tokens(names)
        if (ids := self.tokenizer.convert_tokens_to_ids(names)) != self.new_tokens.ids_of(word):
            raise InputError(f"the tokenizer is of another text encoder: it gives new words the ids {ids}")

    def load_embeddings(self, path: str | Path) -> list[str]:
        """Add the words of a textual-inversion file; the words. Raises `InputError`."""
        embeddings = read_embeddings(path)
        for word, vectors in embeddings.items():
            self.add_token(word, vectors)
        return list(embeddings)

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Token ids [b, max_length], padded and cut to length."""
        texts = [self.new_tokens.spell(t) for t in ([text] if isinstance(text, str) else text)]
        batch = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        return batch["input_ids"]

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Prompts to hidden states [b, max_length, d]."""
        ids = self.tokenize(text).to(self.transformer.device, non_blocking=True)
        return self.transformer(input_ids=ids).last_hidden_state

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
    """The encoder in Custom Diffusion's YAML: `modifier_token` says which words tuning adds, `<new1>+<new2>`."""

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
