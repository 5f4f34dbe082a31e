"""`ldm <verb>`: the table, the help, completion, the published names, and what is unknown."""

import importlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm import commands
from ldm.__main__ import main
from ldm.commands import Program, convert, demo, help_of, module_name, verbs
from ldm.config import load_config
from ldm.errors import InputError
from ldm.interchange.layers import ORDERS
from tests.conftest import ROOT
from tests.helpers import words_of
from tests.runs import ENVIRONMENT, TINY, fresh_command

# The published programs, and the verb of which each is another name.
PUBLISHED = {
    "main_dream_booth": "train",
    "sample": "sample",
    "scripts.txt2img": "txt2img",
    "scripts.img2img": "img2img",
    "scripts.inpaint": "inpaint",
    "scripts.sample_diffusion": "sample-diffusion",
    "scripts.train": "fit",
    "scripts.train_many": "train-many",
    "scripts.convert": "convert",
    "scripts.inspect_adapter": "inspect",
    "scripts.merge_adapters": "merge",
    "scripts.compose": "compose",
    "scripts.composenW": "compose",
    "scripts.composenW_diffuser": "compose",
    "scripts.diffuser_training": "custom-diffusion",
    "scripts.sample_diffuser": "sample",
    "scripts.diffusers_composenW": "compose",
    "scripts.diffusers_sample": "sample",
    "scripts.diffusers_training": "custom-diffusion",
    "scripts.compress": "compress",
    "scripts.retrieve": "class-pictures",
    "scripts.get_deltas": "deltas",
    "scripts.lora_add": "lora-add",
    "scripts.lora_distill": "distill",
    "scripts.lora_pti": "lora-pti",
    "scripts.train_lora_dreambooth": "lora-dreambooth",
    "scripts.cache_latents": "cache-latents",
    "scripts.before_after": "before-after",
}
SLOW = ("torch", "numpy", "transformers", "pytorch_lightning")


def ldm(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ldm", *words]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=60)


def test_every_module_is_a_verb_and_every_verb_a_module():
    modules = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules == {module_name(verb) for verb in verbs()} and len(set(verbs())) == len(verbs())


@pytest.mark.parametrize("verb", verbs())
def test_a_verb_has_help_in_one_line_and_an_example(verb, capsys):
    assert 20 < len(help_of(verb)) < 95 and help_of(verb).endswith(".")
    assert f"    ldm {verb} " in Program(verb).parser().description + " "
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith(f"usage: ldm {verb} ") and help_of(verb) in text


@pytest.mark.parametrize("verb", verbs())
def test_examples_of_a_verb_can_be_pasted(verb):
    text = Program(verb).module.__doc__.replace("\\\n", "")
    for command in re.findall(rf"^    (ldm {verb} .*)$", text, re.M):
        _, _, *words = words_of(command)
        try:
            Program(verb).parser().parse_args(words)
        except SystemExit:  # --help, which is fine
            assert "--help" in words


def test_help_names_every_verb(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text and help_of(verb) in text for verb in verbs())
    main([])
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in ("train", "sample", "convert"))])
def test_help_takes_little_time(words):
    """Seconds of a processor, since other processes take their share of the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = ldm(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: ldm" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_help_imports_nothing_slow():
    show = "import sys; from ldm.commands import *; [Program(v).parser().format_help() for v in verbs()]"
    code = f"{show}; print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_table_alone_imports_no_verb():
    code = "import sys, ldm.__main__ as m; m.overview(); print([n for n in sys.modules if 'ldm.commands.' in n])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def options_of(program: Program) -> list:
    return [(a.option_strings, a.dest, a.nargs, a.default, a.choices) for a in program.parser()._actions]


@pytest.mark.parametrize(("name", "verb"), PUBLISHED.items())
def test_a_published_program_is_the_verb(name, verb, capsys):
    module = importlib.import_module(name)
    assert options_of(module.main) == options_of(Program(verb, f"ldm {verb}"))
    assert len(Path(module.__file__).read_text().splitlines()) <= 12
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert help_of(verb) in capsys.readouterr().out


def test_every_published_program_is_in_this_table():
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    assert names - {"setup", "scripts.__init__"} == set(PUBLISHED)


def test_users_import_from_sample():
    from ldm.util import load_model_from_config as loader
    from sample import load_model_from_config, main

    assert load_model_from_config is loader and main.verb == "sample"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["comprss"], "'comprss' is no verb; did you mean compress?"),
        (["sampel", "--help"], "did you mean sample?"),
        (["--verbose"], "'--verbose' is no verb"),
        (["xyz"], "'xyz' is no verb; expected train, "),
        (["inspect", "--jsn", "a"], "unrecognized arguments: --jsn; did you mean --json?"),
        (["convert", "a", "b", "--to", "nothing"], "invalid choice: 'nothing'"),
        (["train", "-t", "--max_stesp", "3"], "did you mean --max_steps?"),
        (["lora-pti", "--output_dir", "x"], "the following arguments are required: --instance_data_dir"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest(words, message):
    with pytest.raises(InputError) as refused:
        main(words)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    done = ldm("inspect", str(tmp_path / "nothing.pt"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: checkpoint {tmp_path}/nothing.pt does not exist\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ldm me", "merge"),
        ("ldm convert --mod", "--mode --modelname --modifier_token"),
        ("ldm convert a b --to dif", "diffusers diffusers-model"),
        ("ldm sample --sampler p", "plms"),
        ("ldm train --actual", "--actual_resume"),
    ],
)
def test_completion(line, expected, tmp_path):
    answer = tmp_path / "answer"
    told = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": " "}
    ldm(**told, _ARGCOMPLETE_STDOUT_FILENAME=str(answer), COMP_TYPE="9", _ARGCOMPLETE_SUPPRESS_SPACE="1")
    assert sorted(answer.read_text().split()) == expected.split()


def test_config_prints_what_a_run_would_read(capsys):
    main(["config", "configs/sd-mini/attn2o-ffni.yaml", "data.params.batch_size=7"])
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown == load_config(ROOT / "configs/sd-mini/attn2o-ffni.yaml", ["data.params.batch_size=7"])
    main(["config", "--keys"])
    assert capsys.readouterr().out == (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a config"),
        (["--keys", "a.yaml"], "--keys alone"),
        (["data.params.batch_size=7"], "no config to put data.params.batch_size=7 into"),
        (["configs/sd-mini/dreambooth.yaml", "data.params.batch_sise=7"], "batch_size"),
    ],
)
def test_config_refuses(words, message):
    with pytest.raises(InputError, match=message):
        main(["config", *words])


def test_the_demo_trains_draws_and_compares(tmp_path, monkeypatch):
    """Each of its commands is one that its program reads, and all are about what was trained last."""
    ran = []

    def recorded(verb, *words):
        ran.append((verb, Program(verb).parser().parse_args([str(word) for word in words])))
        if verb == "train":
            for name, step in (("old_demo", 800), ("new_demo", 9), ("new_demo", 12)):
                (tmp_path / "logs" / name / "checkpoints" / f"{step}-adapters").mkdir(parents=True, exist_ok=True)
                os.utime(tmp_path / "logs" / name, (step, 1000 - step))
        return codes.get(verb, 0)

    monkeypatch.setattr(demo, "ldm", recorded)
    monkeypatch.chdir(tmp_path)
    codes = {}
    assert main(["demo", "--max_steps", "12", "model.base_learning_rate=0.1"]) == 0
    (_, train), (_, sample), (_, before) = ran
    assert [verb for verb, _ in ran] == ["train", "sample", "before-after"] and train.train
    assert train.trainer_options == {"max_steps": 12} and train.overrides == ["model.base_learning_rate=0.1"]
    assert (Path(train.data_root) / "woman.png").is_file() and before.data_root == train.data_root
    assert sample.adapter_path == [before.adapter_path] == ["logs/new_demo/checkpoints/12-adapters"]
    codes, ran[:] = {"train": 2}, []
    assert main(["demo", "--logdir", "elsewhere"]) == 2 and [verb for verb, _ in ran] == ["train"]


def test_the_orders_of_layers_are_those_that_there_are():
    assert convert.ORDERS == tuple(ORDERS)


def test_a_new_verb_is_a_module_and_a_row(tmp_path, monkeypatch, capsys):
    """As docs/architecture.md says."""
    (tmp_path / "count_words.py").write_text(
        '"""Count the words of a line."""\n'
        "def add_arguments(p):\n    p.add_argument('words', nargs='*')\n"
        "def run(options):\n    print(len(options.words))\n"
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(commands.VERBS, "words", ("count-words",))
    assert main(["count-words", "a", "b", "c"]) is None
    assert capsys.readouterr().out == "3\n"
    with pytest.raises(InputError, match="unrecognized arguments: --more"):
        main(["count-words", "--more"])
    main(["--help"])
    assert re.search(r"count-words +Count the words of a line\.\n", capsys.readouterr().out)


@pytest.mark.slow
def test_a_process_that_samples_imports_nothing_for_training(tmp_path):
    program = (
        "import atexit, sys; from ldm.__main__ import command\n"
        "atexit.register(lambda: print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr))\n"
        "command()"
    )
    words = ["sample", "--config", TINY, "--prompt", "a dog", "--ddim_steps", 1, "--n_samples", 1, "--n_iter", 1]
    done = fresh_command("-c", program, *words, "--outdir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.splitlines()[-1].split())
    assert "torch" in imported and "ldm" in imported
    assert not imported & {"pytorch_lightning", "lightning_fabric", "torchmetrics", "tensorboard", "peft", "kornia"}
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 1
