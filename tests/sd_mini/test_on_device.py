"""SD-mini trained out of one packed file, in calls that go on where the last one ended."""

import json

import numpy as np
import pytest
import torch

from ldm.checkpoints import read_weights
from ldm.data.captioned import CaptionedPictures
from ldm.errors import InputError
from ldm.muon import Muon
from scripts.sd_mini import gpu, pack_pictures
from scripts.sd_mini.build.archive import write_records
from scripts.sd_mini.on_device.clock import Clock
from scripts.sd_mini.on_device.state import load_state, save_state
from scripts.sd_mini.on_device.training import Averages

CONFIG = """
data:
  params:
    train:
      params:
        shares: {drawing: 0.8, photo: 0.2}
        group_emphasis: {flag: 0.1}
"""


def record(i, kind, split, group):
    return {"captions": [f"a {group} {i}"], "split": split, "kind": kind, "style": "noto", "name": f"{group} {i}",
            "group": group, "weight": 1.0}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed file of 12 drawings, half of them flags, 6 photographs and 4 held-out pictures."""
    folder = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(0)
    rows = [record(i, "drawing", "train", "flag" if i % 2 else "cat") for i in range(12)]
    rows += [record(i, "photo", "train", "photo") for i in range(6)]
    rows += [record(i, "drawing", "val_known", "cat") for i in range(4)]
    pictures = [random.integers(0, 255, (64, 64, 3 if r["kind"] == "photo" else 4), np.uint8) for r in rows]
    write_records(folder / "all.tar", zip(rows, pictures, strict=True))
    (folder / "draws.yaml").write_text(CONFIG)
    pack_pictures.main(
        ["--data", str(folder / "all.tar"), "--draws_config", str(folder / "draws.yaml"), "--out",
         str(folder / "packed.tar"), "--photos", "4", "--quality", "50", "--megabytes", "1"]
    )  # fmt: skip
    return folder / "packed.tar"


def test_a_packed_file_draws_as_its_config_says(packed):
    pictures = CaptionedPictures(packed, split="train")
    kinds = [r["kind"] for r in pictures.records]
    assert kinds.count("photo") == 4
    weights = {kind: sum(r["weight"] for r in pictures.records if r["kind"] == kind) for kind in set(kinds)}
    assert weights == pytest.approx({"drawing": 0.8, "photo": 0.2})
    of = {g: sum(r["weight"] for r in pictures.records if r["group"] == g) for g in ("flag", "cat")}
    assert of["flag"] == pytest.approx(of["cat"] / 10)
    assert len(CaptionedPictures(packed, split=pack_pictures.HELD_OUT).records) == 4


def test_what_does_not_fit_is_what_is_drawn_least(packed, tmp_path, monkeypatch):
    everything = CaptionedPictures(packed, split="train").records
    options = ["--data", str(packed.parent / "all.tar"), "--draws_config", str(packed.parent / "draws.yaml"),
               "--photos", "1", "--quality", "1", "--megabytes", "1"]  # fmt: skip
    limit = sum(len(e) for r, e in pack_pictures.read_records(packed) if r["group"] != "flag" and r["kind"] != "photo")
    monkeypatch.setattr(pack_pictures, "MEGABYTE", limit + 2000)
    pack_pictures.main([*options, "--out", str(tmp_path / "small.tar")])
    kept = CaptionedPictures(tmp_path / "small.tar", split="train").records
    assert {r["group"] for r in kept} == {"cat", "photo"} and len(kept) < len(everything)


class Counted(Clock):
    """A clock on which every step takes a sixth of the time."""

    step = 0

    def rate(self, step):
        self.step = step
        return super().rate(step)

    @property
    def passed(self):
        return min(1.0, (self.step + 1) / 6)


@pytest.mark.slow
def test_a_call_goes_on_where_the_last_one_ended(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Clock", Counted)
    for prompts in ("PROMPTS", "KNOWN"):
        monkeypatch.setattr(gpu.evaluate, prompts, ["a cat", "a dog"])
    arguments = [
        "--data", str(packed), "--out", str(tmp_path), "--device", "cpu", "--draws", "24", "--held_out", "4",
        "--batch_size", "4", "--autoencoder_batch_size", "2", "--steps", "1", "--seconds", "0.5",
    ]  # fmt: skip
    shipped = read_weights("models/sd-mini/model.safetensors")
    gpu.main([*arguments, "--autoencoder_seconds", "0.3"])
    first = json.loads((tmp_path / "report.json").read_text())
    assert first["steps"] == 6 and first["steps_before"] == 0 and first["autoencoder_steps"] == 6
    assert first["before"]["psnr_drawing"] > 5 and first["after"]["loss"] > 0
    weights = read_weights(tmp_path / "model.safetensors")
    assert weights.keys() == shipped.keys()
    assert all(weights[name].dtype == value.dtype for name, value in shipped.items())
    changed = {name.split(".")[0] for name, value in weights.items() if not torch.equal(value, shipped[name])}
    assert changed == {"model", "first_stage_model"}  # the text encoder stays as it is
    assert (tmp_path / "prompts.png").is_file() and (tmp_path / "known.png").is_file()

    gpu.main([*arguments, "--decay", "0", "--autoencoder_seconds", "9"])
    second = json.loads((tmp_path / "report.json").read_text())
    assert second["steps_before"] == 4 and "autoencoder_steps" not in second  # where the rate began to fall
    assert second["before"]["psnr_drawing"] == pytest.approx(first["after"]["psnr_drawing"], abs=0.05)


def test_a_state_comes_back_as_it_was_in_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.sd_mini.on_device.state.PART_BYTES", 300)

    def fresh(seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        return net, Muon(net.parameters(), lr=0.1), Averages(list(net.parameters()))

    def step(net, optimizer, averages):
        net(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update()

    one = fresh(0)
    step(*one)
    save_state(tmp_path, *one[1:], steps=1)
    assert len(list(tmp_path.glob("state-*"))) > 2
    other = fresh(1)
    assert load_state(tmp_path, *other[1:]) == 1
    for both in (one, other):
        step(*both)
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[2].values, other[2].values, strict=True))

    next(tmp_path.glob("state-02-*")).unlink()
    with pytest.raises(InputError, match="bring all parts"):
        load_state(tmp_path, *fresh(2)[1:])


def test_the_rate_warms_up_stays_and_falls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(10, decay=0.5, warm_up=4)
    assert clock.rate(0) == 0.25 and not clock.over
    clock.begin()
    rates = []
    for now[0] in (1.0, 5.0, 7.5, 10.0):
        rates.append(clock.rate(100))
    assert rates == [1.0, 1.0, 0.5, 0.0] and clock.over
