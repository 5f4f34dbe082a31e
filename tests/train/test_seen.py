"""What one sees of a run: the lines of its log, sheets of sample pictures, loggers."""

import csv
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning import loggers as lightning_loggers
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ldm.config import plain
from ldm.errors import InputError
from ldm.generate import Settings
from ldm.train import loggers
from ldm.train.loggers import hyperparameters, log_picture
from ldm.train.options import dreambooth_parser, parse
from ldm.train.reporting import EpochReport, RunBar
from ldm.train.run_config import opened
from ldm.train.sample_prompts import read_prompts, sample_prompt
from tests.conftest import ROOT
from tests.runs import TINY, command, events, pictures, pixels, resume, train

QUIET = "lightning.callbacks.image_logger=null"
ENDS = ("lightning.callbacks.image_logger.params.ends=true",)


class Straight(pl.LightningModule):
    """One weight that a step moves: a run of many steps in seconds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, _):
        self.log("train/loss", self.weight**2, prog_bar=True, batch_size=1)
        return self.weight**2

    def validation_step(self, batch, _):
        self.log("val/loss", self.weight**2, batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


# --- lines


@pytest.mark.slow
def test_the_log_of_800_steps_has_less_than_60_lines(tmp_path):
    """In 267 epochs of three steps, some with a validation."""
    photos = pictures(tmp_path / "photos", 3)
    own = f"{{target: ldm.data.dreambooth.PersonalizedBase, params: {{data_root: {photos}, size: 8, repeats: 1}}}}"
    words = [f"data.params={{batch_size: 1, num_workers: 0, train: {own}, validation: {own}}}"]
    words += ["model={target: tests.train.test_seen.Straight, params: {}, base_learning_rate: 1e-4}"]
    config = tmp_path / "config.yaml"
    config.write_text("data: {target: ldm.train.datamodule.DataModuleFromConfig}\n")
    words += ["--max_steps", 800, "--check_val_every_n_epoch", 20]
    words += ["lightning.modelcheckpoint.params.every_n_train_steps=100"]
    where = ["-b", config, "-n", "run", "-l", tmp_path / "logs", "--accelerator", "cpu"]
    done = command("scripts/train.py", "-t", *where, *words)
    assert done.returncode == 0, done.stderr
    lines = (done.stderr + done.stdout).replace("\r", "\n").splitlines()
    assert 15 < len(lines) < 60, "\n".join(lines)
    assert "step 800 of 800" in lines[-2] and any(" left" in line for line in lines)
    assert not any("%|" in line for line in lines), "no bars where there is no terminal"


def test_long_epochs_have_lines_in_between(caplog):
    report, module = EpochReport(between=True), SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        estimated_stepping_batches=800, current_epoch=0, global_step=0, accumulate_grad_batches=1, is_last_batch=False,
        should_stop=False, is_global_zero=True, callback_metrics={}, strategy=SimpleNamespace(reduce=lambda loss: loss),
    )  # fmt: skip
    report.on_train_start(trainer, module)
    with caplog.at_level("INFO"):
        for step in range(1, 801):
            trainer.global_step, trainer.is_last_batch = step, step % 500 == 0
            report.on_train_batch_end(trainer, module, {"loss": torch.tensor(float(step))})
            if trainer.is_last_batch:
                report.on_train_epoch_end(trainer, module)
                trainer.current_epoch += 1
                report.on_train_epoch_start(trainer, module)
        report.on_train_epoch_end(trainer, module)  # the run ends here; its last step is told already
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 20 and told[0].startswith("epoch 0: loss 20.5000, 40 steps in ")
    assert "step 40 of 800" in told[0] and told[-1].startswith("epoch 1: loss 780.5")


@pytest.mark.slow
def test_on_a_terminal_one_bar_goes_over_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars, begin = [], RunBar.on_train_start

    def begins(self, *parts):
        begin(self, *parts)
        bars.append((self.bar, self.bar.disable))

    monkeypatch.setattr(RunBar, "on_train_start", begins)
    run = train(tmp_path, "run", "--max_steps", 2, QUIET)
    resume(run, "--max_steps", 5)
    assert [(bar.initial, bar.n, bar.total, off) for bar, off in bars] == [(0, 2, 2, False), (2, 5, 5, False)]
    train(tmp_path, "without", "--max_steps", 1, QUIET, "--enable_progress_bar", "false")
    assert len(bars) == 2


# --- sheets


@pytest.mark.slow
def test_a_sheet_at_the_start_and_at_the_end_with_photographs_and_step_0(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 2, *ENDS)
    names = sorted(path.name for path in (run / "images").glob("*.png"))
    assert names == ["000000.png", "000002.png"]
    sizes = [Image.open(run / "images" / name).size for name in names]
    row, width = 27 + 96 + 6, 4 * 102 + 6
    assert sizes == [(width, 3 * row), (width, 5 * row)]  # photographs, and two captions
    first, second = (pixels(run / "images" / name) for name in names)
    assert torch.equal(first[:row], second[:row]), "the same photographs"
    assert torch.equal(first[row + 27 : 2 * row], second[row + 27 : 2 * row]), "the pictures of step 0"
    assert not torch.equal(second[row + 27 : 2 * row], second[2 * row + 27 : 3 * row]), "and what was learnt"
    resume(run, "--max_steps", 3)
    third = pixels(run / "images" / "000003.png")
    assert torch.equal(second[: 2 * row], third[: 2 * row])
    assert [image.step for image in events(run).Images("samples")] == [0, 2, 3]


@pytest.mark.slow
def test_prompts_of_a_file_have_settings_of_their_own(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# what to look at\na red cat --d 3 --s 1 --w 64 --h 32\n\na dog --n blurry\n")
    run = train(tmp_path, "run", "--max_steps", 1, "--sample_prompts", file, "a bird", "--sample_every_n_steps", 1)
    with Image.open(run / "images" / "000001.png") as sheet:
        assert sheet.text["prompt"] == "a red cat | a dog | a bird"
        assert sheet.size == (2 * 102 + 6, 3 * (27 + 96 + 6))


def test_a_line_of_kohyas_files():
    one = sample_prompt("a cat -- yes --n bad, worse --w 512 --h 768 --d 7 --l 6.5 --s 20")
    assert (one.text, one.negative, one.seed) == ("a cat -- yes", "bad, worse", 7)
    assert one.settings_over(Settings()) == Settings(width=512, height=768, scale=6.5, steps=20)
    assert sample_prompt("a cat").settings_over(Settings()) == Settings()


@pytest.mark.parametrize(
    "given, message",
    [
        ("a cat --w wide", "--w wide: expected a number"),
        ("a cat --cn x.png", "--cn is unknown; expected --n"),
        ("a cat --s 0", "sizes and steps must be above 0"),
        ("nowhere.txt", "there is no file nowhere.txt"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        read_prompts([given])


def test_prompts_switch_sample_pictures_on(tmp_path):
    words = ["--base", str(TINY), "--sample_prompts", "a cat", QUIET.replace("null", "{params: {disabled: true}}")]
    options, _, _ = parse(dreambooth_parser(""), words)
    found = plain(opened(options, [])[0])["lightning"]["callbacks"]["image_logger"]
    assert found["params"]["prompts"] == ["a cat"] and not found["params"].get("disabled")


# --- loggers


@pytest.mark.slow
def test_numbers_as_a_table_and_hyper_parameters(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 2, QUIET, "--logger", "csv")
    rows = list(csv.DictReader((run / "csv" / "metrics.csv").open()))
    assert {"train/loss", "train/loss_with_prior", "train/grad_norm", "lr-AdamW"} <= rows[0].keys()
    assert "model.base_learning_rate:" in (run / "csv" / "hparams.yaml").read_text()
    assert not (run / "tensorboard").exists()


@pytest.mark.slow
def test_weights_and_biases_without_a_network(tmp_path, monkeypatch):
    """The package itself, which writes into the folder of the run."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path / "elsewhere")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = train(tmp_path, "run", "--max_steps", 2, *ENDS, "--logger", "wandb")
    found, step = dict(wandb.run.summary), wandb.run.summary["trainer/global_step"]
    wandb.finish()
    assert {"train/loss", "train/grad_norm", "lr-AdamW", "samples"} <= found.keys() and step == 2
    [offline] = (run / "wandb").glob("offline-run-*")
    assert len(list(offline.rglob("*.png"))) == 2 and not (tmp_path / "elsewhere").exists()
    assert not (run / "tensorboard").exists()


@pytest.mark.slow
def test_tensorboards_table_of_hyper_parameters(tmp_path):
    run = train(tmp_path, "run", "--max_steps", 1, QUIET)
    [_, start, *_] = [data for name, data in events(run).PluginTagToContent("hparams").items()] * 2
    found = HParamsPluginData.FromString(start).session_start_info.hparams
    assert found["lightning.trainer.max_steps"].number_value == 1
    assert found["dreambooth.class_word"].string_value == "dog"


def run_of(tmp_path, logger):
    options, _, overrides = parse(dreambooth_parser(""), ["--base", str(TINY), "--logger", logger])
    config, *_ = opened(options, overrides)
    return SimpleNamespace(config=config, folder=tmp_path / "run")


@pytest.mark.parametrize(
    "name, cls, expected",
    [
        ("wandb", "WandbLogger", {"save_dir": "{}", "name": "run"}),
        ("mlflow", "MLFlowLogger", {"tracking_uri": "sqlite:///{}/mlflow.db", "run_name": "run",
                                    "artifact_location": "{}/mlflow"}),
    ],
)  # fmt: skip
def test_loggers_by_name_write_into_the_folder_of_the_run(tmp_path, monkeypatch, name, cls, expected):
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(lightning_loggers, cls, lambda **given: given)
    folder = str(tmp_path / "run")
    assert loggers.make_logger(run_of(tmp_path, name)) == {k: v.format(folder) for k, v in expected.items()}
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"--logger {name} needs the package {name}: pip install '[a-z-]*\[{name}\]'"):
        loggers.make_logger(run_of(tmp_path, name))


def test_pictures_go_to_loggers_that_take_them():
    seen = []
    experiment = SimpleNamespace(log_image=lambda *a: seen.append((a[0], a[1].size, a[2])))
    takers = [SimpleNamespace(log_image=lambda *a, **k: seen.append((a[0], a[1][0].size, k)))]
    takers += [SimpleNamespace(experiment=experiment, run_id="r"), SimpleNamespace(experiment=SimpleNamespace())]
    for one in takers:
        log_picture(one, "samples", torch.zeros(3, 4, 5), 7)
    assert seen == [("samples", (5, 4), {"step": 7}), ("r", (5, 4), "samples/000007.png")]


def test_hyper_parameters_are_those_that_tell_trainings_apart():
    words = ["--base", str(ROOT / "configs/lora/dora.yaml")]
    options, _, overrides = parse(dreambooth_parser(""), words)
    found = hyperparameters(SimpleNamespace(config=opened(options, overrides)[0]))
    assert found["model.params.tuning.0.params.kind"] == "dora" and found["lightning.trainer.max_steps"] > 0
    assert not any("first_stage" in key for key in found) and len(found) < 60
