"""Every family of tuning: what learns and what does not, folders that rebuild it, strengths, refusals."""

import importlib
import json
import re
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights
from ldm.config import load_config
from ldm.errors import InputError
from ldm.tuning import choose, families, files, table
from ldm.tuning.full import ByName
from tests import runs
from tests.conftest import ROOT
from tests.helpers import assert_close_to
from tests.tuned_models import ROUTE, answer, base_weights, batch, family, model, shake, train

pytestmark = pytest.mark.slow

POSITION = family("position.PositionAdapters", adapter_config=ROUTE)
WORD = family("textual_inversion.TextualInversion", words="<sks>", init_word="dog", vectors=2)
LORA = family("lora.LoRA", rank=2)
TEXT_LORA = family("lora.LoRA", rank=2, targets=["cond_stage_model.*.self_attn.*_proj"])

SEARCH = family("search.RouteSearch", routes=["attn2o-ffni", "ffni-transo"], mid_dim=4)

# family: a pattern that all its names match, and how many names there are.
FAMILIES = {
    "position": (POSITION, r"^model\..*\.adapter_inout\.adp\.[02]\.(weight|bias)$", 4 * 4),
    "route-search": (SEARCH, r"^(model\..*\.adapter_inout(_1)?\.adp\.[02]\.\w+|route_gates\.logits)$", 8 * 4 + 1),
    "crossattn-kv": (family("cross_attention.CrossAttention"), r"^model\..*\.attn2\.to_[kv]\.weight$", 2 * 4),
    "crossattn": (family("cross_attention.CrossAttention", freeze_model="crossattn"), r"^model\..*\.attn2\.", 5 * 4),
    "words": (WORD, r"^cond_stage_model\.new_tokens\.vectors\.<new0-[01]>$", 2),
    "lora": (LORA, r"^model\..*\.attn[12]\.to_(q|k|v|out\.0)\.lora_[AB]\.default\.weight$", 2 * 8 * 4),
    "text-lora": (TEXT_LORA, r"^cond_stage_model\..*self_attn\..*_proj\.lora_[AB]\.default\.weight$", 2 * 4 * 4),
    "unet": (family("full.UNet"), r"^model\.", None),
    "text": (family("full.ConditionStage"), r"^cond_stage_model\.transformer\.", None),
    "biases": (family("biases.Biases"), r"^model\..*\.bias$", None),
    "norms": (family("norms.Norms"), r"^model\..*(norm\d?|in_layers\.0|out_layers\.0|out\.0)\.(weight|bias)$", None),
}
ALL = pytest.mark.parametrize("name", FAMILIES)


def words_for(name):
    return ["photo of a <sks> dog", "a cat"] if name == "words" else ["photo of a sks dog", "a cat"]


@ALL
def test_names(name):
    entry, pattern, count = FAMILIES[name]
    tuned = model([entry])
    learning = tuned.trainable_parameters()
    state = tuned.state_dict(keep_vars=True)
    assert all(re.search(pattern, name) for name in learning) and len(learning) > 1
    assert count is None or len(learning) == count
    assert all(state[name] is value for name, value in learning.items())
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == {id(p) for p in learning.values()}


@ALL
def test_base_names_survive(name):
    entry, *_ = FAMILIES[name]
    tuned = model([entry])
    added = set(tuned.state_dict()) - set(base_weights())
    assert added <= set(tuned.trainable_parameters())
    assert set(base_weights()) <= set(tuned.state_dict())
    result = tuned.load_state_dict(base_weights(), strict=False)
    assert not result.unexpected_keys and len(result.missing_keys) == len(added)


@ALL
def test_only_what_should_move_moves(name):
    entry, *_ = FAMILIES[name]
    tuned = model([entry])
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    train(tuned, steps=3)
    after, learning = tuned.state_dict(), tuned.trainable_parameters()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved <= learning.keys()
    assert len(moved) > 0.8 * len(learning)


@ALL
def test_a_folder_rebuilds_it_on_a_fresh_base(name, tmp_path):
    entry, *_ = FAMILIES[name]
    tuned, words = shake(model([entry])), words_for(name)
    files.save(tuned, tmp_path / "folder", {"step": 3})
    fresh = model()
    files.load(fresh, tmp_path / "folder")
    assert torch.equal(answer(fresh.eval(), words), answer(tuned, words))
    assert not torch.equal(answer(fresh, words), answer(model(), words))
    again = model([entry])  # one that has the family already is filled in
    files.load(again, tmp_path / "folder")
    assert torch.equal(answer(again, words), answer(tuned, words))


@pytest.mark.parametrize("name", ["position", "crossattn-kv", "lora", "biases"])
def test_strength(name, tmp_path):
    tuned = shake(model([FAMILIES[name][0]]))
    files.save(tuned, tmp_path / "folder")
    outputs = {}
    for scale in (0.0, 0.5, 1.0):
        fresh = model()
        files.load(fresh, tmp_path / "folder", scale)
        outputs[scale] = answer(fresh.eval())
    assert_close_to(outputs[0.0], answer(model()), 1e-5)
    assert (outputs[0.5] - outputs[0.0]).abs().max() > 1e-3 and (outputs[0.5] - outputs[1.0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["position", "lora"])
def test_the_last_strength_holds(name, tmp_path):
    files.save(shake(model([FAMILIES[name][0]])), tmp_path / "folder")
    fresh, once = model(), model()
    for scale in (0.5, 0.25, 1.0, 0.5):
        files.load(fresh, tmp_path / "folder", scale)
    files.load(once, tmp_path / "folder", 0.5)
    assert torch.equal(answer(fresh.eval()), answer(once.eval()))


def test_strengths_of_several_add_up_on_the_same_weights(tmp_path):
    entry = family("cross_attention.CrossAttention")
    one, two = shake(model([entry]), seed=1), shake(model([entry]), seed=2)
    files.save(one, tmp_path / "1"), files.save(two, tmp_path / "2")
    both = model()
    files.load(both, tmp_path / "1", 0.5)
    files.load(both, tmp_path / "2", 0.25, add=True)
    for name, value in both.state_dict().items():
        base = base_weights()[name]
        expected = base + 0.5 * (one.state_dict()[name] - base) + 0.25 * (two.state_dict()[name] - base)
        assert_close_to(value.float(), expected.float(), 1e-6)


def test_two_loras_beside_each_other(tmp_path):
    one, two = shake(model([LORA]), seed=1), shake(model([family("lora.LoRA", rank=3)]), seed=2)
    files.save(one, tmp_path / "1"), files.save(two, tmp_path / "2")
    both = model()
    files.load(both, tmp_path / "1"), files.load(both, tmp_path / "2", 0.0, add=True)
    assert_close_to(answer(both.eval()), answer(one), 1e-5)
    swapped = model()
    files.load(swapped, tmp_path / "2"), files.load(swapped, tmp_path / "1", add=True)
    both = model()
    files.load(both, tmp_path / "1"), files.load(both, tmp_path / "2", add=True)
    assert_close_to(answer(both.eval()), answer(swapped.eval()), 1e-5)
    assert not torch.equal(answer(both), answer(one))


def test_a_combination_is_one_folder(tmp_path):
    tuned = shake(model([POSITION, WORD, LORA, TEXT_LORA, family("biases.Biases")]))
    files.save(tuned, tmp_path / "folder")
    about = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert [entry["din"] for entry in about["adapters"]] == ["attn2o"]
    assert [entry["target"].split(".")[-1] for entry in about["families"]] == [
        "TextualInversion", "LoRA", "LoRA", "Biases",
    ]  # fmt: skip
    held = set(read_weights(tmp_path / "folder" / "tuned.safetensors"))
    adapters = read_weights(tmp_path / "folder" / "adapters.safetensors")
    assert held | {f"model.diffusion_model.{name}" for name in adapters} == tuned.trainable_parameters().keys()
    fresh = model()
    files.load(fresh, tmp_path / "folder")
    assert torch.equal(answer(fresh.eval()), answer(tuned))


def test_a_folder_of_position_adapters_is_what_the_unet_writes(tmp_path):
    tuned = shake(model([POSITION]))
    files.save(tuned, tmp_path / "a", {"step": 1})
    tuned.model.diffusion_model.save_adapter_to_dir(tmp_path / "b", step=1)
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_another_base_is_told_and_other_widths_are_refused(tmp_path, caplog):
    files.save(shake(model([LORA])), tmp_path / "folder")
    files.load(model(seed=1), tmp_path / "folder")
    assert "another base model" in caplog.text
    caplog.clear()
    files.load(model(), tmp_path / "folder")
    assert "another base model" not in caplog.text
    config = tmp_path / "folder" / "adapter_config.json"
    config.write_text(config.read_text().replace('"rank": 2', '"rank": 5'))
    with pytest.raises(InputError, match=r"does not fit this model: .*lora_A.* has shape \[2, 32\], here .* \[5, 32\]"):
        files.load(model(), tmp_path / "folder")


def test_a_refused_folder_leaves_the_answers_as_they_were(tmp_path):
    files.save(shake(model([POSITION, family("biases.Biases"), WORD, LORA])), tmp_path / "folder")
    config = tmp_path / "folder" / "adapter_config.json"
    told = config.read_text()
    for old, new in (('"rank": 2', '"rank": 5'), ('"blocks": [', '"blocks": ["nowhere", '), (".to_v.", ".to_w.")):
        config.write_text(told.replace(old, new))
        fresh = model()
        with pytest.raises(InputError):
            files.load(fresh, tmp_path / "folder")
        assert torch.equal(answer(fresh.eval(), words_for("")), answer(model(), words_for("")))


# --- learning rates and stages


def test_each_family_may_have_a_learning_rate():
    tuned = model([LORA, TEXT_LORA | {"learning_rate": 5e-5}, WORD | {"learning_rate": 5e-3}])
    tuned.learning_rate = 1e-4
    groups = tuned.configure_optimizers().param_groups
    assert [(group["lr"], len(group["params"])) for group in groups] == [(1e-4, 64), (5e-5, 32), (5e-3, 2)]


def test_each_parameter_is_optimised_once():
    tuned = model([family("cross_attention.CrossAttention"), family("full.UNet"), family("biases.Biases")])
    tuned.learning_rate = 1e-4
    parameters = [p for group in tuned.configure_optimizers().param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(tuned.trainable_parameters())


@pytest.mark.parametrize("step,resting", [(0, "lora"), (1, "lora"), (2, ""), (3, "new_tokens")])
def test_outside_its_steps_a_family_has_no_gradient(step, resting, monkeypatch):
    tuned = model([WORD | {"steps": [0, 3]}, LORA | {"steps": [2, None]}])
    monkeypatch.setattr(type(tuned), "global_step", step)
    tuned.losses([batch()])[0][0].backward()
    tuned.on_before_optimizer_step(None)
    without = {name for name, value in tuned.trainable_parameters().items() if value.grad is None}
    assert without == {name for name in tuned.trainable_parameters() if resting and resting in name}


@pytest.mark.parametrize(
    "entry,message",
    [
        ({"target": "ldm.tuning.nothing.Here"}, "there is no module 'ldm.tuning.nothing'"),
        ({"target": "torch.nn.Linear"}, "'torch.nn.Linear' is not a family"),
        ({"params": {}}, "expected entries with family or target"),
        (LORA | {"family": "lora"}, "expected entries with family or target"),
        ({"family": "lroa"}, "there is no family 'lroa'; expected position, lora"),
        (LORA | {"lr": 1}, "lr is unknown; expected target, params, family, learning_rate, steps, weight_decay"),
        (LORA | {"rate_from": [3, 1e-4]}, r"rate_from of ldm.tuning.lora.LoRA must be \[step, learning rate\], beside"),
        (LORA | {"learning_rate": 0}, "tuning.learning_rate must be a positive number, got 0"),
        (LORA | {"steps": [3, 2]}, r"steps of ldm.tuning.lora.LoRA must be \[first, end\]"),
        (family("lora.LoRA", rang=3), "unknown rang; did you mean rank. it takes targets, rank"),
        (family("full.ByName", pattern="("), "is not a regular expression"),
    ],
)
def test_entries_that_are_refused(entry, message):
    with pytest.raises(InputError, match=message):
        choose(entry)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="no weight of this model has a name that matches 'nowhere'"):
        model([family("full.ByName", pattern="nowhere")])


def test_a_family_may_be_called_by_its_name():
    one = choose({"family": "lora", "params": {"rank": 3}, "learning_rate": 1e-3})
    assert (one.target, one.params, one.learning_rate) == ("ldm.tuning.lora.LoRA", {"rank": 3}, 1e-3)


def test_every_family_here_is_a_row_of_the_table():
    found = set()
    for path in (ROOT / "ldm/tuning").glob("*.py"):
        module = importlib.import_module(f"ldm.tuning.{path.stem}" if path.stem != "__init__" else "ldm.tuning")
        found |= {
            f"{kind.__module__}.{name}"
            for name, kind in vars(module).items()
            if isinstance(kind, type) and hasattr(kind, "install") and hasattr(kind, "trainable")
        }
    assert found - {"ldm.tuning.Family"} == set(table.FAMILIES.values())


def test_train_level_is_shorthand():
    assert [one.target for one in families(["adapter", "unet"], None)] == [
        "ldm.tuning.position.PositionAdapters", "ldm.tuning.full.UNet",
    ]  # fmt: skip
    with pytest.raises(InputError, match="train_level has 'unett'"):
        families(["unett"], None)


def test_by_name_leaves_out_what_was_added():
    tuned = model([LORA])
    assert not set(ByName(r"attn2").trainable(tuned)) & set(tuned.trainable_parameters())


# --- whole runs

COMBINATION = """
defaults: {tiny}
model:
  params:
    train_level: [adapter]
    tuning:
      - target: ldm.tuning.textual_inversion.TextualInversion
        params: {{words: <sks>, vectors: 2, norm_weight: 10}}
        learning_rate: 0.01
        steps: [0, 3]
      - target: ldm.tuning.lora.LoRA
        params: {{rank: 2, dropout: 0.1, targets: {{"model.*.attn2.*": null, "model.*.in_layers.2": {{rank: 1}}}}}}
        learning_rate: 0.002
        steps: [1, null]
      - target: ldm.tuning.lora.LoRA
        params: {{rank: 2, kind: dora, targets: ["cond_stage_model.*_proj"]}}
data: {{params: {{train: {{params: {{identifier: <sks>}}}}}}}}
"""


def test_a_combination_stops_between_stages_and_goes_on_without_a_trace(tmp_path):
    (tmp_path / "all.yaml").write_text(COMBINATION.format(tiny=runs.TINY))
    how = {"config": tmp_path / "all.yaml"}
    whole = runs.train(tmp_path, "whole", "--init_word", "dog", **how)
    parts = runs.train(tmp_path, "parts", "--init_word", "dog", "--max_steps", 2, **how)
    runs.resume(parts, "--max_steps", 4)
    for key in ("state_dict", "optimizer_states"):
        assert runs.differences(runs.last(whole)[key], runs.last(parts)[key]) == []
    assert load_config(whole / "configs" / "project.yaml").model.params.tuning[0].params.init_word == "dog"
    (optimizer,) = runs.last(whole)["optimizer_states"]
    counted = Counter(int(state["step"]) for state in optimizer["state"].values())
    assert counted[3] == 2 + 2 * (4 * 4 + 8) and counted.keys() == {3, 4}  # words, the first LoRA; everything else


def test_pivotal_tuning_learns_the_word_first(tmp_path):
    config = tmp_path / "pivotal.yaml"
    pivotal = load_config(ROOT / "configs/sd-mini/textual-inversion-pivotal.yaml").model.params
    for entry, steps in zip(pivotal.tuning, ([0, 2], [2, None], [2, None]), strict=True):
        entry.steps = steps
    narrow = {"unet_config": {"params": {"adapter_config": None}}, "train_level": [], "tuning": pivotal.tuning}
    OmegaConf.save({"defaults": str(runs.TINY), "model": {"params": narrow}, "data": {"params": {"reg": None}}}, config)
    two = runs.train(tmp_path, "two", "--init_word", "dog", "--max_steps", 2, config=config)
    four = runs.train(tmp_path, "four", "--init_word", "dog", "--max_steps", 4, config=config)
    first, second = runs.last(two)["state_dict"], runs.last(four)["state_dict"]
    for name in first:
        if ".new_tokens." in name:
            assert torch.equal(first[name], second[name])
        elif "lora_B" in name:
            assert not first[name].any() and second[name].any()
