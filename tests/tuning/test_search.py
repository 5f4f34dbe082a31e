"""Route search: gates over routes, what they become, the folder and the configs that it leaves."""

import json

import pytest
import torch

from ldm.config import load_config
from ldm.errors import InputError
from ldm.modules.adapters import tapped_blocks
from ldm.tuning import files
from tests.helpers import assert_close_to
from tests.tuned_models import answer, batch, family, model, shake, train

THREE = ["attn1i-attn1i", "attn2o-ffni", "ffno-transo"]


def searching(**params):
    tuned = model([family("search.RouteSearch", **{"steps": 20, "routes": THREE} | params)])
    return tuned, tuned.tuning.families[0].family


def test_untrained_gates_are_equal_and_change_nothing():
    tuned, search = searching(routes="all", keep=2)
    gates = search.gates(tuned)
    assert len(gates) == 20 and all(gate == pytest.approx(2 / 20) for gate in gates.values())
    assert torch.equal(answer(tuned), answer(model()))


def test_gates_sharpen_and_keep_their_sum():
    tuned, search = searching(shared="width", sparsity=1.0, gate_speed=30.0)
    train(tuned, steps=20)
    table = tuned.route_gates()
    assert table.shape == (2, 3)  # two widths in this UNet
    assert torch.allclose(table.sum(-1), torch.ones(2)) and table.max() > 0.5
    assert all(p.grad is not None for p in tuned.trainable_parameters().values())


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_the_penalty_is_a_step_down_the_entropy(sparsity):
    tuned, _ = searching(gate_speed=1.0)
    gates = tuned.route_gates
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([[0.3, 0.1, -0.2]]))
    before = gates.logits.detach().clone().requires_grad_()
    shares = before.softmax(-1)
    (-(shares * shares.log()).sum()).backward()
    gates.sharpen(0.1, sparsity, growth=2.0)
    assert_close_to(gates.logits.detach(), 2 * (before.detach() - 0.1 * sparsity * before.grad), 1e-5)


def test_a_planted_route_is_found():
    teacher = model([family("search.RouteSearch", routes=["attn2o-ffni"], mid_dim=8)])
    torch.manual_seed(0)
    for _, block in tapped_blocks(teacher.model.diffusion_model):
        for route in block.routes:
            torch.nn.init.normal_(getattr(block, route.name).adp[2].weight, std=0.3)
    tuned, search = searching(mid_dim=8, steps=60, gate_speed=20.0, sparsity=0.3)
    optimizer = torch.optim.AdamW([{"params": [*tuned.trainable_parameters().values()], "lr": 1e-2}])
    for step in range(60):
        pictures = batch(step)["image"].permute(0, 3, 1, 2)
        times, text = torch.tensor([7, 80]), tuned.get_learned_conditioning(["a cat", "a dog"])
        with torch.no_grad():
            wanted = teacher.apply_model(pictures, times, text)
        loss = (tuned.apply_model(pictures, times, text) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tuned.after_step(step, optimizer)
    gates = search.gates(tuned)
    assert next(iter(gates)) == "attn2o-ffni" and gates["attn2o-ffni"] > 0.6


def test_a_folder_holds_position_adapters_with_their_gates(tmp_path):
    tuned, search = searching(shared="width")
    shake(tuned)
    files.save(tuned, tmp_path / "found")
    again = model()
    files.load(again, tmp_path / "found")
    assert_close_to(answer(again), answer(tuned), 1e-5)
    assert not torch.equal(answer(again), answer(model()))
    content = json.loads((tmp_path / "found" / "adapter_config.json").read_text())
    assert "families" not in content and {entry["din"] for entry in content["adapters"]} == {"attn1i", "attn2o", "ffno"}


def test_the_end_of_a_training_writes_the_route_that_was_found(tmp_path):
    tuned, search = searching(found_mid_dim=6)
    with torch.no_grad():
        tuned.route_gates.logits[0, search_number(search, "attn2o-ffni")] = 1.0
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "project.yaml").write_text(
        "model: {params: {tuning: [{family: route-search}], channels: 4}}"
    )
    search.finish(tuned, tmp_path)
    [found] = (tmp_path / "routes").glob("*.yaml")
    params = load_config(found).model.params
    [entry] = params.unet_config.params.adapter_config.transformer_adp_config
    assert found.stem == "attn2o-ffni" and (entry.din, entry.dout, entry.mid_dim) == ("attn2o", "ffni", 6)
    assert params.tuning == [] and params.train_level == ["adapter"] and params.channels == 4
    gates = json.loads((tmp_path / "routes" / "gates.json").read_text())["gates"]
    assert list(gates)[0] == "attn2o-ffni" and sum(gates.values()) == pytest.approx(1)


def search_number(search, route):
    return [*search.routes].index(route)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"routes": ["attn2o-fni"]}, "did you mean attn2o-ffni"),
        ({"routes": []}, "routes is empty"),
        ({"keep": 4}, "only 3 routes"),
        ({"shared": "level"}, "all, width"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"sparsity": -1}, "sparsity must be a number"),
    ],
)
def test_what_it_refuses(params, message):
    with pytest.raises(InputError, match=message):
        searching(**params)
