"""An accelerator for machines that have none: a device of torch of its own, whose tensors are CPU tensors in a wrapper.

As on a GPU, tensors of two devices cannot meet in an operation (numbers without dimensions and indices may come from
the CPU), and the host waits wherever it reads a value and wherever a tensor changes the device without
`non_blocking=True`: `waits` holds those operations. Registering a device changes
torch for the whole process, so what uses this runs in one of its own (`test_accelerator.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning.accelerators import Accelerator, AcceleratorRegistry
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

# Python cannot stand in for a device in inference mode, which differs from this in speed alone.
torch.inference_mode = lambda *_: torch.no_grad()
torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to` makes wrappers of its parameters

aten = torch.ops.aten
MEET = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
READ = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.item.default}
waits: list[torch._ops.OpOverload] = []


def is_here(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == NAME


class Pretended(Tensor):
    """A tensor on the device: `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __reduce_ex__(self, protocol: int):
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args: tuple, kwargs: dict):
    """The operation on the values, its result on the device where that of a GPU would be."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [t for t in tensors if isinstance(t, Pretended)]
    others = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if here and others and func not in MEET:
        raise RuntimeError(f"{func}: expected one device, but {len(others)} of {len(tensors)} tensors are on the CPU")
    if here and func in READ or crosses(func, args, kwargs):
        waits.append(func)
    values, options = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Pretended) else leaf, (args, kwargs))
    device = options.get("device")
    if is_here(device):
        options["device"] = "cpu"
    options.pop("pin_memory", None)
    result = func(*values, **options)
    written = func is aten.copy_.default
    if not (is_here(device) or (here and device is None)) or (written and not isinstance(args[0], Pretended)):
        return result
    result = tree_map(lambda leaf: Pretended(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if here else result


def crosses(func, args: tuple, kwargs: dict) -> bool:
    """Whether the operation copies between the two devices while the host waits."""
    if func is aten._to_copy.default:
        to_here = is_here(kwargs["device"]) if kwargs.get("device") is not None else isinstance(args[0], Pretended)
        return to_here != isinstance(args[0], Pretended) and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return isinstance(args[0], Pretended) != isinstance(args[1], Pretended) and not any(args[2:])
    return False


class Operations(TorchDispatchMode):
    """Takes what makes tensors on the device, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch does with devices before it comes to operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_here(kwargs.get("device")):
            return torch.as_tensor(args[0], dtype=kwargs.get("dtype")).to(DEVICE)
        if func == Tensor.data.__set__ and isinstance(args[0], Pretended):
            args[0].inner = args[1].inner
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Within this context the device exists."""
    with Operations(), Functions():
        waits.clear()
        yield DEVICE


class PretendedAccelerator(Accelerator):
    """Lightning's view of it: `--accelerator pretended --strategy pretended`."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: torch.device) -> dict:
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


AcceleratorRegistry.register(NAME, PretendedAccelerator)
StrategyRegistry.register(NAME, SingleDeviceStrategy, device=DEVICE, accelerator=PretendedAccelerator())
