"""Cached latents: every draw is a function of its number."""

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.latents import CachedLatents, save_latents
from ldm.data.sampling import as_draws
from ldm.util import InputError


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
    dataset = as_draws(CachedLatents(path))
    [batch] = DataLoader(dataset, batch_sampler=[[10**6, 3]])
    assert batch["image"].shape == (2, 2, 2, 4) and len(batch["caption"]) == 2


def test_other_files_are_refused(tmp_path):
    from ldm.checkpoints import save_safetensors

    save_safetensors(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(InputError, match="no cache of latents"):
        CachedLatents(tmp_path / "other.safetensors")
