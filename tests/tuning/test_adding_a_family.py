"""The example of docs/adding-a-family.md does what the page says."""

import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights
from ldm.commands import Program
from ldm.errors import InputError
from tests import runs
from tests.conftest import ROOT
from tests.tuned_models import answer, model

PAGE = (ROOT / "docs" / "adding-a-family.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) <= 80


@pytest.fixture
def ia3(tmp_path, monkeypatch):
    """The module of the page on the path, and a config that trains it on the tiny model."""
    (tmp_path / "ia3.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ia3", raising=False)
    chosen = OmegaConf.create(block("yaml")).model.params
    narrow = {"unet_config": {"params": {"adapter_config": None}}, **chosen}
    OmegaConf.save({"defaults": str(runs.TINY), "model": {"params": narrow}}, tmp_path / "ia3.yaml")
    return tmp_path / "ia3.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_resumes_to_the_bit_on_either_base(tmp_path, ia3, precision):
    more = ["--base_precision", precision, "--no-test"]
    whole = runs.train(tmp_path, "whole", "--max_steps", 2, *more, config=ia3)
    parts = runs.train(tmp_path, "parts", "--max_steps", 1, *more, config=ia3)
    with pytest.raises(InputError, match="ia3.IA3"):  # a stored config imports nothing unasked
        runs.resume(parts, "--max_steps", 2)
    runs.resume(parts, "--max_steps", 2, "--allow_family", "ia3.IA3")
    assert runs.differences(runs.last(whole), runs.last(parts)) == []
    factors = runs.last(whole)["state_dict"].values()
    assert all(value.dtype == torch.float32 and (value != 1).any() for value in factors)


@pytest.mark.slow
def test_it_trains_side_by_side_with_others(tmp_path, ia3):
    sgd = "model.params.optimizer_config={target: torch.optim.SGD}"
    photos, others = runs.pictures(tmp_path / "photos", 4), runs.pictures(tmp_path / "class", 3, 1)
    roots = ["--class_word", "dog", "--data_root", photos, "--reg_data_root", others]
    words = [*roots, "--class_word", "dog", "--accelerator", "cpu", "--max_steps", "3", sgd]
    configs = ["--base", str(ia3), str(runs.TINY)]
    Program("train-many")([*map(str, ["-t", "-n", "many", "--logdir", tmp_path / "logs", *configs, *words])])
    alone = runs.train(tmp_path, "alone", "--max_steps", 3, sgd, "--no-test", config=ia3)
    (folder,) = runs.find_run(tmp_path, "many").glob("*ia3*")
    here, there = (read_weights(f / "checkpoints" / "3-adapters" / "tuned.safetensors") for f in (folder, alone))
    assert here.keys() == there.keys()
    assert all(torch.allclose(here[name], there[name], atol=1e-6) for name in there)


@pytest.mark.slow
def test_the_example(tmp_path, ia3):
    run = runs.train(tmp_path, "ia3", config=ia3)
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
