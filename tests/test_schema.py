"""What a config may hold: misspelt keys and wrong types are refused, everything that was published loads."""

import inspect
import json
import re

import pytest
from pytorch_lightning import Trainer

from ldm import schema
from ldm.config import check, check_entries, load_config, override, plain
from ldm.errors import InputError, did_you_mean
from ldm.train.options import dreambooth_parser, parse
from ldm.train.run_config import check_config, opened
from tests.conftest import ROOT
from tests.runs import TINY

LORA = ROOT / "configs" / "lora" / "attention.yaml"
UNET = "model.params.unet_config"
ENTRY = f"{UNET}.params.adapter_config.transformer_adp_config.0"

# a misspelt key -> the nearest right one
MISSPELT = {
    "modle.params.x=1": "model",
    "dta.params.batch_size=1": "data",
    "lightening.trainer.max_steps=1": "lightning",
    "dreamboth.cache=off": "dreambooth",
    "checkpiont.path=x": "checkpoint",
    "optimizr=lion": "optimizer",
    "optimzer.name=lion": "optimizer",
    "schedul=cosine": "schedule",
    "los.min_snr=5": "loss",
    "concept.0.repeats=5": "concepts",
    "tunin.0.params.rank=5": "tuning",
    "trainig.seed=1": "training",
    "lightning.trianer.max_steps=1": "trainer",
    "lightning.callback.x=null": "callbacks",
    "lightning.model_checkpoint.params.every_n_train_steps=1": "modelcheckpoint",
    "lightning.modelcheckpoint.parms.every_n_train_steps=1": "params",
    "lightning.modelcheckpoint.params.every_n_train_step=1": "every_n_train_steps",
    "lightning.find_unused_parameter=true": "find_unused_parameters",
    "lightning.loger.target=x": "logger",
    "lightning.trainer.max_step=1": "max_steps",
    "lightning.trainer.acumulate_grad_batches=1": "accumulate_grad_batches",
    "lightning.trainer.gradient_clip_value=1": "gradient_clip_val",
    "lightning.trainer.precison=32": "precision",
    "lightning.callbacks.image_logger.parms.steps=1": "params",
    "lightning.callbacks.image_logger.tagret=x": "target",
    "lightning.callbacks.image_logger.params.batch_frequncy=1": "batch_frequency",
    "lightning.callbacks.image_logger.params.step=1": "steps",
    "dreambooth.cach=off": "cache",
    "dreambooth.classword=dog": "class_word",
    "dreambooth.base_precison=fp32": "base_precision",
    "dreambooth.keepmemory=true": "keep_memory",
    "dreambooth.sede=1": "seed",
    "dreambooth.scale_learning=true": "scale_lr",
    "checkpoint.pth=x": "path",
    "checkpoint.randomseed=1": "random_seed",
    "model.base_learnin_rate=1": "base_learning_rate",
    "model.parms.timesteps=1": "params",
    "model.traget=x": "target",
    "model.params.timestep=10": "timesteps",
    "model.params.reg_wieght=1": "reg_weight",
    "model.params.trainlevel=[adapter]": "train_level",
    f"{UNET}.parms.model_channels=32": "params",
    f"{UNET}.params.num_head=1": "num_heads",
    "model.params.first_stage_config.params.ddcofig.ch=1": "ddconfig",
    "model.params.cond_stage_config.parms.x=1": "params",
    "data.parms.batch_size=1": "params",
    "data.targte=x": "target",
    "data.params.batchsize=1": "batch_size",
    "data.params.num_worker=1": "num_workers",
    "data.params.trian.target=x": "train",
    "data.params.validaton.target=x": "validation",
    "data.params.train.parms.size=1": "params",
    "data.params.train.params.sise=1": "size",
    "data.params.reg.params.repeat=1": "repeats",
    "data.params.validation.targt=x": "target",
    f"{UNET}.params.adapter_config.transformer_adp_confg=[]": "transformer_adp_config",
    f"{UNET}.params.adapter_config.transformer_adp_config.0.middim=1": "mid_dim",
    f"{UNET}.params.adapter_config.transformer_adp_config.0.scle=1": "scale",
}  # fmt: skip

TYPES = {
    "data.params.batch_size=two": "data.params.batch_size must be a whole number of at least 1, got 'two'",
    "data.params.num_workers=1.5": "data.params.num_workers must be a whole number of at least 0, got 1.5",
    "data.params.train=5": "data.params.train must be a mapping or a list, got 5",
    "data=5": "data must be a mapping, got 5",
    "model=[1]": "model must be a mapping, got [1]",
    "model.params=5": "model.params must be a mapping, got 5",
    "model.target=5": "model.target must be text, got 5",
    "model.base_learning_rate=-1": "model.base_learning_rate must be a positive number, got -1",
    "model.params.timesteps=many": "model.params.timesteps: params of ldm.models.diffusion.ddpm.LatentDiffusion: "
    "timesteps must be a whole number, got 'many'",
    "lightning=5": "lightning must be a mapping, got 5",
    "lightning.callbacks=[1]": "lightning.callbacks must be a mapping, got [1]",
    "lightning.trainer.max_steps=many": "lightning.trainer.max_steps must be a whole number of at least -1, got 'many'",
    "lightning.trainer.benchmark=5": "lightning.trainer.benchmark must be true or false, got 5",
    "lightning.modelcheckpoint.params.every_n_train_steps=often":
        "lightning.modelcheckpoint.params.every_n_train_steps must be a whole number of at least 1, got 'often'",
    "dreambooth.seed=-1": "dreambooth.seed must be a whole number from 0 to 4294967295, got -1",
    "dreambooth.keep_memory=5": "dreambooth.keep_memory must be true or false, got 5",
    "dreambooth.base_precision=fp8": "dreambooth.base_precision must be fp32 or bf16 or fp16, got 'fp8'",
    "checkpoint.random_seed=x": "checkpoint.random_seed must be a whole number of at least 0, got 'x'",
    f"{ENTRY}.mid_dim=wide": f"{ENTRY}.mid_dim must be a whole number of at least 1, got 'wide'",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return load_config(TINY)


@pytest.mark.parametrize("word", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_nearest_right_one(word, tiny):
    with pytest.raises(InputError, match=rf"did you mean {MISSPELT[word]}\?") as refused:
        check_config(override(tiny, [word]))
    assert word.partition("=")[0].split(".")[0] in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("word", TYPES)
def test_a_value_of_another_type_is_refused_by_its_dotted_key(word, tiny):
    with pytest.raises(InputError) as refused:
        check_config(override(tiny, [word]))
    assert str(refused.value) == TYPES[word]


# Words of a command line: with a flag before them, behind another option, and with dashes.
PLACES = {
    "with -t": "--base {} -t {}", "behind -n": "--base {} -n run {}", "at once": "--base {} {}",
    "with --scale_lr": "--base {} --scale_lr {}", "with --compile": "--base {} --compile {}",
    "with dashes": "--base {} -t --{}",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("word", ["optimizr=lion", "schedul=cosine", "los.min_snr=5", "dreambooth.cach=off"])
def test_a_misspelt_key_of_the_command_line_is_refused_wherever_it_stands(place, word):
    known = MISSPELT[word]
    with pytest.raises(InputError, match=rf"did you mean (--)?{known}\?"):
        options, _, overrides = parse(dreambooth_parser(""), PLACES[place].format(TINY, word).split())
        opened(options, overrides)


@pytest.mark.parametrize("place", PLACES)
def test_a_section_of_the_config_may_stand_anywhere_on_the_command_line(place):
    options, trainer, overrides = parse(dreambooth_parser(""), PLACES[place].format(TINY, "schedule=constant").split())
    assert overrides in (["schedule=constant"], ["--schedule=constant"]) and not trainer
    assert options.train == ("-t" in PLACES[place]) and options.base == [str(TINY)]


def test_a_section_as_an_option_says_how_it_is_written():
    with pytest.raises(InputError, match="unknown option --optimizer; it is a key of the config: optimizer=lion"):
        parse(dreambooth_parser(""), ["--base", str(TINY), "-t", "--optimizer", "lion"])


@pytest.mark.parametrize("content", ["optimizr: lion", "schedul: {name: cosine}", "los: {gamma: 5}"])
def test_a_misspelt_section_of_a_file_is_refused(tmp_path, content):
    (tmp_path / "own.yaml").write_text(content)
    key = content.partition(":")[0]
    nearest = {"optimizr": "optimizer", "schedul": "schedule", "los": "loss"}[key]
    with pytest.raises(InputError, match=rf"^config .*own.yaml: {key} is unknown; did you mean {nearest}\?"):
        load_config(tmp_path / "own.yaml")


def test_the_file_is_named_that_holds_the_misspelt_key(tmp_path):
    (tmp_path / "base.yaml").write_text("lightning: {trainer: {max_step: 3}}\n")
    (tmp_path / "own.yaml").write_text("defaults: base.yaml\n")
    with pytest.raises(InputError, match=r"^config .*base.yaml: lightning.trainer.max_step is unknown; did you"):
        load_config(tmp_path / "own.yaml")


def test_keys_of_ones_own_and_references_are_left_alone(tmp_path):
    (tmp_path / "own.yaml").write_text("x_width: 60\n_note: mine\ndata: {params: {batch_size: '${x_width}'}}\n")
    assert load_config(tmp_path / "own.yaml").data.params.batch_size == 60


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xef\xbb\xbfcheckpoint: {random_seed: 3}\n")
    assert load_config(tmp_path / "own.yaml") == {"checkpoint": {"random_seed": 3}}


def test_everything_published_loads(golden):
    configs = json.loads((golden / "manifests" / "published_configs.json").read_text())
    assert len(configs) > 15
    for config in configs.values():
        check(config)
        check_entries(config)


def test_overrides_of_entries_of_lists():
    config = load_config(LORA)
    before = plain(config)
    for name in ("model.params.tuning.0.params.rank", "tuning.0.params.rank"):
        changed = override(config, [f"{name}=3", "data.params.batch_size=7"])
        assert changed.model.params.tuning[0].params.rank == 3 and changed.data.params.batch_size == 7
    assert plain(config) == before
    entries = override(config, [f"{UNET}.params.adapter_config.resblock_adp_config=[{{din: resi}}]"])
    (entry,) = plain(override(entries, [f"{UNET}.params.adapter_config.resblock_adp_config.0.dout=reso"]))["model"][
        "params"
    ]["unet_config"]["params"]["adapter_config"]["resblock_adp_config"]
    assert entry == {"din": "resi", "dout": "reso"}
    count = len(config.model.params.tuning)
    with pytest.raises(InputError, match="^model.params.tuning.first is unknown; expected target, params"):
        override(config, ["tuning.first.params.rank=3"])
    for word, message in (
        (f"tuning.{count}.params.rank=3", f"tuning is a list of {count}: got {count}, not 0 to {count - 1}"),
        ("data.0.params=3", "data is a mapping, not a list with an entry 0"),
        ("model.target.0=3", "model.target is 'ldm.* not a list with an entry 0"),
    ):
        with pytest.raises(InputError, match=f"^cannot set .*: .*{message}"):
            override(config, [word])


@pytest.mark.parametrize("train", [[], ["-t"]], ids=["plan", "train"])
@pytest.mark.parametrize("word", ["--max_step", "--max_setps", "--data_rot", "--gradient_clip"])
def test_a_misspelt_option_is_refused_with_the_nearest_right_one(train, word):
    with pytest.raises(InputError, match=f"unknown option {word}; did you mean --[a-z_]+\\?"):
        parse(dreambooth_parser(""), ["--base", str(TINY), *train, word, "3"])


def test_the_trainer_section_is_that_of_lightning():
    theirs = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert set(schema.Trainer.model_fields) - theirs == {"gpus"}
    assert not theirs - set(schema.Trainer.model_fields)
    signature = inspect.signature(Trainer.__init__).parameters
    for name, field in schema.Trainer.model_fields.items():
        if name != "gpus":
            assert signature[name].default == field.default or field.default is None, name


def test_keys_without_effect_are_told():
    config = {"lightning": {"find_unused_parameters": False, "modelcheckpoint": {"params": {"save_top_k": 3}}}}
    assert set(schema.unused(config)) == {
        "lightning.find_unused_parameters",
        "lightning.modelcheckpoint.params.save_top_k",
    }


def test_the_page_is_up_to_date():
    """`python -m ldm.schema docs/configuration.md` writes it."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == schema.page()


def test_help_comes_from_the_schema(capsys):
    with pytest.raises(SystemExit):
        dreambooth_parser("").parse_args(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name in ("class_word", "cache", "base_precision", "data_root", "scale_lr"):
        assert schema.DreamBooth.model_fields[name].description in shown


def test_a_shipped_family_by_name_is_an_entry():
    schema.check_part(list[schema.Tuning], [{"family": "lora", "params": {}, "steps": [0, None]}])
    assert did_you_mean("qqqq", ["a", "b"]) == "; expected a, b"
