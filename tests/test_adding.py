"""The examples of docs/adding.md do what the page says."""

import re
import sys

import pytest
import torch

from ldm import commands
from ldm.cli import Parser
from ldm.evaluate import metrics
from ldm.generate import Settings, generate
from ldm.models.diffusion import prediction, samplers
from ldm.modules import adapters, attention
from tests import tuned_models
from tests.conftest import ROOT
from tests.helpers import assert_close_to
from tests.tuned_models import answer, model, shake

PAGE = (ROOT / "docs" / "adding.md").read_text()


def example(name: str) -> dict:
    """What the example of this name defines, once it has run."""
    (code,) = re.findall(rf"```python\n# {name}\n(.*?)```", PAGE, re.DOTALL)
    defined = {"__name__": f"example_{name}"}
    exec(compile(code, f"docs/adding.md ({name})", "exec"), defined)
    return defined


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """What the examples put into tables does not stay there."""
    for module, name in (
        (adapters, "FORMS"), (samplers, "SAMPLERS"), (prediction, "PREDICTIONS"), (metrics, "METRICS"),
        (commands, "VERBS"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


def route(reads: str, writes: str, **more) -> list[dict]:
    entry = {"din": reads, "dout": writes, "mid_dim": 4, **more}
    return [{"family": "position", "params": {"adapter_config": {"transformer_adp_config": [entry]}}}]


def test_a_position(monkeypatch, tmp_path):
    block = example("position")["WithNorm"]
    block.__name__ = "BasicTransformerBlock"  # as it is called where it stands in the file itself
    plain = answer(model())
    monkeypatch.setattr(attention, "BasicTransformerBlock", block)
    tuned = model(route("norm1o", "ffni"))
    assert torch.equal(answer(tuned), plain)
    shake(tuned)
    assert not torch.allclose(answer(tuned), plain)
    tuned.model.diffusion_model.save_adapter_to_dir(tmp_path / "adapters")
    again = model()
    again.model.diffusion_model.load_adapter_from_dir(tmp_path / "adapters")
    assert torch.equal(answer(again), answer(tuned))


def test_a_form(tmp_path):
    adapters.FORMS |= {"gate": example("form")["Gate"]}
    tuned = model(route("attn2o", "ffni", form="gate"))
    assert torch.equal(answer(tuned), answer(model()))
    shake(tuned)
    assert not torch.allclose(answer(tuned), answer(model()))
    tuned.model.diffusion_model.save_adapter_to_dir(tmp_path / "adapters")
    again = model()
    again.model.diffusion_model.load_adapter_from_dir(tmp_path / "adapters")
    assert torch.equal(answer(again), answer(tuned))
    with pytest.raises(ValueError, match="form must be one of conv, got 'gate'"):
        adapters.check_entry("resblock_adp_config", {"din": "resi", "dout": "resi", "mid_dim": 2, "form": "gate"})


def test_a_sampler():
    example("sampler")
    (row,) = [samplers.SAMPLERS["plain_euler"]]
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alphas_cumprod = tuned_models.model().alphas_cumprod
    levels = row.steps(alphas_cumprod, 20)

    def exact(x, t):
        level = min(levels, key=lambda one: abs(one.t - t[0].item()))
        return (x - level.alpha * x0) / level.sigma

    start = levels[0].alpha * x0 + levels[0].sigma * torch.ones_like(x0)
    assert_close_to(row.function(exact, start, levels, None), levels[-1].alpha * x0, 0.05)
    with pytest.raises(ValueError, match="Euler is deterministic"):
        row.steps(alphas_cumprod, 20, 0.5)
    pictures = generate(model(channels=4), ["a cat"], [1], Settings(sampler="plain_euler", steps=3))
    assert torch.isfinite(pictures).all()


def test_a_prediction():
    example("prediction")
    tuned = model(parameterization="flow")
    assert tuned.prediction.name == "flow"
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 90])
    tuned.apply_model = lambda x, t, c=None: noise - x0
    assert_close_to(tuned.predict_noise(tuned.q_sample(x0, t, noise), t), noise, 1e-3)
    loss, _ = tuned.p_losses(x0, None, t, noise)
    assert loss.item() == 0


def test_a_metric():
    example("metric")
    samples, references = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert metrics.METRICS["nearest"].function(samples, references).tolist() == pytest.approx([1, 0.5**0.5])


def test_a_verb(monkeypatch, tmp_path, capsys):
    (code,) = re.findall(r"```python\n# verb\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "count.py").write_text(code)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "__init__.py"))
    commands.VERBS["mine"] = ("count",)
    try:
        assert commands.help_of("count") == "How many tensors files hold."
        weights = ROOT / "models/sd-mini/model.safetensors"
        commands.Program("count")([str(weights)])
    finally:
        sys.modules.pop("ldm.commands.count", None)
    out = capsys.readouterr().out.split()
    assert out[0] == str(weights) and int(out[1]) > 400
    assert isinstance(commands.Program("count").fill(Parser()), Parser)


def test_every_example_is_tested():
    names = re.findall(r"```python\n# (\w+)\n", PAGE)
    assert names == ["position", "form", "sampler", "prediction", "metric", "verb"]
    assert {f"test_a_{name}" for name in names} <= globals().keys()


