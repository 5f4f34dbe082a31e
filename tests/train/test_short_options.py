"""`--lr`, `--rank`, `--alpha`, `--family` and `--route`: what they change, what they leave, what they refuse."""

import logging

import pytest

from ldm.config import plain
from ldm.errors import InputError
from ldm.train.options import dreambooth_parser, parse
from ldm.train.run_config import opened
from tests.conftest import ROOT
from tests.runs import TINY, last, resume, train

CONFIGS = ROOT / "configs"
UNET = "unet_config"


def config(*words, base="sd-inject-dreambooth/attn2o-ffni", unet=UNET) -> tuple[dict, dict]:
    """The model section of a command line, and its position adapters."""
    options, _, overrides = parse(dreambooth_parser(""), ["--base", str(CONFIGS / f"{base}.yaml"), *words])
    model = plain(opened(options, overrides)[0])["model"]
    return model, model["params"][unet]["params"].get("adapter_config")


def test_all_of_them():
    words = "--rank 8 --alpha 4 --lr 1e-4 --family lora --route attn2o-ffni"
    model, adapters = config(*words.split())
    assert model["base_learning_rate"] == 1e-4 and model["params"]["train_level"] == ["adapter"]
    [lora] = model["params"]["tuning"]
    assert lora == {"family": "lora", "params": {"kind": "lora", "rank": 8, "alpha": 4.0}}
    [entry] = adapters["transformer_adp_config"]
    assert (entry["din"], entry["dout"], entry["mid_dim"]) == ("attn2o", "ffni", 60)


def test_a_family_takes_the_place_of_the_adapters(caplog):
    with caplog.at_level(logging.INFO):
        model, adapters = config("--family", "dora", "--rank", "2")
    assert adapters is None and model["params"]["train_level"] == []
    assert model["params"]["tuning"] == [{"family": "lora", "params": {"kind": "dora", "rank": 2}}]
    assert "--family dora takes the place of the position adapters" in caplog.text
    assert config("--family", "norms")[0]["params"]["tuning"] == [{"family": "norms"}]


def test_a_route_takes_the_place_of_another():
    model, adapters = config("--route", "resi-reso", base="sd-inject-dreambooth/attn1i-transo")
    assert list(adapters) == ["resblock_adp_config"] and adapters["resblock_adp_config"][0]["mid_dim"] == 7
    assert config("--route", "attn1i-ffni", "--rank", "9")[1]["transformer_adp_config"][0]["mid_dim"] == 9
    model, adapters = config("--route", "attn2o-ffni", base="sd-dream")
    assert adapters and model["params"]["train_level"] == ["adapter"]
    _, adapters = config("--route", "attn1o-ffni", base="sdxl-inject-dreambooth/attn2o-ffni", unet="network_config")
    assert adapters["transformer_adp_config"][0]["din"] == "attn1o"


def test_a_rank_is_that_of_the_family_and_an_override_wins():
    assert config("--rank", "16", base="lora/dora")[0]["params"]["tuning"][0]["params"]["rank"] == 16
    model, _ = config("--rank", "16", "tuning.0.params.rank=3", base="lora/dora")
    assert model["params"]["tuning"][0]["params"]["rank"] == 3


def test_a_rate_of_its_own_is_told(caplog):
    config("--lr", "2e-3", "--family", "lora")
    assert not caplog.records or "of its own" not in caplog.text
    base = "sd-mini/textual-inversion-pivotal"
    model, _ = config("--lr", "2e-3", base=base)
    own = [entry for entry in model["params"]["tuning"] if entry.get("learning_rate")]
    assert model["base_learning_rate"] == 2e-3 and own
    assert "which has a learning rate of its own" in caplog.text


@pytest.mark.parametrize(
    "words, base, message",
    [
        (["--family", "lorra"], "lora/dora", "--family lorra: there is no such family; did you mean lora"),
        (["--route", "attn2o"], "lora/dora", "--route attn2o: expected where an adapter reads and writes, such as"),
        (["--rank", "4"], "sd-dream", "--rank: this config tunes nothing that has a rank; name one with --family lora"),
        (["--alpha", "4"], "sd-dream", "--alpha: no family of this config takes it; name one with --family lora"),
        (["--lr", "-1"], "sd-dream", "--lr: expected a number above 0, got '-1'"),
    ],
)
def test_what_cannot_be_is_refused(words, base, message):
    with pytest.raises(InputError, match=message):
        config(*words, base=base)


@pytest.mark.slow
def test_a_run_with_short_options_and_what_a_resume_takes(tmp_path):
    quiet = "lightning.callbacks.image_logger.params.disabled=true"
    run = train(tmp_path, "run", "--max_steps", 1, "--family", "lora", "--route", "attn1i-ffni", "--rank", 2, quiet)
    names = " ".join(last(run)["state_dict"])
    assert "lora_A" in names and "adapter_inout" in names
    with pytest.raises(InputError, match="-r goes on with what the run trains; leave --rank, --family out"):
        resume(run, "--rank", "3", "--family", "lora")
    resume(run, "--lr", "5e-5", "--max_steps", "2")
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(5e-5)


def test_a_misspelt_key_of_a_concept_is_refused_without_training(tmp_path):
    (tmp_path / "mine.yaml").write_text("concepts: [{path: photos, masks: {sorce: alpha}}]\n")
    words = ["--base", str(TINY), str(CONFIGS / "text-image/captioned.yaml"), str(tmp_path / "mine.yaml")]
    options, _, overrides = parse(dreambooth_parser(""), words)
    with pytest.raises(InputError, match="concepts.0.masks.sorce is unknown; did you mean source"):
        opened(options, overrides)
