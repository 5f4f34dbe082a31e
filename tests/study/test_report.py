"""What a report says and shows, without a browser."""

import base64
import gzip
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pandas as pd
import pytest
from PIL import Image

from ldm.commands import Program
from ldm.errors import InputError
from ldm.study.report import print_figures, render, run_page, summary, sweep_page, texts
from ldm.study.report.content import Page, Section
from ldm.study.report.facts import look_at
from ldm.study.report.pictures import Album, wall_of
from tests.study import results_folder

EVIL = "<script>document.title='ran'</script>"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "first"
    return results_folder.write(folder, [*results_folder.rows(folder), results_folder.FAILED])


@pytest.fixture(scope="module")
def facts(results):
    return look_at(pd.read_parquet(results))


@pytest.fixture(scope="module")
def report(results):
    return sweep_page.report_on(results, Album(2**20, 32))


@pytest.fixture(scope="module")
def html(report):
    return render.render(sweep_page.page_of(report))


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


# --- the numbers


def test_configs_are_what_differs_beside_subject_and_seed(report):
    facts = report.facts
    assert facts.settings == ["route"], "the width follows from the route"
    assert [one.label for one in facts.configs] == ["attn2o-ffni", "attn2o-transo", "attn1i-ffni", "attn1i-attn2i"]
    assert all(one.trials == 4 for one in facts.configs)
    own = facts.last[facts.last.route == "attn2o-ffni"].clip_i
    assert facts.configs[0].means["clip_i"].mean == pytest.approx(own.mean())
    assert sorted(facts.configs[0].curves["clip_i"]) == [50, 100]


def test_several_settings_name_a_config():
    rows = [{"route": route, "lr": rate, "seed": seed, "subject": "a", "clip_i": 0.5 + rate, "status": "done",
             "key": f"{route}{rate}{seed}", "step": 1}
            for route in ("attn2o-ffni", None) for rate in (0.1, 0.2) for seed in (1, 2)]  # fmt: skip
    facts = look_at(pd.DataFrame(rows))
    assert {one.label for one in facts.configs} == {"attn2o-ffni · lr=0.1", "attn2o-ffni · lr=0.2", "lr=0.1", "lr=0.2"}
    assert facts.drift is None and facts.front == []


def test_the_front_has_what_no_other_config_beats(report):
    assert [one.label for one in report.facts.front] == ["attn2o-transo", "attn2o-ffni"]


def test_the_summary_says_what_the_numbers_say(report):
    said = " ".join(report.sentences)
    assert report.sentences[0].startswith("attn2o-ffni has the highest clip_i: 0.7")
    assert "16 trials of 4 configs on 2 subjects with 2 seeds" in said and "1 trial failed" in said
    assert "clip_i differs between the levels of reads: F(1, " in said
    assert "improved for 3 of 4 configs" in said, "attn1i-attn2i stays where it is"
    assert "by efficientnet_i, another network, has a rank correlation of 1.000" in said
    assert "attn2o-transo and attn2o-ffni" in said and "all of them 40 s" in said
    ahead = report.facts.paired(*report.facts.configs[:2])
    assert ahead.low > 0 and "It is the best of 4 by these same numbers" in said


def test_a_lead_within_its_interval_is_not_called_one(tmp_path):
    rows = results_folder.rows(tmp_path, routes=("resi-resi", "resi-reso"))
    said = " ".join(summary.sentences(look_at(pd.DataFrame(rows))))
    assert "the interval contains 0, so that neither is shown to be better" in said


# --- the page


def test_the_page_has_every_part(html):
    for title in ("Configs", "Analysis of variance", "Learning curves", "Fidelity against drift", "Pictures", "Trials"):
        assert f">{title}</h2>" in html
    assert "All configs met the same subjects and seeds" in html
    assert "one-way within subject" in html and "factorial within subject, type II" in html
    assert "the loss is not finite" in html and "ldm sweep --base a.yaml route=all" in html
    assert "0123abc" in html and "torch" in html and "rate: 0.1" in html and "route: attn" not in html
    plots = embedded(html)["plots"]
    assert set(plots) == {"heat-map", "curves", "front"}
    heat = plots["heat-map"]["clip_i"]["data"][0]
    assert heat["y"] == ["attn1i", "attn2o"] and heat["x"] == ["attn2i", "ffni", "transo"]
    assert heat["z"][1][0] is None and heat["z"][1][1] == pytest.approx(0.5 + 0.2 + 0.025 + 0.0015 + 0.002, abs=2e-3)
    assert len(plots["curves"]["clip_i"]["data"]) == 4 and plots["front"]["clip_i"]["data"][0]["name"] == "Pareto front"


def test_the_wall_has_samples_photographs_and_what_the_base_draws(html):
    wall = embedded(html)["wall"]
    assert len(wall["trials"]) == 16 and {len(one) for one in wall["subjects"].values()} == {3}
    first = wall["trials"][0]
    assert first["config"] == "attn2o-ffni" and [one["prompt"] for one in first["pictures"]] == [
        *results_folder.PROMPTS
    ]
    assert len({one["pictures"][0]["base"] for one in wall["trials"]}) == 1, "a picture is embedded once"
    assert all(uri.startswith("data:image/webp;base64,") for uri in wall["uris"])
    assert len(wall["uris"]) == 16 * 2 + 2 + 6


def test_a_page_loads_nothing_and_runs_only_its_own_scripts(html):
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#39;", "'")
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1 and render.digest(script[0].encode()) in policy
    library = re.search(r'id="library">([^<]*)<', html)[1]
    assert render.digest(gzip.decompress(base64.b64decode(library))) in policy


def test_the_same_results_are_the_same_page(results, report, html, monkeypatch):
    monkeypatch.setattr(sweep_page, "_analysis", lambda facts, notes: report.analysis)  # takes long
    again = sweep_page.page_of(sweep_page.report_on(results, Album(2**20, 32)))
    assert render.render(again) == html


def test_pictures_stay_within_their_limit_and_the_page_says_so(results, facts):
    album = Album(2000, 32)
    wall = wall_of(facts, results.parent, album)
    assert 0 < album.bytes <= 2000 and album.left_out > 0
    assert any("more are left out: the limit is" in note for note in wall.notes)
    seeds = {trial["seed"] for trial in wall.trials}
    assert seeds == {1}, "the first seed of all configs comes before the second of any"


def test_pictures_are_made_smaller(tmp_path):
    Image.new("RGB", (900, 600)).save(tmp_path / "a.png")
    album = Album(2**20, 90)
    album.add(tmp_path / "a.png")
    data = base64.b64decode(album.uris[0].partition(",")[2])
    (tmp_path / "b.webp").write_bytes(data)
    with Image.open(tmp_path / "b.webp") as small:
        assert small.size == (90, 60)


# --- files are data


def test_names_out_of_files_are_text(tmp_path):
    """A run, a prompt, a subject, a reason, a command: none of them becomes a tag."""
    rows = results_folder.rows(tmp_path, prompts=(EVIL, "b"))
    for row in rows:
        row["method"] = f"{EVIL}{row['route']}"
        row["class_word"] = row["subject"] = row["subject"] + EVIL
        row[f"{EVIL}_fid"] = 1.0
    rows.append({**results_folder.FAILED, "reason": EVIL, "subject": EVIL})
    path = results_folder.write(tmp_path / EVIL.replace("/", ""), rows, commands=f"ldm sweep {EVIL}")
    (tmp_path / "pictures").rename(path.parent / "pictures")
    report = sweep_page.report_on(path, Album(2**20, 32))
    html = render.render(sweep_page.page_of(report))
    assert EVIL not in html and EVIL.replace("/", "") not in html and "<script>document" not in html
    assert html.count("<script") == 3 and html.count("&lt;script&gt;") > 3
    assert EVIL in {one["prompt"] for trial in embedded(html)["wall"]["trials"] for one in trial["pictures"]}
    specs = [list(choices.values()) for choices in embedded(html)["plots"].values()]
    assert specs and "<script" not in json.dumps(specs), "plotly reads tags in its texts"
    assert "<script>" not in texts.as_markdown(report)


def test_a_table_cannot_name_other_pictures_of_this_machine(tmp_path):
    rows = results_folder.rows(tmp_path / "sweep")
    results_folder.picture(tmp_path / "private" / "000050" / "00.png", (1, 1, 1))
    results_folder.picture(tmp_path / "private" / "00.png", (1, 1, 1))
    for row in rows:
        row["key"], row["base_pictures"] = "../../private", "../../../private"
        row["config"] = json.dumps({"dreambooth": {"data_root": str(tmp_path / "private")}})
    assert wall_of(look_at(pd.DataFrame(rows)), tmp_path / "sweep", Album(2**20, 32)) is None


def test_photographs_that_changed_are_not_shown(results, facts):
    changed = replace(facts, last=facts.last.assign(subject_pictures="another digest"))
    wall = wall_of(changed, results.parent, Album(2**20, 32))
    assert wall.subjects == {"a": [], "b": []} and "have changed" in wall.notes[0]


def test_photographs_may_lie_elsewhere(results, facts):
    moved = replace(facts, last=facts.last.assign(config=None))
    wall = wall_of(moved, results.parent, Album(2**20, 32), str(results.parent / "photos"))
    assert [len(one) for one in wall.subjects.values()] == [3, 3]


# --- other files


def test_the_command_writes_page_figures_latex_and_markdown(results, tmp_path, capsys, monkeypatch):
    analysed = []  # figures of the analysis have tests of their own
    monkeypatch.setattr(print_figures.figures, "draw", lambda design, folder: analysed.append(design.factors) or [])
    words = ["--out", tmp_path / "page.html", "--figures", tmp_path / "figures", "--latex", tmp_path / "t.tex"]
    Program("report")([str(word) for word in (results, *words, "--markdown", tmp_path / "t.md")])
    told = capsys.readouterr().out
    assert "attn2o-ffni has the highest clip_i" in told and str(tmp_path / "page.html") in told
    for name in ("curves", "front"):
        assert ET.parse(tmp_path / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        with Image.open(tmp_path / "figures" / f"{name}.png") as figure:
            assert figure.size[0] > 500
    assert analysed == [["reads", "writes"]]
    latex = (tmp_path / "t.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") >= 3
    assert r"clip\_i" in latex and "attn2o-ffni & 4 & 0.7" in latex
    markdown = (tmp_path / "t.md").read_text()
    assert markdown.startswith("# first\n") and "| attn2o-ffni | 4 | 0.7" in markdown
    assert "### one-way within subject" in markdown


def test_a_table_without_pictures_or_routes_has_what_it_allows(tmp_path):
    rows = [{"family": family, "subject": "a", "seed": seed, "clip_i": 0.5 + seed / 100} for family in ("lora", "oft")
            for seed in (1, 2, 3)]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "r.csv", index=False)
    report = sweep_page.report_on(tmp_path / "r.csv", Album(2**20, 32))
    assert report.plots == {} and report.wall is None and report.analysis.factors == ["family"]
    html = render.render(sweep_page.page_of(report))
    assert "There are no pictures beside the table" in html and 'id="library"></script>' in html


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "clip_ii"], "--metric clip_ii: no score has this name; did you mean clip_i?"),
        (["--drift", "nothing"], "--drift nothing: no score has this name"),
    ],
)
def test_what_is_refused(results, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Program("report")([str(results), *words])


def test_results_without_a_score_are_refused(tmp_path):
    path = results_folder.write(tmp_path, [results_folder.FAILED])
    with pytest.raises(InputError, match="there is no score in these results"):
        Program("report")([str(path)])


# --- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("logs") / "photos_<script>x"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "project.yaml").write_text(
        f"# ldm train -t {EVIL}\nmodel: {{params: {{}}}}\ndreambooth: {{data_root: nowhere}}\n"
    )
    with SummaryWriter(str(folder / "tensorboard" / "version_0")) as writer:
        for step in range(40):
            writer.add_scalar("loss", 1.0 if step < 20 else 0.5, step)
            writer.add_scalar("lr", 0.1, step)
    results_folder.picture(folder / "images" / "000010.png", (1, 1, 1), EVIL)
    results_folder.picture(folder / "images" / "000040.png", (2, 1, 1), "photo of a dog")
    scores = [{"step": step, "seconds": 3.0, "scores": {"clip_i": {"mean": 0.6 + step / 1000, "low": 0.5, "high": 0.7}}}
              for step in (40, 20)]  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "checkpoints" / "40-adapters").mkdir(parents=True)
    return folder


def test_a_run_is_reported(run, capsys):
    Program("report")([str(run)])
    html = (run / "report.html").read_text()
    assert "loss was logged 40 times up to step 39: 1 on average over the first tenth, 0.5 over the last" in html
    assert "Scores at step 40: clip_i 0.640 [0.500, 0.700]" in html and "40-adapters" in html
    found = embedded(html)
    assert set(found["plots"]) == {"loss", "logged", "scores"}
    assert found["plots"]["scores"]["clip_i"]["data"][0]["x"] == [20, 40]
    points, line = (trace["y"] for trace in found["plots"]["loss"]["loss"]["data"])
    assert points[-1] == 0.5 and line[0] == pytest.approx(1) and 0.5 < line[-1] < 0.6
    assert [one["config"] for one in found["wall"]["trials"]] == ["step 10", "step 40"]
    assert html.count("<script") == 3 and "ldm train -t &lt;script&gt;" in html


def test_options_of_a_sweep_are_refused_for_a_run(run):
    with pytest.raises(InputError, match="--latex is for the results of a sweep"):
        Program("report")([str(run), "--latex", "a.tex"])


def test_damaged_scores_are_refused(run, tmp_path):
    (tmp_path / "scores.json").write_text('{"scores": {"clip_i": 3}}')
    with pytest.raises(InputError, match="clip_i has no mean"):
        run_page.read_scores(tmp_path)


def test_values_that_json_lacks_are_null():
    page = Page("t", "run", "x", [], [], [Section("wall", "w", wall={"a": float("nan"), "b": (1.0, float("inf"))})])
    assert embedded(render.render(page))["wall"] == {"a": None, "b": [1.0, None]}


def test_configs_that_met_other_subjects_are_said_not_to_compare(facts):
    fewer = replace(facts, last=facts.last.iloc[1:])
    assert "did not meet the same subjects" in " ".join(sweep_page._about_means(fewer))


def test_numbers_have_a_minus_sign_and_zero_has_none():
    assert [summary.signed(number) for number in (-0.0004, -0.0006, 0.5)] == ["0.000", "\u22120.001", "0.500"]
