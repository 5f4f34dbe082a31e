"""What varies, and the trials that come of it."""

import pytest

from ldm.errors import InputError
from ldm.study import space, words
from tests.runs import TINY


def test_a_grid_has_every_combination_and_its_last_word_varies_fastest():
    trials = space.grid({"route": ["a-b", "c-d"], "seed": [1, 2, 3]})
    assert len(trials) == 6
    assert trials[:4] == [{"route": "a-b", "seed": s} for s in (1, 2, 3)] + [{"route": "c-d", "seed": 1}]


def test_draws_are_a_function_of_seed_word_and_number():
    wide = {
        "lr": {"loguniform": [1e-4, 1e-2]},
        "mid_dim": {"randint": [4, 9]},
        "seed": [1, 2],
        "scale": {"choice": [5]},
    }
    trials = space.drawn(wide, 40, seed=3)
    assert [{"lr": t["lr"], "mid_dim": t["mid_dim"]} for t in trials[:7]] == space.drawn(
        {"mid_dim": wide["mid_dim"], "lr": wide["lr"]}, 7, seed=3
    )
    assert all(1e-4 <= t["lr"] <= 1e-2 and 4 <= t["mid_dim"] < 9 and t["scale"] == 5 for t in trials)
    assert sum(t["lr"] < 1e-3 for t in trials) in range(12, 29), "half of them below the middle of the exponents"
    assert {t["seed"] for t in trials} == {1, 2}
    assert space.drawn(wide, 40, seed=4) != trials


def test_domains_of_tune_are_drawn_by_themselves():
    tune = pytest.importorskip("ray.tune")
    trials = space.drawn({"lr": tune.uniform(2.0, 3.0)}, 5, seed=0)
    assert trials == space.drawn({"lr": tune.uniform(2.0, 3.0)}, 5, seed=0)
    assert len({t["lr"] for t in trials}) == 5 and all(2 <= t["lr"] <= 3 for t in trials)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"loguniforn": [1, 2]}, "did you mean loguniform"),
        ({"loguniform": [0, 1]}, "loguniform takes .*positive"),
        ({"uniform": [1]}, r"uniform takes \[low, high\]"),
    ],
)
def test_distributions_that_cannot_be_drawn_from_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        space.drawn({"lr": values}, 1, 0)


@pytest.mark.parametrize(
    "text, values",
    [
        ("1e-3,1e-4", [1e-3, 1e-4]),
        ("attn2o-ffni,attn1i-attn2i", ["attn2o-ffni", "attn1i-attn2i"]),
        ("[1, 2],[3]", [[1, 2], [3]]),
        ("{a: 1, b: 2},null", [{"a": 1, "b": 2}, None]),
    ],
)
def test_values_are_cut_at_commas_outside_of_brackets(text, values):
    assert words.values_of(text) == values


@pytest.mark.parametrize("text", ["", "1,,2", ",1", "1,"])
def test_empty_values_are_refused(text):
    with pytest.raises(InputError, match="cannot read the values"):
        words.values_of(text)


def test_a_misspelt_word_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean route"):
        words.check_word("rout")
    words.check_word("model.params.reg_weight")


def test_all_routes_are_the_published_ones(golden):
    import json

    published = json.loads((golden / "manifests/adapters_manifest.json").read_text())["configs"]
    assert sorted(words.spread("route", ["all"], "configs/sd-mini/attn2o-ffni.yaml")) == sorted(published)


def test_patterns_of_folders_stand_for_folders(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "c.txt").touch()
    assert words.spread("subject", [f"{tmp_path}/*"], "") == [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(InputError, match="no such folder"):
        words.spread("subject", [f"{tmp_path}/x*"], "")
    with pytest.raises(InputError, match="twice"):
        words.spread("seed", [1, 2, 1], "")


def test_another_route_of_a_folder_of_routes_has_the_width_of_its_own_file():
    base = "configs/sd-mini/attn2o-ffni.yaml"
    config = words.adapter_config({"route": "resi-reso"}, base)
    assert config["transformer_adp_config"] is None
    assert [(e["din"], e["dout"], e["mid_dim"]) for e in config["resblock_adp_config"]] == [("resi", "reso", 7)]
    wide = words.adapter_config({"route": "attn1i-ffni", "mid_dim": 60, "scale": 2.0}, base)
    (entry,) = wide["transformer_adp_config"]
    assert (entry["din"], entry["dout"], entry["mid_dim"], entry["scale"]) == ("attn1i", "ffni", 60, 2.0)
    (entry,) = words.adapter_config({"route": "attn1i-ffni"}, str(TINY))["transformer_adp_config"]
    assert (entry["din"], entry["dout"], entry["mid_dim"]) == ("attn1i", "ffni", 24)


def test_routes_and_families_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="did you mean attn2o-ffni"):
        words.adapter_config({"route": "attn2o-fni"}, str(TINY))
    with pytest.raises(InputError, match="did you mean lora-attention"):
        words.base_of({"family": "lora-atention"}, "configs/sd-mini/attn2o-ffni.yaml")
    with pytest.raises(InputError, match="no position adapters"):
        words.adapter_config({"scale": 2}, "configs/sd-mini/lora-attention.yaml")
