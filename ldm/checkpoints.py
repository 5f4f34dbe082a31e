"""Floor 0: every read and write of weights.

Weights are untrusted: pickles are read with `weights_only=True`, nothing else is ever unpickled. Files are
memory-mapped and models are built without initialising what is then overwritten, so that loading costs about what
reading costs.
Nothing is left half-written: files and folders are written beside their place and renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import pickle
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.util import InputError, find_file, first_line, instantiate_from_config, short

log = logging.getLogger(__name__)


# --- reading --------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, memory-mapped where the format allows.

    Reads `.safetensors` and torch files (told apart by their content, not by their names), with or without a
    `state_dict` level. Raises `InputError` for whatever is not a checkpoint, in one line.
    """
    content = read_object(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not weights by name")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{path} holds no tensors; its keys are {short(list(content)[:5])}")
    return weights


def read_object(path: str | Path) -> Any:
    """Whatever a `.safetensors` or torch file holds: tensors, containers and plain values, never code.

    Raises `InputError` for a missing, empty, truncated or foreign file and for a pickle that asks for code.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a .ckpt, .pt or .safetensors file")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path} is empty; download it again")
    if head[8:9] == b"{":  # before all others: the eight bytes of its length may be anything
        return _read_safetensors(path)
    if head.lstrip().startswith(b"<"):
        raise InputError(f"{path} is a web page, not a checkpoint: the download went wrong (a login or licence page?)")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the checkpoint itself; run 'git lfs pull'")
    if head.startswith(b"PK") or head[0] == 0x80:
        return _read_torch(path, mmap=head.startswith(b"PK"))
    raise InputError(f"{path} is neither a safetensors nor a torch file (it begins with {head[:8]!r})")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file; {} for others."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is truncated or damaged ({first_line(error)}); download or save it again") from None


def _read_torch(path: Path, mmap: bool) -> Any:
    if mmap and not zipfile.is_zipfile(path):
        raise InputError(f"{path} is truncated: its table of contents is missing; download or save it again")
    try:
        with torch.serialization.safe_globals(_inert_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)|`?([\w.]+)`? was not an allowed global|class ([\w.]+)", str(error))
        name = next((group for group in wanted.groups() if group), None) if wanted else None
        if name:
            raise InputError(
                f"{path} refused: its pickle asks for {name}, which is code, not weights; get a .safetensors file"
            ) from None
        raise InputError(f"{path} is damaged or not a torch file ({first_line(error)})") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{path} is truncated or damaged ({first_line(error)}); download or save it again") from None


def _inert_globals() -> list[Any]:
    """What released files name beside tensors, with empty classes in the place of those that could do something.

    SD v1 checkpoints hold Lightning's bookkeeping and numpy numbers, textual-inversion files a `ParameterDict`.
    """
    import numpy as np

    def empty(dotted: str) -> type:
        module, _, name = dotted.rpartition(".")
        return type(name, (), {"__module__": module})

    scalar = (np._core if hasattr(np, "_core") else np.core).multiarray.scalar
    classes = (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "torch.nn.modules.container.ParameterDict",
    )
    known = {
        **{dotted: empty(dotted) for dotted in classes},
        "builtins.set": set,
        "numpy.core.multiarray.scalar": scalar,
        "numpy._core.multiarray.scalar": scalar,
        "numpy.dtype": np.dtype,
        **{
            f"numpy.dtypes.{kind.__name__}": kind
            for kind in (type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?"))
        },
    }
    takes_names = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
    return [(value, name) for name, value in known.items()] if takes_names else list(dict.fromkeys(known.values()))


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder to; renames it into place when the block succeeds.

    Whatever happens, `path` holds either its old content or the whole new one. But where the system cannot exchange two
    folders (Linux can), one takes two steps; a process killed between them leaves both in the hidden folder beside.
    Raises `InputError` where a file would take the place of a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    old = holder / f"{path.name}.old"
    try:
        yield holder / path.name
        _flush(holder / path.name)
        if path.is_dir():
            if not (holder / path.name).is_dir():
                raise InputError(f"{path} is a folder: expected the name of a file to write")
            if _exchanged(holder / path.name, path):
                return  # what was at `path` goes with the holder
            os.replace(path, old)
        os.replace(holder / path.name, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(holder, ignore_errors=True)


def _exchanged(one: Path, two: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if platform.system() == "Linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2 is not None and not renameat2(here, os.fsencode(one), here, os.fsencode(two), exchange)


def _flush(path: Path) -> None:
    """Make sure that the content is on the disk before its name is."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name as one safetensors file, atomically. `metadata` maps strings to strings."""
    from safetensors.torch import save_file

    with atomic_write(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors would leave the file to its owner alone
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, dict(metadata or {}))
        beside.chmod(mode)


def save_torch(path: str | Path, content: Any) -> None:
    """Write a torch file, atomically."""
    with atomic_write(path) as beside:
        torch.save(content, beside)


def save_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, atomically."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


# --- building models and filling them -------------------------------------------------------------------------------


class skip_init(TorchFunctionMode):
    """Within this context modules are built with uninitialised parameters: the caller overwrites every one of them.

    `load_weights` does, and calls `reset_parameters` for those that it was allowed to miss.
    """

    INITS = ("torch.nn.init", "transformers.initialization")  # transformers puts its functions in the place of torch's
    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) in self.INITS:
            return (kwargs or {}).get("tensor", args[0] if args else None)
        if func in self.FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, may_lack: Callable[[str], bool] = lambda name: False
) -> None:
    """Put `weights` into a model, without copying where the dtype is the model's.

    Names that the model does not have (EMA copies, bookkeeping) are left out. Buffers may be absent: the model has
    computed its own, or does so when its `weights_loaded(names of what is absent)` is called at the end. Parameters may
    be absent if `may_lack(name)`; their modules are then initialised by `reset_parameters`.
    Raises `InputError`, with the first few names, if other parameters are absent or shapes differ.
    """
    parameters = dict(model.named_parameters())
    dtypes = {name: value.dtype for name, value in (*parameters.items(), *model.named_buffers())}
    try:
        result = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        wrong = re.findall(
            r"size mismatch for ([^:]+): .*?shape (?:torch\.Size\()?(\[.*?\]).*?model is (?:torch\.Size\()?(\[.*?\])",
            str(error),
        )
        if not wrong:
            raise
        name, theirs, ours = wrong[0]
        raise InputError(
            f"{source} does not fit this config: {name} has shape {theirs}, the model wants {ours} "
            f"({len(wrong)} such); use the config that the checkpoint was made with"
        ) from None
    lacking = [name for name in result.missing_keys if name in parameters]
    unexpected = [name for name in lacking if not may_lack(name)]
    if unexpected:
        raise InputError(
            f"{source} lacks {len(unexpected)} of {len(parameters)} weights ({', '.join(unexpected[:3])}, ...); "
            "expected a checkpoint of the model in this config"
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dtype != dtypes[name]:
            value.data = value.data.to(dtypes[name])
    reset(model, {name for name in lacking if is_adapter(name) or not is_added(name)})
    if hasattr(model, "weights_loaded"):
        model.weights_loaded(set(result.missing_keys))


def reset(model: nn.Module, names: set[str]) -> None:
    """Initialise the named parameters, by the outermost module that has `reset_parameters` and owns only such ones."""
    left = set(names)
    for prefix, module in model.named_modules():
        owned = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
        if owned & left and owned <= names and hasattr(module, "reset_parameters"):
            module.reset_parameters()
            left -= owned
    assert not left, f"no module can initialise {sorted(left)}"


def is_adapter(name: str) -> bool:
    """Whether a state-dict name is of a position adapter (`...adapter_inout.adp.0.weight`, `...0.adapter_1.2.bias`)."""
    return re.search(r"(^|\.)adapter(_inout)?(_\d+)?\.", name) is not None


def is_added(name: str) -> bool:
    """Whether a state-dict name is of something that tuning put beside the base: adapters, LoRA, new tokens."""
    return is_adapter(name) or re.search(r"(^|\.)((lora|hada|lokr|oft|boft)_\w+|new_tokens)\.", name) is not None


BASE_IS_COMING: ContextVar[bool] = ContextVar("BASE_IS_COMING", default=False)


@contextmanager
def base_is_coming() -> Iterator[None]:
    """Within this context models are built without their tuning, which starts from weights that are loaded afterwards.

    Whoever has loaded them calls `model.tune()`.
    """
    token = BASE_IS_COMING.set(True)
    try:
        yield
    finally:
        BASE_IS_COMING.reset(token)


def build_model(config: Mapping, ckpt: str | Path | None, random_seed: int | None = None) -> nn.Module:
    """The model of a config with the weights of a checkpoint, or with seeded random ones where `ckpt` is None.

    `config` is a whole config (its `model` is built). What its tuning adds starts fresh. Raises `InputError`.
    """
    if "model" not in config:
        raise InputError(f"the config has no 'model' section; its keys are {list(config)}")
    if ckpt is None:
        with torch.random.fork_rng(devices=[]), base_is_coming():
            torch.manual_seed(random_seed or 0)
            model = instantiate_from_config(config["model"])
            fill_zeros(model)
        reset(model, set(filter(is_adapter, dict(model.named_parameters()))))
    else:
        weights = read_weights(ckpt)
        with skip_init(), base_is_coming():
            model = instantiate_from_config(config["model"])
        load_weights(model, weights, source=str(ckpt), may_lack=is_added)
    if hasattr(model, "tune"):
        model.tune()
    return model


def fill_zeros(model: nn.Module) -> None:
    """Give a random base what training would: layers that start at zero block every gradient; draw N(0, 1/fan_in)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not is_adapter(name) and not parameter.detach().any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def choose_checkpoint(config: Mapping, given: str | None) -> tuple[str | None, int | None]:
    """Which checkpoint to start from: the one given, else the config's `checkpoint: {path, random_seed}`.

    Returns (path, None), or (None, seed) where the config's own file is absent and it allows a random base.
    Raises `InputError` where there is neither.
    """
    if given:
        return given, None
    own = config.get("checkpoint") or {}
    if own.get("path") and find_file(own["path"]).is_file():
        return str(find_file(own["path"])), None
    absent = f"{own['path']} does not exist" if own.get("path") else "the config names no checkpoint"
    if own.get("random_seed") is not None:
        log.warning("%s: starting from random base weights (seed %s)", absent, own["random_seed"])
        return None, int(own["random_seed"])
    raise InputError(
        f"{absent}: name a .ckpt or .safetensors file with --actual_resume (training) or --ckpt (sampling)"
    )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short digest that tells base models apart: names, shapes and eight values of each tensor, rounded to fp16.

    Reads almost nothing, so that it costs nothing on a memory-mapped checkpoint; the same for fp16 and fp32 copies.
    """
    names = sorted(tensors)
    flat = [tensors[name].detach().flatten() for name in names]
    picked = [values[:: max(1, len(values) // 8)][:8].half() for values in flat]
    digest = hashlib.sha256(json.dumps([(name, list(tensors[name].shape)) for name in names]).encode())
    digest.update(torch.cat(picked).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
