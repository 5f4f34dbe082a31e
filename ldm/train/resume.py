"""What makes a run stop and go on without a trace: safe checkpoints, random states, signals, a guard on the loss."""

from __future__ import annotations

import logging
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loops.loop import _Loop
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.checkpoints import read_object, save_torch
from ldm.errors import InputError, first_line
from ldm.train import manifest as manifests
from ldm.train.workers import is_of_lost_peer
from ldm.tuning import files

log = logging.getLogger(__name__)


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints with a manifest: written beside and renamed; read whole or refused, without running code.

    Raises `InputError` for a file that is damaged, was edited or lacks what a resume needs.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_torch(path, checkpoint | {manifests.KEY: manifests.manifest(checkpoint)})

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        content = read_object(path)
        if not isinstance(content, dict):
            raise InputError(f"{path} is no checkpoint of a run: it holds a {type(content).__name__}")
        if manifests.KEY in content:
            manifests.check(content, str(path))
        else:
            log.warning("%s has no manifest, as an earlier version wrote it: damage would not be noticed", path)
        check_complete(content, str(path))
        return content


# What a resume needs of a checkpoint, and the kind of each part.
NEEDED = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "random_states": list,
    "global_step": int,
    "epoch": int,
}
# Where Lightning counts optimizer steps: by itself, or where a model steps its optimizers.
STEPS = (
    ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed"),
    ("epoch_loop.manual_optimization.optim_step_progress", "total", "completed"),
)
COUNTERS = ("epoch_progress", "epoch_loop.batch_progress", *(path[0] for path in STEPS))


def check_complete(content: dict[str, Any], source: str) -> None:
    """Raises `InputError` unless a checkpoint has every part that a resume needs, each of its kind."""

    def refuse(what: str) -> NoReturn:
        raise InputError(f"{source} is damaged or incomplete: {what}; go on from another checkpoint of this run")

    for name, kind in NEEDED.items():
        if name not in content:
            refuse(f"it lacks {name}")
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            refuse(f"{name} is a {type(content[name]).__name__}, expected a {kind.__name__}")
    if wrong := [name for name, value in content["state_dict"].items() if not isinstance(value, torch.Tensor)]:
        refuse(f"{wrong[0]} is no tensor")
    if wrong := [name for name, value in content["state_dict"].items() if not torch.isfinite(value).all()]:
        refuse(f"{wrong[0]} is not finite")
    loops = content["loops"].get("fit_loop")
    if not isinstance(loops, dict):
        refuse("loops lacks fit_loop")
    for name in COUNTERS:
        if not _counts(loops.get(name)):
            refuse(f"loops.fit_loop.{name} does not hold counts")
    if content["global_step"] not in [_at(loops, path) for path in STEPS]:
        refuse(f"global_step is {content['global_step']}, which is not what its loops counted")
    if not content["optimizer_states"]:
        refuse("optimizer_states is empty")
    for state in content["optimizer_states"]:
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not (isinstance(groups, list) and groups and isinstance(state.get("state"), dict)):
            refuse("optimizer_states holds no state of an optimizer")
        if not all(isinstance(g, dict) and isinstance(g.get("params"), list) and _number(g.get("lr")) for g in groups):
            refuse("optimizer_states has groups without parameters or learning rate")
        if not all(isinstance(one, dict) for one in state["state"].values()):
            refuse("optimizer_states has a parameter without a state")
    for states in content["random_states"]:
        try:
            _try_states(states)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, OverflowError, IndexError) as error:
            refuse(f"random_states cannot be read ({first_line(error)})")


def _counts(value: Any) -> bool:
    """Whether nested dictionaries hold numbers of times and nothing else."""
    if isinstance(value, dict):
        return bool(value) and all(map(_counts, value.values()))
    return isinstance(value, int) and value >= 0


def _unlike(template: Any, found: Any, path: str = "") -> Iterator[str]:
    """Where nested dictionaries lack what a template has, or have it of another type."""
    if isinstance(template, dict) and isinstance(found, dict):
        for name, part in template.items():
            yield from _unlike(part, found.get(name), f"{path}.{name}" if path else name)
    elif type(template) is not type(found):
        yield path


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _try_states(states: dict[str, Any]) -> None:
    """Put random states into generators that nobody draws from."""
    version, numbers, gauss = states["python"]
    random.Random().setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.Generator().set_state(states["torch"])
    for name in ("cuda", "mps"):
        if not (states.get(name) is None or isinstance(states[name], torch.Tensor)):
            raise TypeError(f"{name} is a {type(states[name]).__name__}")


def random_states() -> dict[str, Any]:
    """The states of all random number generators of this process, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if states.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


GENERATORS = {"cpu": "torch", "cuda": "cuda", "mps": "mps"}  # their names in `random_states`, by the type of device


def gathered(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The values that all processes have, in their order."""
    values = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def own_of(trainer: pl.Trainer, values: list[Any]) -> Any:
    """This process's part of what `gathered` gave; None where there were more or fewer processes then."""
    return values[trainer.global_rank] if len(values) == trainer.world_size else None


def without_validation(loops: dict[str, Any]) -> dict[str, Any]:
    """Loops whose validation has counted nothing: no checkpoint is written within one."""
    name = "epoch_loop.val_loop.batch_progress"
    progress = loops["fit_loop"][name]
    nothing = {kind: dict.fromkeys(progress[kind], 0) for kind in ("total", "current")}
    return loops | {"fit_loop": loops["fit_loop"] | {name: nothing | {"is_last_batch": False}}}


def end_epoch(loops: dict[str, Any]) -> bool:
    """Count as Lightning does after the last batch of an epoch; whether it was the last one.

    A checkpoint is written before that. Resuming it, Lightning would count neither that epoch nor the next as it does
    in a run that goes on.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if not (batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]):
        return False
    for kind in ("total", "current"):
        batches[kind]["completed"] = batches[kind]["processed"]
        epochs[kind]["processed"] = epochs[kind]["completed"] = epochs[kind]["started"]
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    return True


class LastStep(pl.Callback):
    """Where the run was at the end of its last finished step: counters, data and random states.

    That is what a checkpoint says, whenever it is written: a resumed run begins the next step anew. Must come first.
    The random states are put back at the first batch, since setting up a run draws random numbers too. `streams` of the
    module (see `ldm.train.streams`) are the same in all processes.
    """

    def __init__(self) -> None:
        self.step: int | None = None  # the last finished one of this session
        self.stepping = False  # weights are being changed
        self.alone = False  # the other processes do not answer
        self.state: dict[str, Any] = {}
        self.random: dict[str, Any] = {}
        self.streams: list[dict[str, Any]] = []
        self.pending: dict[str, Any] | None = None
        self.begins_epoch = False  # what is resumed had come to the end of one

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.stepping = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if self.stepping:
            self.take(trainer, module)

    def take(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep where the run is."""
        data = trainer.datamodule
        self.state = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "loops": without_validation(trainer._checkpoint_connector._get_loops_state_dict()),
        }
        if data is not None and (state := data.state_dict()):
            self.state[type(data).__qualname__] = state
        self.random = random_states()
        self.streams = [stream.states for stream in getattr(module, "streams", [])]
        self.step, self.stepping = trainer.global_step, False

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.state)
        own = self.random or random_states()
        checkpoint["random_states"] = [own] if self.alone else gathered(trainer, own)
        if self.streams:
            checkpoint["random_streams"] = [self.streams]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        if unlike := next(_unlike(trainer.fit_loop.state_dict(), loops), None):
            raise InputError(f"the checkpoint is damaged or of another Lightning: loops.fit_loop has no good {unlike}")
        data = trainer.datamodule
        if data is not None and data.state_dict() and type(data).__qualname__ not in checkpoint:
            raise InputError(f"the checkpoint is incomplete: it lacks the state of the data, {type(data).__qualname__}")
        self.begins_epoch = end_epoch(loops)
        states = checkpoint["random_states"]
        own = getattr(module, "streams", [])
        streams = checkpoint.get("random_streams", [[]])[0]
        if own and not streams:  # of a run on one process, whose draws go on
            streams = [{kind: states[0][name] for kind, name in GENERATORS.items() if states[0].get(name) is not None}]
        if streams and not own:
            named = {GENERATORS[kind]: state for kind, state in streams[0].items()}
            states = [states[0] | named] * trainer.world_size
        for stream, state in zip(own, streams if own else [], strict=True):
            stream.states = state
        self.pending = own_of(trainer, states)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.begins_epoch:  # nothing of it is to be made up for
            _Loop.restarting.fset(trainer.fit_loop, False)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.pending is not None:
            set_random_states(self.pending)
            self.pending = None


class SaveRun(Checkpoint):
    """Writes `<step>-adapters/` and `last.ckpt` every so many steps, on SIGUSR1, and whatever ends the run.

    A loss or a weight that is not finite stops the run before anything is saved. `notes` go into the adapter folders;
    `places` are the folder and the notes of each of several trainings.
    As a `Checkpoint` it comes after all other callbacks.
    """

    def __init__(
        self,
        folder: Path,
        every_n_train_steps: int,
        notes: dict[str, Any] | None = None,
        places: Sequence[tuple[Path, dict[str, Any]]] | None = None,
    ) -> None:
        if not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise InputError(
                f"modelcheckpoint.params.every_n_train_steps must be at least 1, got {every_n_train_steps!r}"
            )
        self.folder, self.every = folder, every_n_train_steps
        self.notes, self.places = notes or {}, places
        self.done = LastStep()
        self.step = 0  # the latest one that is done
        self.saved = 0  # the latest one that is saved, by this session or an earlier one
        self.saving = False
        self.is_bad = False  # something is not finite
        self.interrupted = False  # by Ctrl-C, twice
        self.asked: int | None = None  # the signal that came last
        self.unchecked: torch.Tensor | None = None  # the sum of the losses since the last look
        self.handlers: dict[int, Any] = {}

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # the first process has made it, under its own name

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = self.saved = trainer.global_step
        if trainer.is_global_zero:
            for left in self.folder.glob(".*.tmp-*"):  # of a process that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)
        self.listen()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._ask)

    def listen(self) -> None:
        """Take SIGUSR1, which would end the process: one that comes before the first step is answered after it.

        Where a cluster's requeueing has it, it stays there.
        """
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            self.handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked == signal.SIGINT == number:  # a second Ctrl-C does not wait for the batch to end
            raise KeyboardInterrupt
        self.asked = number
        if number == signal.SIGUSR1 and not self.step:
            log.info("SIGUSR1 before the first step: there is nothing new to save; what that step learns will be saved")

    def release_signals(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self._ask:  # after an error Lightning has put back what was there first
                signal.signal(number, handler)
        self.handlers = {}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.release_signals()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = (outputs or {}).get("loss")  # none where the model steps its optimizers itself
        if loss is not None:
            self.unchecked = loss if self.unchecked is None else self.unchecked + loss
        if trainer.global_step == self.step:
            return  # in the midst of accumulated batches, whose gradients no checkpoint holds
        self.done.take(trainer, module)  # callbacks may have drawn random numbers
        self.step = trainer.global_step
        due = self.step % self.every == 0 or self._ends(trainer)
        if not due and module.device.type == "cuda" and self.step % max(1, trainer.log_every_n_steps):
            return  # to look at the loss is to wait for the device, which works ahead
        self._check(trainer, module)
        asked = self._asked_anywhere(trainer)
        if asked or due:
            self.save(trainer, module)
        if asked in (signal.SIGTERM, signal.SIGINT):
            name, folder = signal.Signals(asked).name, self.folder.parent
            log.info("stopped by %s at step %d; go on with -r %s", name, self.step, folder)
            trainer.should_stop = True

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Whether this is the last batch, as far as one can know."""
        last_of_all = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.should_stop or last_of_all or 0 <= trainer.max_steps <= trainer.global_step

    def _asked_anywhere(self, trainer: pl.Trainer) -> int | None:
        """The signal that any of the processes has received since the last batch."""
        asked, self.asked = self.asked, None
        if trainer.world_size > 1:
            everywhere = trainer.strategy.reduce(
                torch.tensor(asked or 0, device=trainer.strategy.root_device), reduce_op="max"
            )
            asked = int(everywhere) or None
        return asked

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises `InputError`, in all processes, where the losses of any since the last look are not finite.

        A model that steps its optimizers itself gives no losses: there it is the weights that are looked at.
        """
        summed, self.unchecked = self.unchecked, None
        seen = [p for p in module.parameters() if p.requires_grad] if summed is None else [summed]
        bad = [value.detach() for value in seen if not torch.isfinite(value).all()]
        worst = torch.tensor(float(bool(bad)), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            worst = trainer.strategy.reduce(worst, reduce_op="max")
        if worst:
            reason = "a loss or a weight is not finite"
            if bad and summed is not None:
                reason = f"the loss is {float(summed)}"
            self._refuse(trainer, reason)

    def _refuse(self, trainer: pl.Trainer, what: str) -> NoReturn:
        """End a run in which something is not finite."""
        self.is_bad = True
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        kept = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint had been written"
        raise InputError(
            f"{what} near step {trainer.global_step} (learning rate {rate:g}); {kept}; "
            "go on with --precision 32, or start again with a lower model.base_learning_rate"
        )

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write what was tuned, if anything was, and everything that a resume needs.

        Raises `InputError` where a weight is not finite; what was there stays then.
        """
        self.saving = True
        bad = [name for name, p in module.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if bad:
            self._refuse(trainer, f"the weight {bad[0]} is not finite" + f" and {len(bad) - 1} more" * bool(bad[1:]))
        if trainer.is_global_zero:
            self.save_folders(module)
        if self.done.alone:
            content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.checkpoint_io.save_checkpoint(content, self.last)
        else:
            trainer.save_checkpoint(self.last)
        self.saved, self.saving = self.step, False

    def save_folders(self, module: pl.LightningModule) -> None:
        """Write what was tuned as folders to sample with."""
        places = self.places or [(self.folder, self.notes)]
        for one, (folder, notes) in zip(getattr(module, "trainings", [module]), places, strict=True):
            if getattr(one, "is_tuned", False):
                files.save(one, folder / f"{self.step}-adapters", {"step": self.step, **notes})

    # --- ends that no batch announces: early stopping, errors, a second Ctrl-C

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.step != self.saved:
            self._check(trainer, module)
            self.save(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save what was learnt up to the last finished step, unless it is saved or cannot be; say which."""
        self.interrupted = isinstance(exception, KeyboardInterrupt)
        if not trainer.is_global_zero:
            return
        self.done.alone = trainer.world_size > 1  # the others may be anywhere
        finished = self.done.step
        if finished is not None and finished != self.saved and not (self.saving or self.is_bad or self.done.stepping):
            self.step = finished
            if self.unchecked is None or torch.isfinite(self.unchecked).all():
                self.save(trainer, module)
        if not is_of_lost_peer(exception):
            log.info("%s: %s", type(exception).__name__, self.kept())

    def kept(self) -> str:
        """What a run that has ended leaves."""
        if self.done.step is not None and self.done.step == self.saved:
            return f"what was learnt up to step {self.saved} is saved; go on with -r {self.folder.parent}"
        if self.last.exists():
            return f"what was learnt after step {self.saved} is not saved; go on with -r {self.folder.parent}"
        return "nothing was learnt that could be saved"
