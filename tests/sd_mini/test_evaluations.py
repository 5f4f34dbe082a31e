"""What evaluations of DreamBooth share: results for one choice of settings, class pictures for one, and bad input."""

import argparse
import json

import pytest

from ldm.errors import InputError
from ldm.evaluate.cached import cached, class_folder
from ldm.evaluate.subjects import class_word_of
from scripts.sd_mini import compare_families, evaluate_dreambooth
from tests.runs import TINY, pictures


def test_results_are_kept_for_the_same_settings_only(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    file = tmp_path / "results" / "one.json"
    assert [cached(file, {"steps": steps}, make)["value"] for steps in (3, 3, 4, 4)] == [1, 1, 2, 2]
    file.write_text("{")
    with pytest.raises(InputError, match="one.json cannot be read; remove it"):
        cached(file, {}, make)


def test_class_pictures_of_another_kind_are_in_another_folder(tmp_path):
    folders = {class_folder(tmp_path, "cat", {"number": number, "seed": 1}) for number in (4, 8, 4)}
    assert len(folders) == 2 and all(folder.parent == tmp_path / "classes" for folder in folders)


def test_whatever_changes_a_training_trains_again(tmp_path, monkeypatch):
    calls = []

    def train(subject, word, runs, classes, options):
        calls.append(classes.name)
        return {"adapters": f"run{len(calls)}"}

    monkeypatch.setattr(evaluate_dreambooth, "train", train)
    guided = tmp_path / "guided.yaml"
    guided.write_text(f"defaults: {TINY}\ndreambooth: {{class_scale: 2.0}}\n")

    def trained(*more):
        words = ["--subjects", tmp_path / "rex", "--logdir", tmp_path / "logs", "--config", TINY, *more]
        options = evaluate_dreambooth.parser().parse_args([str(word) for word in words])
        return evaluate_dreambooth.trained(tmp_path / "rex", "dog", options).name

    given = [[], [], ["--config", guided], ["--class_pictures", 5], ["--batch_size", 2], ["--batch_size", 2]]
    assert [trained(*more) for more in given] == ["run1", "run1", "run2", "run3", "run4", "run4"]
    assert len(set(calls)) == 3 and calls[3] == calls[0]  # a batch size leaves the class pictures as they are


def test_a_training_as_the_evaluation_has_it(tmp_path):
    subject, options = pictures(tmp_path / "rex", 2), evaluate_dreambooth.parser().parse_args(["--subjects", "rex"])
    pictures(tmp_path / "class", 2)
    options = argparse.Namespace(**vars(options) | {"config": str(TINY), "steps": 1, "class_pictures": 2})
    made = evaluate_dreambooth.train(subject, "dog", tmp_path / "runs", tmp_path / "class", options)
    assert (tmp_path / "runs" / made["adapters"] / "adapters.safetensors").is_file()


@pytest.mark.parametrize("script", [compare_families, evaluate_dreambooth])
def test_what_is_no_subject_is_told_in_one_line(tmp_path, script):
    with pytest.raises(InputError, match="rex is no subject, a folder with pictures and subject.json"):
        script.main(["--subjects", str(tmp_path / "rex")])
    with pytest.raises(InputError, match="argument --samples: expected a whole number of at least 1, got '0'"):
        script.main(["--subjects", str(tmp_path), "--samples", "0"])


def test_a_subject_says_what_it_is(tmp_path):
    (tmp_path / "subject.json").write_text(json.dumps({"class_word": "cat"}))
    assert class_word_of(tmp_path) == "cat"
    for text in ("{}", "[]", "{"):
        (tmp_path / "subject.json").write_text(text)
        with pytest.raises(InputError, match="is no subject"):
            class_word_of(tmp_path)
