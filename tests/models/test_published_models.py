"""The published autoencoder and latent diffusion configs at reduced width: each builds and takes a step of training."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.config import instantiate_from_config, load_config, plain
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

LATENT = sorted((ROOT / "configs/latent-diffusion").glob("*.yaml"))
FIRST_STAGES = sorted((ROOT / "configs/autoencoder").glob("*.yaml"))
SIDE = 128  # an eighth of it halved four times


class Batches(Dataset):
    """Two batches of noise with whatever the models condition on."""

    def __len__(self):
        return 4

    def __getitem__(self, k):
        generator = torch.Generator().manual_seed(k)
        return {
            "image": torch.rand(SIDE, SIDE, 3, generator=generator) * 2 - 1,
            "class_label": torch.tensor(k),
            "caption": torch.randint(0, 40, (7,), generator=generator),
        }


def narrow_first_stage(params):
    params["ddconfig"] |= {"ch": 32, "ch_mult": [1] * len(params["ddconfig"]["ch_mult"]), "num_res_blocks": 1}
    params["ddconfig"] |= {
        "resolution": SIDE,
        "attn_resolutions": [4] if params["ddconfig"]["attn_resolutions"] else [],
    }
    params.pop("ckpt_path", None)
    if "n_embed" in params:
        params["n_embed"] = 16


def narrow(path):
    """The model section of a config with the same classes, levels and conditioning, and few channels."""
    model = plain(load_config(path).model)
    params = model["params"]
    if "ddconfig" in params:
        narrow_first_stage(params)
        params["lossconfig"]["params"] |= {"disc_start": 1, "disc_num_layers": 1, "perceptual_weight": 0.0}
        return model
    unet = params["unet_config"]["params"]
    unet |= {"model_channels": 32, "num_res_blocks": 1}
    if "context_dim" in unet:
        unet["context_dim"] = 16
    narrow_first_stage(params["first_stage_config"]["params"])
    if params["cond_stage_config"] != "__is_unconditional__":
        condition = params["cond_stage_config"]["params"]
        for key, value in {"embed_dim": 16, "n_embed": 16, "n_layer": 1}.items():
            if key in condition:
                condition[key] = value
        if "BERT" in params["cond_stage_config"]["target"]:
            condition |= {"vocab_size": 40, "use_tokenizer": False}
    return model


@pytest.mark.parametrize("path", [*FIRST_STAGES, *LATENT], ids=lambda path: path.stem)
def test_builds_and_takes_a_step(path):
    config = narrow(path)
    if "VQ" in str(config):
        pytest.importorskip("taming.modules.vqvae.quantize", reason="vector quantisation needs the extra vq")
    model = instantiate_from_config(config)
    model.learning_rate = 1e-3
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Batches(), batch_size=2))
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p)}
    assert trainer.global_step >= 2 and len(moved) > 0.2 * len(before)  # layers behind zeros wait for their turn
    assert all(p.isfinite().all() for p in model.parameters())


def test_class_and_text_conditions_are_covered():
    conditions = [narrow(path)["params"]["cond_stage_config"] for path in LATENT]
    targets = {condition["target"].rpartition(".")[2] for condition in conditions if isinstance(condition, dict)}
    assert targets == {"ClassEmbedder", "BERTEmbedder"} and "__is_unconditional__" in conditions
