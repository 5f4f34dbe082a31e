"""Cached latents: every draw is a function of its number."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from ldm.checkpoints import save_torch
from ldm.config import instantiate_from_config, load_config
from ldm.data.latents import CachedLatents, save_latents
from ldm.data.sampling import as_samples
from ldm.errors import InputError
from scripts import cache_latents
from scripts.sd_mini.build.archive import write_records


@pytest.fixture
def path(tmp_path):
    latents = torch.arange(10.0)[:, None, None, None].expand(10, 4, 2, 2)
    save_latents(tmp_path / "latents.safetensors", latents, [f"number {i}" for i in range(10)])
    return tmp_path / "latents.safetensors"


def test_draws_do_not_depend_on_what_was_drawn_before(path):
    one, other = CachedLatents(path, ucg_rate=0.3, seed=5), CachedLatents(path, ucg_rate=0.3, seed=5)
    together = one.__getitems__(list(range(20)))
    for k in (19, 3, 7):
        assert torch.equal(other[k]["image"], together[k]["image"])
        assert other[k]["caption"] == together[k]["caption"]


def test_latents_keep_their_captions_but_for_the_share_that_is_dropped(path):
    items = CachedLatents(path, ucg_rate=0.25).__getitems__(list(range(4000)))
    assert items[0]["image"].shape == (2, 2, 4)
    told = [item for item in items if item["caption"]]
    assert all(item["caption"] == f"number {int(item['image'][0, 0, 0])}" for item in told)
    assert abs(len(told) / 4000 - 0.75) < 0.03
    assert {int(item["image"][0, 0, 0]) for item in items} == set(range(10))


def test_any_draw_can_be_asked_for_in_batches(path):
    dataset = as_samples(CachedLatents(path))
    [batch] = DataLoader(dataset, batch_sampler=[[10**6, 3]])
    assert batch["image"].shape == (2, 2, 2, 4) and len(batch["caption"]) == 2


def test_other_files_are_refused(tmp_path):
    from ldm.checkpoints import save_safetensors

    save_safetensors(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(InputError, match="no cache of latents"):
        CachedLatents(tmp_path / "other.safetensors")


def config(folder):
    """A small autoencoder and five captioned pictures, written into a folder."""
    records = [
        ({"captions": [f"number {i}"], "split": "train", "kind": "photo"}, np.full((64, 64, 3), 40 * i, np.uint8))
        for i in range(5)
    ]
    write_records(folder / "captioned.tar.gz", records)
    shipped = load_config("configs/sd-mini/train/autoencoder.yaml")
    changed = {
        "model": {"params": {"ddconfig": {"ch": 32, "ch_mult": [1, 1, 1]}}},
        "data": {"params": {"train": {"params": {"path": str(folder / "captioned.tar.gz"), "shares": None}}}},
    }
    return OmegaConf.merge(shipped, changed)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."], ids=["autoencoder", "diffusion model"])
def test_pictures_become_latents(tmp_path, capsys, prefix):
    """The script, with a small autoencoder: latents are draws of its posterior, captions those of the pictures."""
    OmegaConf.save(config(tmp_path), tmp_path / "config.yaml")
    held = load_config(tmp_path / "config.yaml")
    torch.manual_seed(0)
    autoencoder = instantiate_from_config(held.model)
    weights = {prefix + name: value for name, value in autoencoder.state_dict().items()}
    save_torch(tmp_path / "last.ckpt", {"state_dict": weights})
    words = [
        "--config",
        tmp_path / "config.yaml",
        "--ckpt",
        tmp_path / "last.ckpt",
        "--out",
        tmp_path / "out.safetensors",
    ]
    cache_latents.main([str(word) for word in [*words, "--draws", 7, "--batch_size", 3, "--device", "cpu"]])
    made = CachedLatents(tmp_path / "out.safetensors")
    batch = instantiate_from_config(held.data.params.train).batch(range(7))
    posterior = autoencoder.eval().encode(autoencoder.get_input(batch, "image"))
    assert made.captions == batch["caption"] and made.latents.shape == (7, 16, 16, 4)
    away = (made.latents.movedim(-1, 1).float() - posterior.mean) / posterior.std
    assert 0.9 < away.std() < 1.1
    assert f"scale_factor {1 / made.latents.float().std():.4f}" in capsys.readouterr().out
