"""The text encoder of LDM's text-to-image model: a transformer over BERT's word pieces, trained with the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.encoders.tokenizers import load_tokenizer


class Attention(nn.Module):
    """Eight heads of width 64 over tokens [b, n, dim], without a mask."""

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(t, "b n (heads d) -> b heads n d", heads=self.heads)
            for t in (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    """Four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.net = nn.Sequential(widen, nn.Identity(), nn.Linear(4 * dim, dim))  # the published code has dropout here

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Layers(nn.Module):
    """Attention and feed-forward in turn, each on the normed value and added to it."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        kinds = [Attention, FeedForward] * depth
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), kind(dim)]) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class TextTransformer(nn.Module):
    """Word-piece ids [b, n] to hidden states [b, n, dim], with the state-dict names of LDM's checkpoint."""

    def __init__(self, vocab_size: int, length: int, dim: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, dim)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, dim)})
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers = Layers(dim, depth)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size)  # unused: for training it as a language model

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_emb(ids) + self.pos_emb["emb"](positions)
        return self.norm(self.attn_layers(self.emb_dropout(x)))


class BERTEmbedder(nn.Module):
    """Prompts to hidden states [b, max_seq_len, n_embed] (arXiv 2112.10752, section 4.3.1)."""

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | None = None,  # unused, LDM's argument: the module follows its parent
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.length, self.use_tokenizer, self.tokenizer_folder = max_seq_len, use_tokenizer, tokenizer
        self.transformer = TextTransformer(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    @cached_property
    def tokenizer(self) -> Any:
        """The word pieces of bert-base-uncased. Raises `InputError`, see `load_tokenizer`."""
        return load_tokenizer("BertTokenizerFast", "bert-base-uncased", ["vocab.txt"], self.tokenizer_folder)

    def forward(self, text: Sequence[str] | Tensor) -> Tensor:
        """Prompts, or with `use_tokenizer=False` ids [b, n]."""
        ids = text
        if self.use_tokenizer:
            how = {"truncation": True, "padding": "max_length", "max_length": self.length, "return_tensors": "pt"}
            ids = self.tokenizer([text] if isinstance(text, str) else list(text), **how)["input_ids"]
        return self.transformer(ids.to(self.transformer.norm.weight.device))

    def encode(self, text: Sequence[str] | Tensor) -> Tensor:
        """LDM's name for `forward`."""
        return self(text)
