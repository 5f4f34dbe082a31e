"""Bad input: one line that says what was wrong, what was expected and what to do; exit code 2; no traceback."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints import read_weights, save_torch
from ldm.config import instantiate_from_config, load_config
from ldm.errors import InputError
from tests.runs import TINY, command, main_dream_booth, pictures, tiny_model

UNET = "model.params.unet_config"
OPTIMIZER = "model.params.optimizer_config"
ENTRY = f"{UNET}.params.adapter_config.transformer_adp_config"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with photographs, class pictures and files of many kinds."""
    work = tmp_path_factory.mktemp("work")
    pictures(work / "photos", 2), pictures(work / "class", 2), pictures(work / "broken", 1)
    (work / "broken" / "1.png").write_bytes(b"this is no picture")
    (work / "nothing").mkdir()
    (work / "texts").mkdir()
    (work / "texts" / "a.txt").write_text("a")
    files = {
        "empty.ckpt": b"",
        "page.ckpt": b"\n<!DOCTYPE html><html>Sign in</html>",
        "lfs.ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4265380512\n",
        "words.ckpt": b"these are words, no weights at all",
        "bad.yaml": b"model: [1, 2\n",
        "latin.yaml": b"model: \xff\xfe",
        "list.yaml": b"- 1\n- 2\n",
        "zero.yaml": b"0\n",
        "circle.yaml": b"defaults: circle2.yaml\n",
        "circle2.yaml": b"defaults: circle.yaml\n",
        "orphan.yaml": b"defaults: nowhere.yaml\n",
        "number.yaml": b"defaults: 5\n",
        "listed.yaml": b"model: {target: x, params: {a: {b: [1]}}}\n",
        "mapped.yaml": b"defaults: listed.yaml\nmodel: {params: {a: {b: {c: 1}}}}\n",
        "headless.yaml": b"data: {}\n",
        "blank.txt": b"\n  \n",
    }
    for name, content in files.items():
        (work / name).write_bytes(content)
    weights = {"a": torch.ones(1000)}
    save_torch(work / "whole.ckpt", weights)
    save_file(weights, work / "whole.safetensors")
    for kind in ("ckpt", "safetensors"):
        (work / f"half.{kind}").write_bytes((work / f"whole.{kind}").read_bytes()[:1500])
    torch.save({"state_dict": Code()}, work / "code.ckpt")
    save_torch(work / "numbers.ckpt", {"epoch": 3})
    save_torch(work / "list.ckpt", [1, 2])
    state = tiny_model().state_dict()
    state["model.diffusion_model.out.2.bias"] = torch.zeros(7)
    save_torch(work / "wide.ckpt", state)
    return work


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


CHECKPOINTS = {
    "missing.ckpt": "checkpoint .*missing.ckpt does not exist",
    "empty.ckpt": "empty.ckpt is empty; download it again",
    "half.ckpt": "half.ckpt is truncated: .*; download or save it again",
    "half.safetensors": "half.safetensors is truncated or damaged .*; download or save it again",
    "page.ckpt": "page.ckpt is a web page, not a checkpoint: the download went wrong",
    "lfs.ckpt": "lfs.ckpt is a Git LFS pointer, not the checkpoint itself; run 'git lfs pull'",
    "code.ckpt": "code.ckpt refused: its pickle asks for (posix|os|nt).system, which is code, not weights",
    "words.ckpt": "words.ckpt is neither a safetensors nor a torch file .it begins with b'these ar'.",
    "numbers.ckpt": r"numbers.ckpt holds no tensors; its keys are \['epoch'\]",
    "list.ckpt": "list.ckpt holds a list, not weights by name",
    "photos": "photos is a folder; expected a .ckpt, .pt or .safetensors file",
}

CONFIGS = {
    "missing.yaml": "config .*missing.yaml does not exist; the shipped ones are under configs/",
    "bad.yaml": "config .*bad.yaml is not valid YAML: .* line 2",
    "latin.yaml": "config .*latin.yaml cannot be read .*; expected",
    "list.yaml": "config .*list.yaml must be a mapping with keys such as model and data",
    "zero.yaml": "config .*zero.yaml must be a mapping with keys such as model and data, got 0",
    "circle.yaml": "its defaults form a circle: circle.yaml -> circle2.yaml -> circle.yaml",
    "orphan.yaml": "nowhere.yaml does not exist .named in the defaults of .*orphan.yaml",
    "mapped.yaml": "mapped.yaml: model.params.a.b is a mapping, in its defaults a list",
    "number.yaml": "number.yaml: defaults must be text or a list, got 5",
}

UNET_CLASS = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
SIZES = {
    "in_channels": 1, "out_channels": 1, "model_channels": 4, "num_res_blocks": 1, "attention_resolutions": [1],
    "channel_mult": [1], "num_heads": -1, "context_dim": 4, "norm_num_groups": 2,
}  # fmt: skip
TARGETS = {
    "no target": ({"params": {}}, "expected a config with the key 'target', got"),
    "a list": ([1], "expected a config with the key 'target', got"),
    "no module": ({"target": "ldm.nowhere.Thing"}, "there is no module 'ldm.nowhere'; check the spelling"),
    "no class": ({"target": "ldm.models.autoencoder.Thing"}, "module 'ldm.models.autoencoder' has no 'Thing'"),
    "no dots": ({"target": "UNet"}, "target 'UNet' is not a dotted name"),
    "a number": ({"target": 5}, "target '5' is not a dotted name"),
    "an unknown parameter": (
        {"target": "ldm.modules.ema.LitEma", "params": {"model": 1, "decya": 0.9}},
        "params of ldm.modules.ema.LitEma: unknown decya; did you mean decay. it takes model, decay",
    ),
    "a missing parameter": ({"target": "ldm.modules.ema.LitEma"}, "params of ldm.modules.ema.LitEma: model missing"),
    "a long name": ({"target": "ldm." + "x" * 5000}, r"^target 'ldm.x{90,100}\.\.\.x{90,100}': "),
    "a long parameter": (
        {"target": "torch.nn.Linear", "params": {"z" * 5000: 1}}, r"unknown z{90,100}\.\.\.z{90,100}; it takes "
    ),
    **{
        f"{name} {value}": ({"target": UNET_CLASS, "params": {**SIZES, name: value}}, f"^UNetModel: {message}")
        for name, value, message in (
            ("num_heads", -4, "num_heads must be of at least 1, got -4"),
            ("num_heads", 0, "num_heads must be of at least 1, got 0"),
            ("num_head_channels", 7, "num_head_channels 7 is more than the 4 channels"),
            ("channel_mult", [1, -2], r"channel_mult must be of at least 1, got \[1, -2\]"),
            ("channel_mult", [], r"channel_mult must be of at least 1, got \[\]"),
            ("context_dim", -5, "context_dim must be of at least 1, got -5"),
            ("norm_num_groups", 0, "norm_num_groups must be of at least 1, got 0"),
            ("num_res_blocks", -1, "num_res_blocks must be of at least 1, got -1"),
        )
    },
    **{
        f"{name} {value} of latents": (
            {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {"unet_config": {}, name: value}},
            f"^the diffusion model: {name} must be of at least 1, got ",
        )
        for name, value in (("image_size", -8), ("channels", 0))
    },
    "negative sizes of torch": (
        {"target": "torch.nn.Linear", "params": {"in_features": -1, "out_features": 2}}, "params of torch.nn.Linear: "
    ),
    "params as a list": ({"target": "torch.nn.Linear", "params": [1]}, r"params of torch.nn.Linear must be a mapping"),
    "a value of another type": (
        {"target": "torch.nn.Linear", "params": {"in_features": "x", "out_features": 1}},
        "params of torch.nn.Linear: ",
    ),
}

# id: (words of the command line after a good beginning, the line); {work} is the folder above.
TRAINING = {
    "unknown option": ("--foo 3", "unknown option --foo: neither one of --help nor one of Lightning's Trainer"),
    "word without meaning": ("-t foo", "argument -t/--train: expected true or false, got 'foo'; see --help"),
    "bad number": ("--max_steps many", "argument --max_steps: invalid int value: 'many'; see --help"),
    "a seed too large": ("--seed 4294967296", "argument -s/--seed: expected a whole number from 0 to 4294967295, got"),
    "bad override": ("model..x=1 y", "cannot read 'y': expected an option of --help or an override such as"),
    "gpu that is not there": ("--gpus 0,", "--gpus 0,: this machine has no CUDA GPU; leave --gpus out"),
    "no gpu at all": ("--gpus []", "--gpus '\\[\\]': expected numbers of GPUs such as 0, or 0,3"),
    "half a base that learns": (
        "--base_precision bf16 model.params.train_level=[unet]",
        "--base_precision needs a frozen UNet, but this config trains \\d+ of its tensors",
    ),
    "gpu that is no number": ("--gpus first", "--gpus 'first': expected numbers of GPUs such as 0, or 0,3"),
    "precision": ("--precision 12", "Lightning's Trainer refuses its options: Precision '12' is invalid"),
    "strategy": ("--strategy magic", "refuses its options: You selected an invalid strategy name"),
    "accelerator": ("--accelerator abacus", "refuses its options: .*abacus"),
    "accelerator without its package": ("--accelerator tpu", "refuses its options: .*torch_xla"),
    "a range of devices": ("--devices 0-3", "--devices 0-3: expected how many, or which, such as 2 or 0,3: invalid"),
    "half precision of everything": ("--precision bf16-true", "would round the noise schedule, too: use bf16-mixed"),
    "no photographs' set": ("data.params.train=null", "data.params.train.target is missing"),
    "no data section": ("data.params=null", "data.params.train.target is missing: it names"),
    "reference to nothing": ("model.params.scale_factor=${nope}", "the config refers to what is not in it: Interpol"),
    "devices": ("--devices many", "refuses its options: `devices` selected with"),
    "fixed option": ("--logger false", "argument --logger: invalid choice: 'false'"),
    "no such run": ("-r {work}/photos", "cannot resume .*photos: expected the folder of a run with"),
    "resume and name": ("-r {work} -n x", "-r resumes a run, which has a name already; leave -n out"),
    "no data": ("--data_root {work}/no", "the folder .*no does not exist: expected a folder with pictures"),
    "empty data": ("--data_root {work}/nothing", "the folder .*nothing is empty: expected a folder with pictures"),
    "texts as data": ("--data_root {work}/texts", "the folder .*texts has no pictures, only a.txt"),
    "a picture as data": ("--data_root {work}/photos/0.png", "0.png is a file: expected a folder with pictures"),
    "broken picture": ("--data_root {work}/broken", "cannot read the picture .*broken/1.png: .*; replace or remove it"),
    "broken picture in a worker": (
        "--data_root {work}/broken data.params.num_workers=1",
        "^cannot read the picture .*broken/1.png: .*; replace or remove it$",
    ),
    "broken picture without a cache": (
        "--data_root {work}/broken --cache off data.params.batch_size=2",
        "cannot read the picture .*broken/1.png: .*; replace or remove it",
    ),
    "optimizer": ("model.params.optimizer_config.target=torch.optim.Adan", "module 'torch.optim' has no 'Adan'"),
    "optimizer's argument": (
        f"{OPTIMIZER}.target=torch.optim.Adam {OPTIMIZER}.params.betas=3",
        "^params of torch.optim.Adam: ",
    ),
    "no class data": ("--reg_data_root {work}/no", "the folder .*no does not exist"),
    "negative class pictures": ("--num_class_images -4", "num_class_images must not be negative, got -4"),
    "base model": ("--actual_resume {work}/wide.ckpt", r"out.2.bias has shape \[7\], the model wants \[4\]"),
    "other weights": ("--actual_resume {work}/whole.ckpt", r"this config: it lacks \d+ of \d+ weights .* holds 1 that"),
    "no base model": ("checkpoint.random_seed=null checkpoint.path=no.ckpt", "no.ckpt does not exist: name a check"),
    "learnt words": ("--embedding_manager_ckpt {work}/numbers.ckpt", "holds no token embeddings"),
    "learning rate": ("model.base_learning_rate=fast", "base_learning_rate must be a positive number, got .fast."),
    "learning nothing": ("model.params.train_level=[all]", "train_level has 'all': expected adapter"),
    "batch size": ("data.params.batch_size=0", "data.params.batch_size must be a whole number of at least 1, got 0"),
    "workers": ("data.params.num_workers=-1", "data.params.num_workers must be a whole number of at least 0, got -1"),
    "size of pictures": ("data.params.train.params.size=0", "size: expected a number of pixels such as 512, got 0"),
    "size that cannot be halved": (
        "data.params.train.params.size=36 data.params.reg.params.size=36 data.params.validation.params.size=36",
        "latents of 9 x 9 do not fit this UNet: it needs multiples of 2",
    ),
    "adapter key": (f"{ENTRY}=[{{dim: 1}}]", "transformer_adp_config.0.dim is unknown; did you mean din.$"),
    "adapter method": (f"{ENTRY}=[{{din: ffni, dout: ffni, mid_dim: 2, method: gelu}}]", "method must be one of relu"),
    "adapter scale": (f"{ENTRY}=[{{din: ffni, dout: ffni, mid_dim: 2, scale: x}}]", "0.scale must be a finite number"),
    "adapter width": (f"{ENTRY}=[{{din: ffni, dout: ffni, mid_dim: 0}}]", "mid_dim must be a whole number"),
    "adapter route": (f"{ENTRY}=[{{din: ffni, dout: attn1i, mid_dim: 2}}]", "ffni-attn1i writes before it reads"),
    "unknown UNet": (f"{UNET}.target=ldm.modules.Net", "module 'ldm.modules' has no 'Net'"),
    "unknown UNet argument": (f"{UNET}.params.chanels=3", ".chanels: .*: unknown chanels; did you mean .* it takes"),
    "UNet of no width": (f"{UNET}.params.model_channels=abc", "UNetModel"),
    "width of the context": (f"{UNET}.params.context_dim=7", r"the condition has \d+ channels, .* context_dim is 7"),
    "groups of norms": (f"{UNET}.params.norm_num_groups=5", "UNetModel: .*num_channels .* divisible by num_groups"),
    "weights of steps": ("model.params.min_snr_gamma=-1", "min_snr_gamma must be positive, got -1"),
    "schedule": ("model.params.beta_schedule=none", "schedule.*none"),
    "trainer section": ("lightning.trainer=5", "^lightning.trainer must be a mapping, got 5"),
    "callback without target": ("lightning.callbacks.x.y=1", "callbacks.x.y is unknown; expected target, params$"),
    "picture frequency": (
        "lightning.callbacks.image_logger.params.batch_frequency=0",
        "batch_frequency of the image logger must be at least 1, got 0",
    ),
    "checkpoint frequency": (
        "lightning.modelcheckpoint.params.every_n_train_steps=0",
        "every_n_train_steps must be a whole number of at least 1, got 0",
    ),
    "log folder": ("--logdir {work}/page.ckpt", "the folder .* cannot be written to"),
}  # fmt: skip

SAMPLING = {
    "n_samples": ("--n_samples 0", "--n_samples must be at least 1, got 0"),
    "n_iter": ("--n_iter -1", "--n_iter must be at least 1, got -1"),
    "steps": ("--ddim_steps 0", "--ddim_steps must be at least 1, got 0"),
    "too many steps": ("--ddim_steps 1001", "1001"),
    "size": ("--H 50", "the picture size 50x32 does not fit this model: expected multiples of 8"),
    "no size": ("--W -8", "the picture size 32x-8 does not fit this model"),
    "channels": ("--C 3", "latents of this model have 4 channels, not 3"),
    "plms with eta": ("--plms --ddim_eta 0.5", "--ddim_eta must be 0 with the plms sampler"),
    "sampler": ("--sampler unipc", "argument --sampler: invalid choice: 'unipc'"),
    "compilation": ("--compile fast", "argument --compile: invalid choice: 'fast'"),
    "no prompts": (
        "--from-file {work}/no.txt",
        "--from-file .*no.txt cannot be read .*; expected text, a prompt per line",
    ),
    "blank prompts": ("--from-file {work}/blank.txt", "--from-file .*blank.txt holds no prompt; expected one per line"),
    "binary prompts": ("--from-file {work}/whole.ckpt", "--from-file .*whole.ckpt cannot be read"),
    "device": ("--device warp", "device 'warp' cannot be used here"),
    "gpu": ("--device cuda:7", "device 'cuda:7' cannot be used here"),
    "adapter": ("--adapter_path {work}/no", "/no does not exist"),
    "no adapter": ("--adapter_path {work}/photos", "photos is a folder with neither .*adapters"),
    "scales": ("--adapter_scale 1", "1 times --adapter_scale for 0 times --adapter_path"),
    "scales of some": (
        "--adapter_path a --adapter_path b --adapter_path c --adapter_scale 1 --adapter_scale 2",
        "2 times --adapter_scale for 3 times --adapter_path: give one for each, or one for all",
    ),
    "checkpoint": ("--ckpt {work}/page.ckpt", "page.ckpt is a web page"),
    "config": ("--config {work}/headless.yaml --ckpt {work}/whole.ckpt", "the config has no 'model' section"),
    "words": ("--embedding_path {work}/list.ckpt", "holds no token embeddings"),
    "option": ("--steps 5", "unrecognized arguments: --steps 5; did you mean --ddim_steps.; see --help"),
    "number": ("--seed x", "argument --seed: expected a whole number from 0 to 4294967295, got 'x'; see --help"),
    "a seed too large": ("--seed 99999999999999999999", "argument --seed: expected a whole number from 0 to"),
    "no folder": ("--outdir", "argument --outdir: expected one argument; see --help"),
}


def one_line(message: str, call, *args) -> None:
    with pytest.raises(InputError, match=message) as error:
        call(*args)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(work, name):
    one_line(CHECKPOINTS[name], read_weights, work / name)
    assert not os.path.exists("ran")


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(work, name):
    one_line(CONFIGS[name], load_config, work / name)


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    config, message = TARGETS[name]
    one_line(message, instantiate_from_config, config)


def training(work, words: str) -> list[str]:
    given = words.format_map({"work": work}) if "{work}" in words else words
    roots = f"--class_word dog --data_root {work}/photos --reg_data_root {work}/class"
    roots += f" --logdir {work}/logs --max_steps 1"
    # An override in YAML's flow style may hold spaces: the words are those that begin an option or a key.
    more = re.split(r" (?=-|\w[\w.]*=|\w+$)", given) if "[{" in given else given.split()
    return f"--base {TINY} -t {roots}".split() + more


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_training(work, name):
    words, message = TRAINING[name]
    one_line(message, main_dream_booth, *training(work, words))
    assert not list((work / "logs").glob("*")), "what is refused leaves no folder of a run"


def test_missing_pieces_of_the_command_line(work):
    one_line("no config: name one with --base", main_dream_booth, "-t")
    one_line("no photographs: name their folder with --data_root", main_dream_booth, "--base", TINY)
    one_line(
        "no class pictures: name their folder with --reg_data_root",
        main_dream_booth,
        "--base",
        TINY,
        "--data_root",
        work / "photos",
    )


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(work, name):
    from sample import main

    words, message = SAMPLING[name]
    beginning = f"--config {TINY} --outdir {work}/out --device cpu --ddim_steps 2 --n_iter 1"
    one_line(message, main, beginning.split() + words.format_map({"work": work}).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "main_dream_booth.py {training} --data_root {work}/broken data.params.num_workers=1",
        "main_dream_booth.py -t --foo",
        "sample.py --config {work}/bad.yaml",
        "sample.py --config {tiny} --ckpt {work}/code.ckpt",
        "sample.py --n_samples 0",
    ],
)
def test_a_command_ends_with_one_line_and_exit_code_2(work, words):
    known = {"work": work, "tiny": TINY, "training": " ".join(training(work, ""))}
    done = command(*words.format_map(known).split())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("error: ") and line == done.stderr.splitlines()[-1]
