"""Scoring by DreamBooth's protocol: what is drawn, what is compared, and that the numbers are those of the formulas."""

from dataclasses import replace

import pytest
import torch

from ldm.data.pictures import find_pictures, read_picture
from ldm.errors import InputError
from ldm.evaluate import metrics, scoring
from ldm.evaluate.features import FeatureCache
from ldm.evaluate.metrics import METRICS, Metric, cosines
from ldm.evaluate.networks import load_network
from ldm.evaluate.prompts import LISTS, choose_templates, is_living
from ldm.evaluate.scoring import Protocol, class_pictures, score, subject_pictures
from tests.runs import pictures, tiny_model
from tests.tuned_models import shake

MINI = "models/sd-mini/clip"
SMALL = Protocol(prompts=("a {} in the snow", "a red {}"), per_prompt=3, per_class=3, steps=2, scale=1.0,
                 networks=(MINI,), draws=200)  # fmt: skip


@pytest.fixture(scope="module")
def tuned():
    """The tiny model, whose adapters have learnt nothing, and the same with adapters that have."""
    return tiny_model(), shake(tiny_model(), size=0.3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("photos"), 3)


def test_both_lists_are_those_of_the_data_set(shared):
    """`dataset/prompts_and_classes.txt` of the data set has both, and the class of each subject."""
    text = (shared / "data/dreambench/prompts_and_classes.txt").read_text()
    lists = [part.split("]")[0] for part in text.split("prompt_list = [")[1:]]
    found = [
        [line.split("'")[1].replace("{0} {1}", "{}") for line in part.split("\n") if "'" in line] for part in lists
    ]
    assert [list(LISTS["object"]), list(LISTS["live"])] == found
    assert [len(prompts) for prompts in found] == [25, 25]
    classes = {line.split(",")[1] for line in text.split("subject_name,class\n")[1].split("\n\n")[0].split("\n")}
    assert {word for word in classes if is_living(word)} == {"cat", "dog"}


def test_the_class_decides_which_list():
    assert choose_templates("auto", "dog") == LISTS["live"] and choose_templates("auto", "teapot") == LISTS["object"]
    assert choose_templates("object", "dog") == LISTS["object"]
    assert not is_living("toy dog") and not is_living("stuffed animal") and is_living("German Shepherd-dog")


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {} here\n\n  two {}\n")
    assert choose_templates(str(file), "dog") == ("a {} here", "two {}")
    for text, message in (("\n", "it holds none"), ("a dog\n", "got 'a dog'")):
        file.write_text(text)
        with pytest.raises(InputError, match=f"prompts.txt: expected a template per line.*{message}"):
            choose_templates(str(file), "dog")
    with pytest.raises(InputError, match="--prompts nowhere is no file: expected auto, object, live, mini"):
        choose_templates("nowhere", "dog")


def test_every_picture_has_a_prompt_and_a_seed_of_its_own(tuned):
    drawn = subject_pictures(tuned[0], "dog", replace(SMALL, batch_size=4, seed=7))
    assert drawn.prompts == ["a sks dog in the snow"] * 3 + ["a red sks dog"] * 3
    assert drawn.captions == ["a dog in the snow"] * 3 + ["a red dog"] * 3
    assert drawn.seeds == list(range(7, 13)) and len({p.tobytes() for p in drawn.pictures}) == 6
    other = subject_pictures(tuned[0], "dog", replace(SMALL, batch_size=1, seed=7, first=1))
    assert len(other.pictures) == 3
    differ = [(torch.tensor(list(a.tobytes())) - torch.tensor(list(b.tobytes()))).abs().max().item()
              for a, b in zip(other.pictures, drawn.pictures, strict=False)]  # fmt: skip
    assert max(differ) <= 1  # the batch changes rounding alone


def test_scores_are_the_formulas(tuned, photos):
    base, changed = tuned
    prior = class_pictures(base, "dog", SMALL)
    cache = FeatureCache()
    found = score(changed, photos, "dog", SMALL, prior, cache)
    network = load_network(MINI)
    drawn = network.vectors(found.drawn.pictures)
    photographs = network.vectors([read_picture(path) for path in find_pictures(photos)])
    texts = network.embed_captions(found.drawn.captions)
    after = network.vectors(class_pictures(changed, "dog", SMALL).pictures)
    before = network.vectors(prior.pictures)
    blocks = [cosines(part, part) for part in drawn.split(3)]
    upper = torch.triu_indices(3, 3, 1)
    expected = {
        "clip_i": cosines(drawn, photographs).mean(),
        "clip_t": torch.stack([cosines(drawn[i : i + 1], texts[i : i + 1])[0, 0] for i in range(6)]).mean(),
        "clip_diversity": 1 - torch.cat([block[upper[0], upper[1]] for block in blocks]).mean(),
        "clip_prior_i": cosines(after, before).mean(),
        "clip_prior_same": cosines(after, before).diagonal().mean(),
        "clip_prior_alike": cosines(after, after)[upper[0], upper[1]].mean(),
        "clip_base_alike": cosines(before, before)[upper[0], upper[1]].mean(),
    }
    expected["clip_prior_shift"] = expected["clip_prior_alike"] - expected["clip_base_alike"]
    assert {name: value.mean for name, value in found.values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, abs=1e-5
    )
    assert all(value.low <= value.mean <= value.high for value in found.values.values())
    assert [one["clip_i"] for one in found.pictures] == pytest.approx(
        cosines(drawn, photographs).mean(1).tolist(), abs=1e-5
    )
    assert found.row()["clip_i_low"] == found.values["clip_i"].low
    assert found.networks == {"clip": {"name": MINI, "digest": network.digest}}
    assert found.notes == []


def test_an_untuned_model_has_no_drift(tuned, photos):
    base = tuned[0]
    found = score(base, photos, "dog", SMALL, class_pictures(base, "dog", SMALL)).values
    assert found["clip_prior_same"].mean == pytest.approx(1, abs=1e-6)
    assert (found["clip_prior_shift"].mean, found["clip_prior_shift"].low) == (0, 0)


def test_what_is_left_out_is_said(tuned, photos):
    found = score(tuned[0], photos, "dog", replace(SMALL, per_prompt=1))
    assert set(found.values) == {"clip_i", "clip_t"}
    assert "clip_diversity: no prompt has two pictures, so that there are no pairs" in found.notes
    assert "clip_prior_i: no class pictures of the base" in found.notes


def test_class_pictures_of_another_protocol_are_refused(tuned, photos):
    prior = class_pictures(tuned[0], "dog", replace(SMALL, seed=100))
    with pytest.raises(InputError, match="drawn by another protocol: prompts and seeds must agree"):
        score(tuned[0], photos, "dog", SMALL, prior)


def test_a_metric_of_the_table_is_scored(tuned, photos, monkeypatch):
    nearest = Metric("likeness to the nearest photograph", "subject", lambda a, b: cosines(a, b).amax(1))
    monkeypatch.setattr(scoring, "METRICS", {**METRICS, "nearest": nearest})
    found = score(tuned[0], photos, "dog", SMALL).values
    assert found["clip_nearest"].mean > found["clip_i"].mean


def test_columns_are_called_as_the_papers_have_them():
    assert [metrics.column("clip", "i"), metrics.column("clip", "t"), metrics.column("dino", "i")] == [
        "clip_i", "clip_t", "dino",
    ]  # fmt: skip
    assert metrics.column("dino", "diversity") == "dino_diversity"
