"""What the callback that compiles parts of a model changes: nothing but their speed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ldm.errors import InputError
from ldm.modules.diffusionmodules import model, openaimodel
from ldm.train.compiled import ChannelsLast, Compiled, compile_module, upsample
from tests import tuned_models
from tests.runs import TINY, last, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("module", [model.Upsample(4), openaimodel.Upsample(4, True)], ids=["first stage", "UNet"])
def test_upsampling_by_repetition_is_the_same(module):
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, actual = module(x), upsample(module, x)
    assert torch.equal(actual, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (expected, actual)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_an_unknown_part_is_named():
    for callback in (Compiled(["decoder"]), ChannelsLast(["decoder"])):
        with pytest.raises(InputError, match="callback (Compiled|ChannelsLast): Linear has no module 'decoder'"):
            callback.setup(None, torch.nn.Linear(1, 1), "fit")


def test_an_unknown_mode_is_named():
    with pytest.raises(InputError, match="unknown mode 'fast' of compilation: expected default, reduce-overhead"):
        compile_module(torch.nn.Linear(1, 1), "fast")


@pytest.fixture
def backend(monkeypatch):
    """torch.compile without its code generator, which takes half a minute; the modes it was asked for, the graphs."""
    seen = SimpleNamespace(modes=[], graphs=0)

    def count(graph, example_inputs):
        seen.graphs += 1
        return graph

    def compile_(self, mode=None):
        seen.modes.append(mode)
        self._compiled_call_impl = torch.compile(self._call_impl, backend=count)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    return seen


def test_a_compiled_training_has_the_same_losses(tmp_path, backend):
    plain, compiled = (
        train(tmp_path, name, "--max_steps", 4, *more)
        for name, more in {"plain": [], "compiled": ["--compile", "reduce-overhead"]}.items()
    )
    assert backend.modes == ["reduce-overhead"] and backend.graphs
    for name, value in last(plain)["state_dict"].items():
        torch.testing.assert_close(last(compiled)["state_dict"][name], value)


def test_adapters_are_switched_without_compiling_again(backend):
    unet = tuned_models.model(unet={"adapter_config": tuned_models.ROUTE}).model.diffusion_model
    compile_module(unet)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 128)
    with torch.no_grad():
        for enabled in (True, False):
            unet.adapters_enable(enabled)
            unet(*inputs)
        graphs = backend.graphs
        for enabled in (True, False, True):
            unet.adapters_enable(enabled)
            unet(*inputs)
    assert backend.graphs == graphs == 2


def test_sampling_with_a_compiled_unet(tmp_path, backend):
    common = ["--config", str(TINY), "--prompt", "a dog", "--ddim_steps", "2", "--n_iter", "1"]
    sample.main([*common, "--outdir", str(tmp_path / "plain")])
    sample.main([*common, "--outdir", str(tmp_path / "compiled"), "--compile"])
    first, second = (
        np.asarray(Image.open(tmp_path / name / "samples/00000.png"), int) for name in ("plain", "compiled")
    )
    assert backend.modes == ["default"] and abs(first - second).max() <= 1


def test_channels_last_changes_the_layout_and_nothing_else(tmp_path, monkeypatch):
    held = []
    change = ChannelsLast.change
    monkeypatch.setattr(ChannelsLast, "change", lambda self, part: (change(self, part), held.append(part)))
    last_callback = "lightning.callbacks.last={target: ldm.train.compiled.ChannelsLast, params: {modules: [model]}}"
    plain, changed = (train(tmp_path, name, "--max_steps", 4, *more) for name, more in
                      {"plain": [], "changed": [last_callback]}.items())  # fmt: skip
    (unet,) = held
    kernels = [weight for weight in unet.parameters() if weight.dim() == 4 and weight.shape[2] > 1]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    for name, value in last(plain)["state_dict"].items():
        torch.testing.assert_close(last(changed)["state_dict"][name], value)


def test_gradients_of_accumulated_batches_are_copies_under_cuda_graphs():
    """A graph's replay writes into the memory of the last one: stood for by a gradient that changes afterwards."""

    class Replayed(torch.autograd.Function):
        memory = torch.zeros(2)

        @staticmethod
        def forward(_ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(_ctx, _grad):
            Replayed.memory += 1
            return Replayed.memory.view(2)

    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight = torch.nn.Parameter(torch.zeros(2))
    trainer = SimpleNamespace(accumulate_grad_batches=2)
    callback = Compiled(["part"], "reduce-overhead")
    callback.change = lambda module: None
    callback.setup(trainer, torch.nn.ModuleDict({"part": layer}), "fit")
    for _ in range(2):
        Replayed.apply(layer.weight).backward()
    assert layer.weight.grad.tolist() == [3.0, 3.0]  # 1 + 2, not 2 + 2
