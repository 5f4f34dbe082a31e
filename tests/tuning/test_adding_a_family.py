"""The example of docs/adding-a-family.md does what the page says."""

import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights
from tests import runs
from tests.conftest import ROOT
from tests.tuned_models import answer, model

PAGE = (ROOT / "docs" / "adding-a-family.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) <= 80


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch):
    (tmp_path / "ia3.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ia3", raising=False)
    chosen = OmegaConf.create(block("yaml")).model.params
    narrow = {"unet_config": {"params": {"adapter_config": None}}, **chosen}
    OmegaConf.save({"defaults": str(runs.TINY), "model": {"params": narrow}}, tmp_path / "ia3.yaml")
    run = runs.train(tmp_path, "ia3", config=tmp_path / "ia3.yaml")
    folder = run / "checkpoints" / "4-adapters"
    held = read_weights(folder / "tuned.safetensors")
    assert len(held) == 2 * 4 and all(name.endswith("parametrizations.weight.0.factor") for name in held)
    assert set(held) == set(runs.last(run)["state_dict"])
    assert all((value != 1).any() for value in held.values())
    allow = ["--allow_family", "ia3.IA3"]
    prompt = ["--prompt", "photo of a sks dog", "--n_iter", 1]
    sampling = tmp_path / "sampling.yaml"
    OmegaConf.save(
        {"defaults": str(runs.TINY), "model": {"params": {"unet_config": {"params": {"adapter_config": None}}}}},
        sampling,
    )
    (tuned,) = runs.sample(tmp_path / "tuned", *prompt, "--adapter_path", folder, *allow, config=sampling)
    (base,) = runs.sample(tmp_path / "base", *prompt, config=sampling)
    assert not torch.equal(runs.pixels(tuned), runs.pixels(base))


def test_the_example_starts_as_the_base(tmp_path, monkeypatch):
    (tmp_path / "ia3.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ia3", raising=False)
    tuned = model([{"target": "ia3.IA3"}])
    assert torch.equal(answer(tuned), answer(model()))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 2 * (32 + 64 + 32 + 32)
