"""What is recorded: every family for 20 steps, trainings side by side, a resumed run, every sampler.

A case is a function of the folder of inputs (`inputs.make`) and an empty folder; it returns what it saw, for JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.recorded.inputs import HERE, ROOT

MINI = ROOT / "configs" / "sd-mini"
STEPS = 20
CPU = ["--accelerator", "cpu"]
PART = ["model.params.train_level=[]", "model.params.unet_config.params.adapter_config=null"]

# --- what is seen of a run


def losses(run: Path) -> dict[str, list[float]]:
    """Every loss in a run's TensorBoard folder, a number per step. JSON keeps all bits of a float32."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = sorted(tag for tag in events.Tags()["scalars"] if "loss" in tag)
    return {tag: [float(f"{event.value:.9g}") for event in events.Scalars(tag)] for tag in tags}


def summary(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    """Of every tensor: dtype and shape, digest, mean, largest magnitude."""
    return {name: about(value) for name, value in sorted(tensors.items())}


def about(value: torch.Tensor) -> list:
    digest = hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]
    kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    value = value.double()
    return [kind, digest, float(f"{value.mean():.6g}"), float(f"{value.abs().max():.6g}")]


def tuned(run: Path, step: int = STEPS) -> dict:
    """The losses of a run and its folder of adapters: tensors by file and the metadata but for versions."""
    folder = run / "checkpoints" / f"{step}-adapters"
    metadata = json.loads((folder / "adapter_config.json").read_text())
    metadata.pop("versions", None)
    for one in metadata.get("families", []):
        one["tensors"] = len(one["tensors"])  # their names are those in the file, which are recorded
    files = {path.name: summary(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}
    return {"losses": losses(run), "tensors": files, "metadata": metadata}


def picture(path: Path) -> dict:
    """A picture: its size, the digest of its pixels, and 8 x 8 mean colours."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    h, w, _ = pixels.shape
    means = pixels.reshape(8, h // 8, 8, w // 8, 3).mean((1, 3)).round().astype(np.uint8)
    return {"size": [h, w], "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(), "means": means.tobytes().hex()}


def pictures(folder: Path) -> list[dict]:
    found = [picture(path) for path in sorted(folder.glob("*.png"))]
    assert found, f"no picture in {folder}"
    return found


# --- runs


def call(main: Callable, *words) -> None:
    main([str(word) for word in words])


def only(work: Path) -> Path:
    """The one folder of a run in `work`."""
    (run,) = work.iterdir()
    return run


def dreambooth(inputs: Path, work: Path, *words, steps: int = STEPS) -> Path:
    """A run of main_dream_booth.py in this process; its folder."""
    from main_dream_booth import main

    call(main, "-t", "-n", "run", "--logdir", work, *CPU, "--max_steps", steps, "--actual_resume",
         inputs / "base.safetensors", *words)  # fmt: skip
    return only(work)


def subject(inputs: Path) -> list:
    roots = ["--data_root", inputs / "photos", "--reg_data_root", inputs / "class", "--class_word", "cat"]
    return ["data.params.reg.params.size=32", *roots]


def family(
    inputs: Path, work: Path, config: str, overrides: tuple[str, ...] = (), layers: tuple[str, ...] = ()
) -> dict:
    """20 steps of a config of configs/sd-mini in small, with YAML files and overrides over it."""
    base = [MINI / f"{config}.yaml", HERE / "small.yaml", HERE / "sizes.yaml", *(HERE / layer for layer in layers)]
    return tuned(dreambooth(inputs, work, "--base", *base, *subject(inputs), *overrides))


def word(inputs: Path, work: Path, config: str, layers: tuple[str, ...] = ()) -> dict:
    """20 steps of textual inversion, which needs no class pictures."""
    base = [MINI / f"textual-inversion-{config}.yaml", *(HERE / name for name in ("small.yaml", "sizes.yaml", *layers))]
    about = ["--data_root", inputs / "photos", "--class_word", "cat", "--init_word", "cat"]
    return tuned(dreambooth(inputs, work, "--base", *base, *about))


def with_pictures(inputs: Path, work: Path, config: str) -> dict:
    """The same, and the sample pictures of the last step, in one grid without captions."""
    from ldm import generate
    from ldm.train.callbacks import ImageLogger

    drawn, usual = [], ImageLogger.of_prompts

    def of_prompts(self, *about):
        drawn.append(usual(self, *about))
        return drawn[-1]

    with mock.patch.object(ImageLogger, "of_prompts", of_prompts):
        seen = family(inputs, work, config)
    rows = list(drawn[-1].values())
    grid = work.with_name("grid") / "grid.png"
    grid.parent.mkdir()
    generate.save_png(generate.grid([one for row in rows for one in row], columns=len(rows[0])), grid, {})
    return {**seen, "pictures": pictures(grid.parent)}


def concepts(inputs: Path, work: Path, config: str, words: tuple[str, ...] = (), count: int = 1) -> dict:
    """20 steps of Custom Diffusion on one or two concepts."""
    new = "addtoken" in config or "joint" in config
    roots = []
    for number, (folder, name) in enumerate([("photos", "cat"), ("other", "dog")][:count], 1):
        caption = f"<new{number}> {name}" if new else name
        roots += ["--datapath", inputs / folder, "--caption", caption, "--reg_datapath", inputs / "class",
                  "--reg_caption", name]  # fmt: skip
    sizes = ["data.params.train.params.size=32", "data.params.train2.params.size=32"]
    base = ["--base", MINI / f"custom-diffusion-{config}.yaml", HERE / "small.yaml"]
    told = ["--class_word", "dog"]  # which only the metadata have: at the time of the recording it was so by default
    return tuned(dreambooth(inputs, work, *base, *roots, *words, *told, *sizes))


def resumed(inputs: Path, work: Path) -> dict:
    """attn2o-ffni for 10 steps and, in another call, for 10 more."""
    from main_dream_booth import main

    base = ["--base", MINI / "attn2o-ffni.yaml", HERE / "small.yaml", HERE / "sizes.yaml"]
    run = dreambooth(inputs, work, *base, *subject(inputs), steps=STEPS // 2)
    call(main, "-t", "-r", run, "--max_steps", STEPS)
    return tuned(run)


def side_by_side(inputs: Path, work: Path) -> dict:
    """Three routes on one subject by scripts/train_many.py, over one base in one process."""
    from scripts.train_many import main

    configs = []
    for config in ("attn2o-ffni", "resi-reso", "attn1i-transo"):
        configs.append(work.with_name(f"{config}.yaml"))
        layers = [str(path) for path in (MINI / f"{config}.yaml", HERE / "small.yaml", HERE / "sizes.yaml")]
        configs[-1].write_text(json.dumps({"defaults": layers}))
    call(main, "-t", "-n", "many", "--logdir", work, *CPU, "--max_steps", STEPS, "--actual_resume",
         inputs / "base.safetensors", "--base", *configs, *subject(inputs))  # fmt: skip
    run = only(work)
    files = sorted(run.glob(f"0*/checkpoints/{STEPS}-adapters/adapters.safetensors"))
    assert len(files) == 3, files
    return {"losses": losses(run), "tensors": {file.parts[-4]: summary(load_file(file)) for file in files}}


def general(inputs: Path, work: Path, config: Path, *words) -> dict:
    """A run of scripts/train.py in this process: its losses and the weights in its checkpoint."""
    from scripts.train import main

    call(main, "-t", "-n", "run", "--logdir", work, *CPU, "--base", config, *words)
    stored = torch.load(only(work) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {"losses": losses(only(work)), "tensors": {"last.ckpt": summary(stored)}}


def autoencoder(inputs: Path, work: Path) -> dict:
    return general(inputs, work, HERE / "autoencoder.yaml", f"data.params.train.params.data_root={inputs / 'photos'}")


def clip(inputs: Path, work: Path) -> dict:
    words = [f"data.params.train.params.data_root={inputs / 'photos'}", f"model.params.folder={inputs / 'clip'}"]
    return general(inputs, work, HERE / "clip.yaml", *words)


def latent_diffusion(inputs: Path, work: Path) -> dict:
    """The UNet's training on cached latents: averaged weights, weights by signal-to-noise ratio, a warm-up."""
    words = [HERE / "small.yaml", f"data.params.train.params.path={inputs / 'latents.safetensors'}",
             "data.params.batch_size=3", "lightning.callbacks=null", "--max_steps", 8,
             f"model.params.ckpt_path={inputs / 'base.safetensors'}",
             "model.params.first_stage_config.params=null"]  # fmt: skip
    return general(inputs, work, MINI / "train" / "ldm.yaml", *words)


def sampled(inputs: Path, work: Path, sampler: str, adapter: str, scale: float, eta: float = 0.0) -> dict:
    """Two pictures by sample.py, with a folder that an earlier commit wrote."""
    from sample import main

    call(main, "--config", HERE / "base.yaml", "--ckpt", inputs / "base.safetensors", "--device", "cpu", "--outdir",
         work, "--adapter_path", HERE / "files" / adapter, "--prompt", "an emoji of a sks cat", "--n_samples", 2,
         "--n_iter", 1, "--seed", 7, "--sampler", sampler, "--ddim_steps", 6, "--ddim_eta", eta, "--scale", scale,
         "--skip_grid")  # fmt: skip
    return {"pictures": pictures(work / "samples")}


def tuning(family: str, **params) -> tuple[str, ...]:
    """Overrides by which one family alone learns."""
    return (*PART, f"model.params.tuning=[{json.dumps({'target': f'ldm.tuning.{family}', 'params': params})}]")


LORAS = ("attention", "attention-text", "boft", "convolution", "dora", "loha", "lokr", "oft", "rslora")
TWO = ("--modifier_token", "<new1>+<new2>")
Case = Callable[[Path, Path], dict]
FAMILIES: dict[str, Case] = {
    "attn2o-ffni": partial(with_pictures, config="attn2o-ffni"),
    **{name: partial(family, config=name) for name in ("resi-reso", "attn1i-transo", "attn2c-attn2c")},
    "several-adapters": partial(family, config="attn2o-ffni", layers=("several.yaml",)),
    **{f"lora-{kind}": partial(family, config=f"lora-{kind}") for kind in LORAS},
    "adapters-and-lora": partial(
        family, config="attn2o-ffni", overrides=("model.params.tuning=[{target: ldm.tuning.lora.LoRA}]",)
    ),
    **{f"custom-diffusion-{name}": partial(concepts, config=name) for name in ("finetune", "addtoken")},
    "custom-diffusion-joint": partial(concepts, config="joint", words=TWO, count=2),
    "custom-diffusion-all-of-cross-attention": partial(
        concepts, config="finetune", words=("--freeze_model", "crossattn")
    ),
    **{f"textual-inversion-{name}": partial(word, config=name) for name in ("one-vector", "four-vectors")},
    "textual-inversion-pivotal": partial(word, config="pivotal", layers=("pivotal.yaml",)),
    "biases": partial(family, config="dreambooth", overrides=tuning("biases.Biases")),
    "norms": partial(family, config="dreambooth", overrides=tuning("norms.Norms")),
    "full-unet": partial(
        family, config="dreambooth", overrides=("model.params.train_level=[unet]", "model.base_learning_rate=1e-4")
    ),
}
ACCUMULATED = ("--accumulate_grad_batches", "2", "--gradient_clip_val", "0.5")
RUNS: dict[str, Case] = {
    "resumed": resumed,
    "train-many": side_by_side,
    "averaged": partial(family, config="attn2o-ffni", overrides=("model.params.use_ema=true", *ACCUMULATED)),
    "half-precision-base": partial(family, config="attn2o-ffni", overrides=("--base_precision", "bf16")),
    "train-autoencoder": autoencoder,
    "train-clip": clip,
    "train-latent-diffusion": latent_diffusion,
}
SAMPLERS = {
    "ddim": ("ddim", 0.0), "ddim-eta-1": ("ddim", 1.0), "plms": ("plms", 0.0), "dpm-solver": ("dpm_solver", 0.0),
}  # fmt: skip
PICTURES: dict[str, Case] = {
    f"{name}-{adapter}-scale-{scale}": partial(sampled, sampler=sampler, adapter=adapter, scale=scale, eta=eta)
    for name, (sampler, eta) in SAMPLERS.items()
    for adapter in ("attn2o-ffni", "lora-attention")
    for scale in (1, 5)
}
CASES = {**FAMILIES, **RUNS, **PICTURES}


def run(name: str, inputs: Path, work: Path) -> dict:
    """What the case `name` gives on this machine. `work` is a folder for it alone."""
    work.mkdir(parents=True)
    return CASES[name](inputs, work / "logs")
