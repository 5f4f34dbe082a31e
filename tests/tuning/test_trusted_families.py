"""Which families a folder may have: ours, installed ones, and those that the user names. No other is imported."""

import json
import subprocess
import sys
from functools import cache
from importlib import metadata

import pytest
import torch

import sample
from ldm import trust
from ldm.cli import Parser, add_allow_family
from ldm.errors import InputError
from ldm.interchange import own
from ldm.tuning import files, table
from tests.conftest import ROOT
from tests.interchange_models import run
from tests.runs import ENVIRONMENT
from tests.tuned_models import answer, family, model, shake

LORA = family("lora.LoRA", rank=2)
EVIL = "open('ran', 'w').close()\n"
HOSTILE = [
    "downloads.cat.evil.Family", "evil.Family", "venv.__main__.x", "unittest.__main__.x", "ctypes.cdll", "os.system",
    "subprocess.Popen", "this.s", "ldm.tuning.lora.re", "ldm.tuning.files.os.system", "ldm.tuning.table.trust",
    "ldm.util.get_obj_from_str", "ldm.tuning.LORA.LoRA", "ldm.tuning.lora.LoRA ", "ldm.tuning.lora.L\u03bfRA",
    "ldm\uff0etuning\uff0elora\uff0eLoRA", "\uff4cdm.tuning.lora.LoRA", "ldm.tuning.lora.LoRA\x00", "LoRA", "", ".",
    "..evil.x", "/tmp/evil.Family", 3, None, ["lora"], {"target": "os.system"}, True,
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "folder"
    files.save(shake(model([LORA])), folder)
    return folder


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """A copy of a folder with a LoRA, below the working directory and with code of its own."""
    here = tmp_path / "downloads" / "cat"
    here.mkdir(parents=True)
    for file in written.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    for place in (here, tmp_path):
        (place / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return here


def rename(folder, **keys):
    file = folder / "adapter_config.json"
    about = json.loads(file.read_text())
    entry = about["families"][0]
    for key in ("family", "target"):
        entry.pop(key, None)
    entry |= keys
    file.write_text(json.dumps(about))


@cache
def plain_model():
    return model()


@pytest.mark.parametrize("key", ["family", "target"])
@pytest.mark.parametrize("asked", HOSTILE, ids=repr)
def test_nothing_else_is_imported(folder, key, asked, tmp_path):
    rename(folder, **{key: asked})
    base = plain_model()
    before = set(sys.modules)
    for read in (lambda: files.load(base, folder), lambda: own.families(folder), lambda: own.words(folder)):
        with pytest.raises(InputError, match="asks for the family .* was not imported.*--allow_family") as refused:
            read()
        assert "\n" not in str(refused.value)
    named = {str(asked).rpartition(".")[0].split(".")[0], "evil", "downloads"} - {"ldm", ""}
    assert not (set(sys.modules) - before) & named
    assert not list(tmp_path.rglob("ran"))


def test_every_program_refuses_it_and_runs_nothing(folder, tmp_path):
    rename(folder, target="downloads.cat.evil.Family")
    mini = ["--config", ROOT / "configs/sd-mini/inference.yaml"]
    refused = "'downloads.cat.evil.Family', which is not one of ours.*add --allow_family downloads.cat.evil.Family"
    for name, words in {
        "inspect_adapter": [folder],
        "convert": [folder, "out.safetensors", "--to", "kohya", *mini],
        "lora_add": [folder, folder, "out.safetensors", "--mode", "sum", *mini],
    }.items():
        with pytest.raises(InputError, match=refused):
            run(name, *words)
    with pytest.raises(InputError, match=refused):
        sample.main([str(word) for word in ("--adapter_path", folder, "--n_iter", 1, *mini)])
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.slow
def test_a_command_ends_with_one_line_and_exit_code_2(folder, tmp_path):
    rename(folder, target="downloads.cat.evil.Family")
    command = [sys.executable, str(ROOT / "scripts/inspect_adapter.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 2 and "is not one of ours" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "keys",
    [
        {"family": "lora"},
        {"target": "ldm.tuning.lora.LoRA"},
        {"family": "ldm.tuning.lora.LoRA"},
        {"family": "lora", "target": "evil.Family"},
    ],
)
def test_ours_by_name_and_in_older_folders(folder, keys, tmp_path):
    tuned = model()
    files.load(tuned, folder)
    rename(folder, **keys)
    again = model()
    files.load(again, folder)
    assert torch.equal(answer(again.eval()), answer(tuned.eval()))
    assert not list(tmp_path.rglob("ran"))


def test_a_folder_names_its_families(written):
    (entry,) = json.loads((written / "adapter_config.json").read_text())["families"]
    assert (entry["family"], entry["target"]) == ("lora", "ldm.tuning.lora.LoRA")


MINE = """
from ldm.tuning.biases import Biases
class Mine(Biases):
    pass
"""


@pytest.fixture
def mine(folder, tmp_path, monkeypatch):
    """A folder of a family of the user's own, which a config of theirs names."""
    (tmp_path / "my_own_family.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "my_own_family", raising=False)
    files.save(shake(model([{"target": "my_own_family.Mine"}])), folder)
    assert json.loads((folder / "adapter_config.json").read_text())["families"][0]["family"] == "my_own_family.Mine"
    return folder


def test_a_family_of_the_users_own_when_they_name_it(mine, monkeypatch):
    with pytest.raises(InputError, match="add --allow_family my_own_family.Mine"):
        files.load(model(), mine)
    monkeypatch.setattr(trust, "allowed_families", ["my_own_family.Mine"])
    files.load(model(), mine)
    assert own.families(mine)[0][0] == "my_own_family.Mine"


def test_a_model_that_has_it_already_takes_its_folder(mine):
    files.load(model([{"target": "my_own_family.Mine"}]), mine)


def install(place, name="my-package", entry="mine = my_own_family:Mine"):
    about = place / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[ldm.families]\n{entry}\n")


def packages_are_in(place, monkeypatch):
    distributions = metadata.distributions
    monkeypatch.setattr(metadata, "distributions", lambda path: distributions(path=[str(place)]))


def test_an_installed_family(mine, tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    packages.mkdir()
    install(packages)
    packages_are_in(packages, monkeypatch)
    rename(mine, family="mine")
    tuned = model()
    files.load(tuned, mine)
    files.save(tuned, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["families"][0]["family"] == "mine"
    assert table.named("mine") == "my_own_family.Mine"
    rename(mine, family="others")
    with pytest.raises(InputError, match="asks for the family 'others'"):
        files.load(model(), mine)


def test_an_installed_family_cannot_take_the_name_of_ours(folder, tmp_path, monkeypatch):
    install(tmp_path, entry="lora = evil:Family")
    packages_are_in(tmp_path, monkeypatch)
    files.load(model(), folder)
    assert not list(tmp_path.rglob("ran"))


def test_what_lies_in_the_working_directory_is_not_installed(folder, tmp_path):
    """The fixture has put the working directory on sys.path, where a dist-info would count as installed."""
    for place in (tmp_path, folder):
        install(place, entry="cat = evil:Family")
    rename(folder, family="cat")
    with pytest.raises(InputError, match="asks for the family 'cat'"):
        files.load(model(), folder)
    assert not list(tmp_path.rglob("ran"))


def test_what_is_allowed_is_allowed_to_one_command(monkeypatch):
    monkeypatch.setattr(trust, "allowed_families", [])
    parser = Parser()
    add_allow_family(parser)
    parser.parse_args(["--allow_family", "a.B", "--allow_family", "c.D"])
    assert trust.allowed_families == ["a.B", "c.D"]
    parser.parse_args([])
    assert trust.allowed_families == []
    Parser().parse_args([])
    assert trust.allowed_families == []
