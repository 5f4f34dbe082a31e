"""LoRAs of PEFT whose training began with another base (PiSSA, OLoRA, ...): converted by their start, or refused."""

import copy
import json

import pytest
import torch

from ldm.errors import InputError
from ldm.interchange import own, read_lora
from ldm.interchange.lora import delta
from ldm.interchange.names import TEXT
from ldm.modules.folders import write_folder
from tests import interchange_models
from tests.helpers import assert_close_to

torch.set_num_threads(1)
peft = pytest.importorskip("peft", reason="peft is not installed: pip install .[test]")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return interchange_models.small_model(interchange_models.small_config(tmp_path_factory.mktemp("clip")))


def trained(model, start, place):
    """A LoRA of the text encoder, written by PEFT before and after a training that is random here.

    Returns the changes of the released weights by LDM's layer names.
    """
    text = copy.deepcopy(model.cond_stage_model.transformer).requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    wrapped = peft.get_peft_model(text, config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(place / "first"))
    wrapped.peft_config["default"].init_lora_weights = start
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(place / "lora"))
    tuned, before = wrapped.merge_and_unload().state_dict(), model.cond_stage_model.transformer.state_dict()
    names = {name: f"{TEXT}text_model.{name.removeprefix('text_model.')}" for name in tuned if "_proj.weight" in name}
    changed = {theirs: ours for theirs, ours in names.items() if not torch.equal(tuned[theirs], before[theirs])}
    return {ours.removesuffix(".weight"): tuned[theirs] - before[theirs] for theirs, ours in changed.items()}


def check(found, expected):
    assert found.layers.keys() == expected.keys() and len(expected) == 4
    for name, change in expected.items():
        assert_close_to(delta(found.layers[name]), change, 1e-4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("inside", [True, False], ids=["in the folder", "beside the folder"])
def test_the_start_makes_it_a_lora_of_the_released_base(model, tmp_path, start, inside):
    expected = trained(model, start, tmp_path)
    with pytest.raises(InputError, match=f"lora was trained with init_lora_weights '{start}', .* changed base: put .*"):
        read_lora(tmp_path / "lora", model)
    kind = start.partition("_")[0]
    (tmp_path / "first").rename((tmp_path / "lora" if inside else tmp_path) / f"{kind}_init")
    check(read_lora(tmp_path / "lora", model), expected)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone(model, tmp_path, start):
    expected = trained(model, start, tmp_path)
    check(read_lora(tmp_path / "lora", model), expected)


def test_other_starts_are_refused(model, tmp_path):
    trained(model, True, tmp_path)
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    for start, told in (("corda", "changed base"), ("loftq", "changed base"), ("dice", "'dice'; expected one of True")):
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**written, "init_lora_weights": start}))
        with pytest.raises(InputError, match=told):
            read_lora(tmp_path / "lora", model)
    (tmp_path / "corda_init").mkdir()
    with pytest.raises(InputError, match="corda_init"):
        own_start = json.dumps({**written, "init_lora_weights": "corda"})
        (tmp_path / "lora/adapter_config.json").write_text(own_start)
        read_lora(tmp_path / "lora", model)


def test_a_start_of_our_own_training_is_refused_too(tmp_path):
    entry = {"family": "lora", "params": {"options": {"init_lora_weights": "pissa"}}}
    factors = {f"a.lora_{role}.default.weight": torch.ones(4, 4) for role in "AB"}
    write_folder(tmp_path / "own", {"adapters": [], "families": [{**entry, "tensors": list(factors)}]}, {}, factors)
    with pytest.raises(InputError, match="own was trained with init_lora_weights 'pissa'"):
        own.lora(tmp_path / "own")
