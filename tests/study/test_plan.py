"""From words to trials with keys, and to groups."""

import shutil

import pytest

from ldm.errors import InputError
from ldm.study import plan
from ldm.study.plan import SweepFile, asked, give_keys, groups_of, read_file, trials_of
from ldm.study.scoring import protocol_for
from tests.conftest import ROOT
from tests.runs import TINY, pictures

CONFIGS = ROOT / "configs" / "sweeps"


@pytest.fixture
def train(work):
    return ["--class_word", "dog", "--reg_data_root", str(work / "class"), "--max_steps", "2"]


def keys(work, train, *, evaluate=None, **factors):
    factors = {"subject": [str(work / "a")]} | factors
    how = {"networks": ["models/sd-mini/clip"]} | (evaluate or {})
    sweep = asked(SweepFile(), str(TINY), factors, train, work / "out", how)
    trials = trials_of(sweep)
    give_keys(trials, protocol_for(trials[0].run, sweep.evaluate))
    return [trial.key for trial in trials]


def test_a_key_follows_what_determines_a_trial_and_nothing_else(work, train):
    (first,) = keys(work, train)
    assert keys(work, train) == [first]
    shutil.copytree(work / "a", work / "moved")
    (work / "moved" / "0.png").rename(work / "moved" / "00.png")
    again = [*train, "--cache", "off", "--reg_data_root", str(shutil.copytree(work / "class", work / "class2"))]
    others = [
        keys(work, train, seed=[5])[0],
        keys(work, train, lr=[2e-3])[0],
        keys(work, train, route=["attn1i-ffni"])[0],
        keys(work, [*train, "--max_steps", "3"])[0],
        keys(work, train, subject=[str(work / "b")])[0],
        keys(work, train, evaluate={"per_prompt": 3})[0],
        keys(work, train, **{"checkpoint.random_seed": [1]})[0],
    ]
    assert keys(work, again, subject=[str(work / "moved")]) == [first], "names have no say, but for their order"
    assert keys(work, again) == [first], "where things lie has no say"
    assert len({first, *others}) == 8
    pictures(work / "class", 3, seed=9)
    assert keys(work, train) != [first], "the class has other pictures"


def test_configs_that_are_remembered_are_those_that_are_read(work, train):
    (work / "b" / "subject.json").write_text('{"class_word": "cat"}')
    factors = {"subject": [str(work / "a"), str(work / "b")], "seed": [1, 2], "lr": [1e-3, 2e-3]}
    trials = trials_of(asked(SweepFile(), str(TINY), factors, train, work / "out", {}))
    for trial in trials:
        (alone,) = trials_of(asked(SweepFile(), str(TINY), {n: [v] for n, v in trial.settings.items()}, train,
                                   work / "out", {}))  # fmt: skip
        assert alone.run.config == trial.run.config and alone.run.notes == trial.run.notes
        assert alone.run.seed == trial.run.seed == trial.settings["seed"]


def test_trials_that_are_the_same_are_refused(work, train):
    with pytest.raises(InputError, match="trials 0 and 1 are the same"):
        keys(work, train, subject=[str(work / "a"), str(work / "a/../a")])


def test_what_is_missing_forms_the_groups_that_it_formed_before(work, train):
    sweep = asked(SweepFile(), str(TINY), {"subject": [str(work / "a")], "lr": [1e-3, 1e-4], "steps": [2, 3],
                                           "seed": [1, 2, 3, 4, 5]}, train, work / "out", {})  # fmt: skip
    trials = trials_of(sweep)
    groups = groups_of(trials, 4)
    numbers = [[trial.number for trial in group] for group in groups]
    assert sorted(sum(numbers, [])) == list(range(20))
    assert [len(group) for group in groups] == [4, 4, 4, 4, 2, 2]
    for group in groups:
        assert len({trial.run.config.lightning.trainer.max_steps for trial in group}) == 1
    for finished in ([0], [1, 3], [0, 2, 4], [5]):
        done = {trial.number for number in finished for trial in groups[number]}
        left = [trial for trial in trials if trial.number not in done]
        assert [[t.number for t in g] for g in groups_of(left, 4)] == [
            own for place, own in enumerate(numbers) if place not in finished
        ]


def test_a_file_is_a_sweep(work):
    path = work / "x.yaml"
    path.write_text(f"""
base: {TINY}
vary:
  route: [attn2o-ffni, attn1i-attn2i]
  lr: [1e-3, 1e-4]
  subject: {work}/a
options: {{class_word: dog, reg_data_root: {work}/class, max_steps: 7, data.params.batch_size: 2}}
evaluate: {{per_prompt: 3, prompts: ["a {{}} in snow"]}}
""")
    sweep = asked(read_file(str(path)), None, {"seed": [4]}, [], work / "out", {"per_prompt": 5})
    assert sweep.evaluate == {"per_prompt": 5, "prompts": ["a {} in snow"]}
    trials = trials_of(sweep)
    assert [trial.settings["lr"] for trial in trials] == [1e-3, 1e-4] * 2
    last = trials[-1]
    assert (last.run.seed, last.run.config.lightning.trainer.max_steps, last.run.config.data.params.batch_size) == (
        4,
        7,
        2,
    )
    about = last.about(work)
    assert (about["route"], about["reads"], about["writes"], about["subject"]) == (
        "attn1i-attn2i",
        "attn1i",
        "attn2i",
        "a",
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("varry: {seed: [1]}", "varry is unknown; did you mean vary"),
        ("base: {B}\nvary: {sed: [1]}", "'sed' cannot be varied; did you mean seed"),
        (
            "base: {B}\nvary: {seed: [1]}\nevaluate: {per_promt: 3}",
            "evaluate.per_promt is unknown; did you mean per_prompt",
        ),
        ("base: {B}\nvary: {lr: {uniform: [1, 2]}}", "lr needs search: random"),
        ("base: {B}\nsearch: random\nvary: {seed: [1]}", "random needs samples"),
        ("base: {B}\nsearch: list", "list goes with trials"),
        ("vary: {seed: [1]}", "nothing to vary"),
        ("search: gird", "search must be"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(work, text, message):
    path = work / "x.yaml"
    path.write_text(text.replace("{B}", str(TINY)))
    with pytest.raises(InputError, match=message):
        asked(read_file(str(path)), None, {}, [], work / "out", {})


def test_a_list_is_crossed_with_what_varies(work):
    file = SweepFile(search="list", trials=[{"route": "attn2o-ffni", "lr": "1e-3"}, {"family": "lora-attention"}])
    sweep = asked(file, "configs/sd-mini/attn2o-ffni.yaml", {"seed": [1, 2]}, [], work / "out", {})
    assert sweep.settings == [
        {"route": "attn2o-ffni", "lr": 1e-3, "seed": 1}, {"route": "attn2o-ffni", "lr": 1e-3, "seed": 2},
        {"family": "lora-attention", "seed": 1}, {"family": "lora-attention", "seed": 2},
    ]  # fmt: skip
    with pytest.raises(InputError, match="one of family and route"):
        trials_of(plan.Asked("configs/sd-mini/attn2o-ffni.yaml", [{"family": "x", "route": "y"}], [], work))


def test_what_training_refuses_is_refused_before_anything_runs(work, train):
    with pytest.raises(InputError, match=r"trial 0 \(.*seed=1.*\): the folder .*nowhere does not exist"):
        keys(work, train, subject=[str(work / "nowhere")], seed=[1])
    with pytest.raises(InputError, match="unknown option --clas_word; did you mean --class_word"):
        keys(work, ["--clas_word", "dog"])


def test_subjects_say_their_class_and_each_class_has_a_folder(work):
    for name, word in (("a", "dog"), ("b", "cat")):
        (work / name / "subject.json").write_text(f'{{"class_word": "{word}"}}')
    subjects = {"subject": [str(work / "a"), str(work / "b")]}
    trials = trials_of(asked(SweepFile(), str(TINY), subjects, ["--max_steps", "1"], work / "out", {}))
    assert [trial.run.notes["class_word"] for trial in trials] == ["dog", "cat"]
    roots = [str(trial.run.config.data.params.reg.params.data_root) for trial in trials]
    assert roots == [str(work / "out" / "classes" / word) for word in ("dog", "cat")]
    assert [trial.class_pictures for trial in trials] == [32, 32]
    with pytest.raises(InputError, match="would hold pictures of"):
        trials_of(asked(SweepFile(), str(TINY), subjects, ["--reg_data_root", str(work / "class")], work / "out", {}))


SWEEPS = {"positions-sd-mini": 360, "positions-sd-v1": 1800, "baselines-sd-mini": 114, "forms-sd-mini": 90}


@pytest.mark.parametrize("name", SWEEPS)
def test_the_shipped_sweeps_have_no_trial_twice(name):
    path = CONFIGS / f"{name}.yaml"
    header = path.read_text().split("\nbase:")[0]
    assert header.startswith("# ") and f"# Run:    ldm sweep configs/sweeps/{name}.yaml" in header
    assert "# Needs: " in header and len(header.splitlines()) <= 8
    sweep = asked(read_file(str(path)), None, {}, [], path.parent, {})
    assert len(sweep.settings) == SWEEPS[name] == len({str(one) for one in sweep.settings})


@pytest.mark.parametrize("name, count", [("positions-sd-mini", 360), ("positions-sd-v1", 1800)])
def test_the_sweeps_of_positions_are_whole_designs(name, count):
    path = CONFIGS / f"{name}.yaml"
    sweep = asked(read_file(str(path)), None, {}, [], path.parent, {})
    assert len({one["route"] for one in sweep.settings}) == 20
    subjects = {one["subject"] for one in sweep.settings}
    assert len(subjects) * 3 * 20 == count and {one["seed"] for one in sweep.settings} == {1, 2, 3}


def test_every_shipped_sweep_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SWEEPS)
