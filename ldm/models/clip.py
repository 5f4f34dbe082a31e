"""Contrastive training of CLIP (Radford et al., arXiv 2103.00020) with the networks of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoints import atomic_write, read_weights
from ldm.config import find_file, instantiate_from_config
from ldm.errors import InputError
from ldm.lightning import module_class
from ldm.models.building import load_weights
from ldm.modules.encoders.claims import building, read_clip
from ldm.modules.encoders.tokenizers import read_tokenizer, refuse_code


class CLIP(module_class()):
    """The two towers of a CLIP folder (`config.json`, tokenizer, and weights if it has them), and their training.

    Pictures are [b, 3, h, w] in -1 .. 1. The training run sets `learning_rate`.
    Raises `InputError` for a folder without a CLIP `config.json`.
    """

    learning_rate = 1e-3

    def __init__(
        self,
        folder: str,
        weight_decay: float = 0.1,
        scheduler_config: Mapping | None = None,
        image_key: str = "image",
        caption_key: str = "caption",
    ) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        self.folder = find_file(folder)
        if not (self.folder / "config.json").is_file():
            raise InputError(f"no CLIP in {folder}: expected config.json, vocab.json and merges.txt there")
        with building(refuse_code(self.folder)):
            self.clip = CLIPModel(CLIPConfig(**read_clip(self.folder)))
        self.tokenizer = read_tokenizer("CLIPTokenizer", self.folder)
        self.weight_decay, self.scheduler_config = weight_decay, scheduler_config
        self.image_key, self.caption_key = image_key, caption_key
        if (self.folder / "model.safetensors").is_file():
            weights = read_weights(self.folder / "model.safetensors")
            load_weights(self.clip, weights, str(self.folder / "model.safetensors"))

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [b, n], padded and cut to the length of the text tower."""
        length = self.clip.config.text_config.max_position_embeddings
        how = {"truncation": True, "max_length": length, "padding": "max_length", "return_tensors": "pt"}
        return self.tokenizer(list(captions), **how)["input_ids"]

    def embed(self, pictures: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [b, d] of pictures and of captions."""
        out = self.clip(pixel_values=pictures, input_ids=ids)
        return F.normalize(out.image_embeds, dim=-1), F.normalize(out.text_embeds, dim=-1)

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors [b, d] of pictures [b, 3, h, w] in -1 .. 1."""
        pooled = self.clip.vision_model(pixel_values=pictures.to(self.device)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [b, d] of captions."""
        pooled = self.clip.text_model(input_ids=self.tokenize(captions).to(self.device)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The contrastive loss of a batch: `image` [b, h, w, 3] in -1 .. 1 and `caption`, b strings."""
        ids = self.tokenize(batch[self.caption_key]).to(self.device)
        pictures, texts = self.embed(batch[self.image_key].movedim(-1, 1), ids)
        same = (ids[:, None] == ids).all(-1)
        return contrastive_loss(pictures, texts, self.clip.logit_scale, same)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[self.caption_key]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Logs `val/loss`."""
        self.log("val/loss", self.loss(batch), batch_size=len(batch[self.caption_key]), sync_dist=True)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        self.clip.logit_scale.clamp_(max=torch.tensor(100.0).log())  # arXiv 2103.00020, Sec. 2.5

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay only for matrices, and the config's schedule per step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98))
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def save(self, folder: str | Path) -> None:
        """Write the weights in half precision as `model.safetensors` with the names of released CLIP models."""
        with atomic_write(Path(folder) / "model.safetensors") as beside:
            self.clip.half().save_pretrained(beside.parent / "clip")
            (beside.parent / "clip" / "model.safetensors").rename(beside)
        self.clip.float()


def contrastive_loss(pictures: Tensor, texts: Tensor, logit_scale: Tensor, same: Tensor) -> Tensor:
    """The symmetric loss of arXiv 2103.00020, Fig. 3, for unit vectors [b, d].

    `same` [b, b] marks pairs with the same caption. They share the target, as in UniCL (arXiv 2204.03610, Eq. 3),
    because "a photo of a dog" is correct for every dog.
    """
    logits = logit_scale.exp() * pictures @ texts.T
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
