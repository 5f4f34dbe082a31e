"""What the config of a run that is gone on with may name: targets of ours. Anything else is refused, not imported."""

import importlib
import re
import sys
from types import FunctionType

import pytest
from omegaconf import OmegaConf

from ldm import trust
from ldm.cli import Parser
from ldm.commands import fit
from ldm.config import ALIASES, load_config, stored_config
from ldm.errors import InputError
from ldm.train import many
from ldm.train.options import dreambooth_parser
from ldm.tuning import table
from tests import runs
from tests.conftest import ROOT

EVIL = "open('ran', 'w').close()\n"
PLACES = {
    "model": "model", "unet": "model.params.unet_config", "first stage": "model.params.first_stage_config",
    "condition": "model.params.cond_stage_config", "optimizer": "model.params.optimizer_config",
    "schedule": "model.params.scheduler_config", "data": "data", "a data set": "data.params.train",
    "a wrapped data set": "data.params.validation.params.inner", "a callback": "lightning.callbacks.mine",
    "the logger": "lightning.logger", "elsewhere": "x_anything.at.all",
}  # fmt: skip
FOREIGN = [
    "evil.Family", "venv.__main__.x", "unittest.__main__.x", "ctypes.cdll", "os.system", "builtins.eval",
    "ldm.checkpoints.shutil.rmtree", "ldm.util.get_obj_from_str", "ldm.train.run.pdb.set_trace", "ldm.tuning.lora.re",
    "ldm.train.saving.SaveRun", "torch.load", "torch.hub.load", "torch.nn.modules.x.evil", "torch.optim.X.y",
    "torch.nn.Linear\n", "pytorch_lightning.callbacks.LambdaCallback", "ldm\uff0emodels.clip.CLIP", "", "evil",
]  # fmt: skip


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A config as a run writes it, below a working directory with code of its own; what changes it and reads it."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "trust_config", False)
    monkeypatch.setattr(trust, "allowed_families", [])
    config = load_config(ROOT / "configs/sd-mini/attn2o-ffni.yaml")
    file = tmp_path / "project.yaml"

    def read(**changes):
        for place, value in changes.items():
            OmegaConf.update(config, place, value, force_add=True)
        file.write_text(OmegaConf.to_yaml(config))
        return stored_config(file)

    return read


@pytest.mark.parametrize("place", PLACES)
def test_a_foreign_target_is_refused_wherever_it_is(stored, place, tmp_path):
    with pytest.raises(
        InputError, match=r"project.yaml asks for 'evil.Family', .* not imported: .*--trust_config"
    ):
        stored(**{PLACES[place]: {"target": "evil.Family"}})
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_also_in_lists(stored):
    with pytest.raises(InputError, match="asks for 'evil.Family'"):
        stored(**{"model.params.tuning": [{"family": "lora"}, {"target": "evil.Family"}]})


@pytest.mark.parametrize("target", FOREIGN, ids=repr)
def test_what_is_foreign(stored, target):
    before = set(sys.modules)
    with pytest.raises(InputError, match="is not among the targets of ours"):
        stored(**{"lightning.callbacks.mine.target": target})
    assert not {"evil", "venv", "unittest.__main__"} & (set(sys.modules) - before)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${model.target}", "x ${oc.decode:1}", "${evil:1}"])
def test_nothing_is_looked_up_for_it(stored, text):
    with pytest.raises(InputError, match=r"refers to other values by .*, which no run writes; .*--trust_config"):
        stored(**{"dreambooth.class_word": text})


LOGGER = {"target": "pytorch_lightning.loggers.WandbLogger"}
SAVES = {"target": "pytorch_lightning.callbacks.ModelCheckpoint"}
WRITES = {
    "a logger": {"logger": {**LOGGER, "params": {"save_dir": "/etc/cron.d"}}},
    "a logger, by its other name": {"logger": {**LOGGER, "params": {"dir": "../../elsewhere"}}},
    "a name that leads out": {"logger": {**LOGGER, "params": {"name": "../../x"}}},
    "a callback": {"callbacks": {"mine": {**SAVES, "params": {"dirpath": "../../x"}}}},
    "a callback's file": {"callbacks": {"mine": {**SAVES, "params": {"filename": "a/../../x"}}}},
    "the trainer": {"trainer": {"default_root_dir": "/tmp"}},
}


@pytest.mark.parametrize("name", WRITES)
def test_it_writes_to_the_folder_of_its_run_alone(stored, tmp_path, name, monkeypatch):
    [(section, value)] = WRITES[name].items()
    with pytest.raises(InputError, match=r"asks to write to .*, outside the folder of its run; .*--trust_config"):
        stored(**{f"lightning.{section}": value})
    monkeypatch.setattr(trust, "trust_config", True)
    stored()


def test_within_that_folder_it_may_write(stored, tmp_path):
    """`stored` lies as if the folder of the run were the one above."""
    inside = {"dirpath": str(tmp_path.parent / "checkpoints"), "filename": "{epoch}-best"}
    stored(**{"lightning.callbacks.mine": {**SAVES, "params": inside}})
    outside = tmp_path.parent / "link"
    outside.symlink_to("/etc")
    with pytest.raises(InputError, match="asks to write to"):
        stored(**{"lightning.callbacks.mine.params.dirpath": str(outside / "x")})


def test_no_other_file_is_read_for_it(stored, tmp_path):
    (tmp_path / "other.yaml").write_text("lightning: {callbacks: {mine: {target: evil.Family}}}")
    with pytest.raises(InputError, match="refers to other files by defaults"):
        stored(defaults="other.yaml")


def test_the_user_may_trust_it(stored, monkeypatch):
    monkeypatch.setattr(trust, "allowed_families", ["my.Family"])
    stored(**{"model.params.tuning": [{"target": "my.Family"}]})
    with pytest.raises(InputError, match="asks for 'evil.Family'"):
        stored(**{"lightning.logger.target": "evil.Family"})
    monkeypatch.setattr(trust, "trust_config", True)
    assert stored().lightning.logger.target == "evil.Family"


def test_the_options_of_training_say_so(monkeypatch):
    for name in ("trust_config", "allowed_families"):
        monkeypatch.setattr(trust, name, getattr(trust, name))
    general = Parser()
    fit.add_arguments(general)
    for parser in (dreambooth_parser(""), general, dreambooth_parser("", several=True)):
        parser.parse_known_args(["--trust_config", "--allow_family", "a.B"])
        assert trust.trust_config and trust.allowed_families == ["a.B"]
        Parser().parse_args([])
        assert not trust.trust_config and not trust.allowed_families
    assert {"trust_config", "allow_family"} <= set(many.RESUMES)


def test_what_the_documents_name_is_of_ours():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"target: ([\w.]+)", page.read_text())}
    assert len(named) > 3 and {name for name in named if not trust.is_ours(name)} <= {"ia3.IA3", "my.module.Family"}


def test_aliases_and_families_are_of_ours():
    assert all(map(trust.is_ours, [*ALIASES.values(), *table.FAMILIES.values()]))


def test_what_is_ours_is_a_class_of_ours():
    names = [name for pattern in trust.TARGETS if pattern.startswith("ldm") for name in spelled(pattern)]
    assert len(names) > 35
    for dotted in names:
        assert trust.is_ours(dotted), dotted
        module, _, name = dotted.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert isinstance(kind, (type, FunctionType)) and kind.__module__.startswith("ldm."), dotted


def spelled(pattern: str) -> list[str]:
    """The names that a pattern of alternatives stands for."""
    text = pattern.replace("\\.", ".").replace("2?", "(2|)")
    if not (found := re.search(r"\(([^()]*)\)", text)):
        return [text]
    return [name for one in found[1].split("|") for name in spelled(text[: found.start()] + one + text[found.end() :])]


def test_a_run_with_a_foreign_config_is_refused_before_anything_happens(tmp_path, stored):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True), (run / "configs").mkdir()
    (run / "checkpoints/last.ckpt").write_bytes(b"x")
    with pytest.raises(InputError):
        stored(**{"lightning.callbacks.mine.target": "evil.Family"})
    (tmp_path / "project.yaml").rename(run / "configs/project.yaml")
    with pytest.raises(InputError, match="asks for 'evil.Family'"):
        runs.resume(run)
    assert not (tmp_path / "ran").exists()
