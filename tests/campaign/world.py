"""What all attacks share: pictures, a tiny model, its runs without an accident, and folders of what it learnt."""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path

from tests.campaign.attacks import Failed
from tests.campaign.forked import forked, program
from tests.runs import TINY, arguments, differences

STEPS = 8  # of the run that is killed, damaged and resumed; it saves every four
LONG = 60  # of the run that signals meet

# Folders by what was tuned: overrides of the tiny config.
TUNED = {
    "position": [],
    "lora": ["tuning=[{target: ldm.tuning.lora.LoRA, params: {rank: 2}}]"],
    "words": ["tuning=[{target: ldm.tuning.textual_inversion.TextualInversion, params: {words: <cat>}}]"],
    "keys and values": ["tuning=[{target: ldm.tuning.cross_attention.CrossAttention}]"],
}


class World:
    """The tiny model and its runs, made when they are first asked for and never changed: attacks work on copies."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        imported()
        arguments(folder)  # draws the pictures

    def words(self, work: Path, *more: object, config: Path = TINY) -> list[str]:
        """A command line of `main_dream_booth.py` whose run goes to `work/logs`."""
        roots = ["--data_root", self.folder / "photos", "--reg_data_root", self.folder / "class"]
        common = ["--logdir", work / "logs", "--class_word", "dog", "-n", "run", "--accelerator", "cpu"]
        return [str(word) for word in ["--base", config, *roots, *common, *more]]

    def train(self, work: Path, *more: object):
        return program("main_dream_booth.py", *self.words(work, "-t", *more))

    def resume(self, run: Path, *more: object):
        return program("main_dream_booth.py", "-t", "-r", run, *more)

    def sample(self, out: Path, *more: object, config: Path = TINY):
        words = ["--config", config, "--device", "cpu", "--outdir", out, "--ddim_steps", 1, "--n_iter", 1]
        return program("sample.py", *words, *more)

    def _run(self, name: str, *more: object) -> Path:
        work = self.folder / name
        outcome = forked(self.train(work, *more), self.folder)
        if outcome.code:
            raise RuntimeError(f"the campaign's own run failed: {outcome.text}")
        return only_run(work)

    @cached_property
    def whole(self) -> Path:
        """A run of `STEPS` steps without an accident."""
        return self._run("whole", "--max_steps", STEPS)

    @cached_property
    def half(self) -> Path:
        """The same run, stopped after half of them."""
        return self._run("half", "--max_steps", STEPS // 2)

    @cached_property
    def steps(self) -> Path:
        """A long run that keeps what it had learnt after every step."""
        return self._run("steps", "--max_steps", LONG, "lightning.modelcheckpoint.params.every_n_train_steps=1")

    @cached_property
    def model(self):
        """The tiny model on its base, in this process, for children to load folders into."""
        from tests.runs import tiny_model

        route = "model.params.unet_config.params.adapter_config=null"
        return tiny_model(route).eval()

    def tuned(self, kind: str) -> Path:
        """A folder of what a family of tuning learnt (one of `TUNED`), with values other than its start."""
        folder = self.folder / "tuned" / kind.replace(" ", "-")
        if not folder.exists():
            outcome = forked(lambda: _save_tuned(kind, folder))
            if outcome.code:
                raise RuntimeError(f"the campaign's own folder failed: {outcome.text}")
        return folder


def _save_tuned(kind: str, folder: Path) -> None:
    from ldm.tuning import files
    from tests.runs import tiny_model
    from tests.tuned_models import shake

    overrides = [f"model.params.{override}" for override in TUNED[kind]]
    if overrides:
        overrides.append("model.params.unet_config.params.adapter_config=null")
    files.save(shake(tiny_model(*overrides)), folder, {"step": 1})


def imported() -> None:
    """Import what the programs would, once, before anything is forked."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    import ldm.data.dreambooth  # noqa: F401
    import ldm.interchange  # noqa: F401
    import ldm.models.autoencoder  # noqa: F401
    import ldm.models.diffusion.ddpm  # noqa: F401
    import ldm.modules.encoders.modules  # noqa: F401
    import main_dream_booth  # noqa: F401
    import sample  # noqa: F401


def copied(run: Path, work: Path) -> Path:
    """A copy of a run, where a run of this work would be."""
    target = work / "logs" / run.name
    shutil.copytree(run, target)
    return target


def only_run(work: Path) -> Path:
    """The one run under `work/logs`."""
    (run,) = (work / "logs").glob("*")
    return run


def same_folder(one: Path, other: Path) -> bool:
    """Whether two folders of what was learnt hold the same tensors, bit for bit."""
    from ldm.checkpoints import read_weights

    names = sorted(path.name for path in one.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in other.glob("*.safetensors")):
        return False
    return not any(differences(dict(read_weights(one / n)), dict(read_weights(other / n))) for n in names)


def same_end(run: Path, reference: Path, step: int) -> None:
    """Raises `Failed` unless a run ended at `step` with what the reference had learnt there, bit for bit."""
    mine, theirs = (folder / "checkpoints" / f"{step}-adapters" for folder in (run, reference))
    if not mine.is_dir():
        raise Failed(f"the run ended without {mine.name}")
    if not same_folder(mine, theirs):
        raise Failed(f"{mine.name} is not what the run without an accident had learnt")


def loads(run: Path, reference: Path) -> int | None:
    """Check all that a run has on the disk, whatever stopped it; the step that it can go on from, if there is one.

    Every finished file is whole: what lies under its own name loads and is what the reference had at that step.
    """
    from ldm.checkpoints import read_object
    from ldm.errors import InputError

    for folder in sorted((run / "checkpoints").glob("*-adapters")):
        try:
            same = same_folder(folder, reference / "checkpoints" / folder.name)
        except InputError as error:
            raise Failed(f"half-written: {error}") from None
        if not same:
            raise Failed(f"{folder.name} is not what the run without an accident had learnt")
    last = run / "checkpoints" / "last.ckpt"
    if not last.exists():
        return None
    try:
        return read_object(last)["global_step"]
    except InputError as error:
        raise Failed(f"half-written: {error}") from None
