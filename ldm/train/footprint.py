"""The cost of a training step, counted on fake tensors: memory, floating-point operations and memory traffic.

A fake tensor has a shape, a type and a storage without bytes. One step of the real model, loss and optimizer takes a
few seconds on fake tensors, whatever the size. A dispatch mode sees every operation and counts the live storages.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldm.devices import cast_frozen
from ldm.models.building import skip_init, untuned_model
from ldm.modules.cached_encoders import CachedPosteriors, CachedPrompts, each
from ldm.train.trainer_section import PRECISIONS
from ldm.tuning import UNET


@dataclass
class Footprint:
    """The cost of one training step. Sizes are in bytes."""

    unet: int = 0  # its frozen weights
    encoders: int = 0  # weights of the autoencoder and the text encoder that stay on the device
    trainable: int = 0
    gradients: int = 0
    optimizer: int = 0
    peak: int = 0  # the largest sum of all live storages
    parameters: int = 0  # how many numbers are trainable
    flops: int = 0  # floating-point operations of the step; a multiplication and an addition are two
    calls: list[tuple[int, int]] = field(default_factory=list)  # (operations, bytes) of every kernel

    @property
    def activations(self) -> int:
        """Memory at the peak beyond weights, gradients and the optimizer's state."""
        return self.peak - self.unet - self.encoders - self.trainable - self.gradients - self.optimizer


class Count(TorchDispatchMode):
    """Counts live storages, operations and memory traffic of everything that runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0
        self.calls: list[tuple[int, int]] = []

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once, for as long as it lives."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        known = self.live.get(reference.cdata)
        if known is not None:
            if not known[0].expired():
                return
            self.now -= known[1]
        self.live[reference.cdata] = reference, storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:  # dead storages matter only for a new peak
            self.forget_dead()
            self.peak = max(self.peak, self.now)

    def forget_dead(self) -> None:
        for key, (reference, size) in list(self.live.items()):
            if reference.expired():
                del self.live[key]
                self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for value in outputs:
            self.track(value)
        if not func.is_view:
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            traffic = sum(value.numel() * value.element_size() for value in (*inputs, *outputs))
            count = flop_registry.get(func._overloadpacket)
            self.calls.append((count(*args, **kwargs, out_val=result) if count else 0, traffic))
        return result


def bytes_of(tensors: Any) -> int:
    """The bytes of tensors; a shared storage counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(
    config: Mapping,
    batches: Sequence[tuple[int, ...]],
    base_precision: str = "fp32",
    precision: str = "32",
    cache: bool = True,
    learning_rate: float = 1e-4,
    caption: str | tuple[int, int] = "photo of a sks dog",
) -> Footprint:
    """The footprint of a training step of a config's model.

    batches: (pictures, height, width) of each batch of a step: of the subject, and of its class if there is one; a
    fourth number: channels, by default 3. caption: a text, or (tokens, width) where the condition is given encoded.
    cache: pictures and captions are encoded beforehand, so frozen encoders are not on the device.
    Raises `InputError` for a config that does not build.
    """
    with skip_init():  # memory that is never written is never allocated
        model = untuned_model(config)
        model.tune()
    model.learning_rate = learning_rate
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _without_values(model, fake)
        trained = model.trainable_parameters()
        cast_frozen(model.model.diffusion_model, PRECISIONS[base_precision])
        samples = [_samples(model, batch, caption) for batch in batches]
        if cache:
            samples = [_cached(model, batch, trained) for batch in samples]
        count = Count()
        for value in (*model.parameters(), *model.buffers()):
            count.track(value)
        optimizer = model.configure_optimizers()
        optimizer = optimizer[0][0] if isinstance(optimizer, tuple) else optimizer
        model.train()
        with count:
            _step(model, samples, optimizer, precision)  # the optimizer's state comes with the first step
            count.calls.clear()
            gradients = _step(model, samples, optimizer, precision)
        return Footprint(
            unet=_frozen_bytes(model, trained, of_unet=True),
            encoders=_frozen_bytes(model, trained, of_unet=False),
            trainable=bytes_of(trained.values()),
            gradients=gradients,
            optimizer=bytes_of(v for v in tree_leaves(list(optimizer.state.values())) if isinstance(v, Tensor)),
            peak=count.peak,
            parameters=sum(value.numel() for value in trained.values()),
            flops=sum(flops for flops, _ in count.calls),
            calls=count.calls,
        )


def _frozen_bytes(model: nn.Module, trained: Container[str], of_unet: bool) -> int:
    named = model.named_parameters()
    return bytes_of(v for name, v in named if name not in trained and name.startswith(UNET) == of_unet)


def _step(model: nn.Module, samples: list[dict[str, Any]], optimizer: Optimizer, precision: str) -> int:
    """One training step; the bytes of its gradients."""
    with _autocast(precision):
        loss = sum(loss for loss, _ in model.losses(samples))
    loss.backward()
    size = bytes_of(value.grad for value in model.parameters() if value.grad is not None)
    del loss
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return size


def _without_values(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace a model's parameters and buffers by fake tensors; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def without(value: Tensor) -> Tensor:
        if id(value) not in made:
            empty = fake.from_tensor(value.detach())
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
        return made[id(value)]

    originals = []  # kept, so that no two have the same id
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, value in holder.items():
                if value is not None:
                    originals.append(value)
                    holder[name] = without(value)


def _samples(model: nn.Module, batch: tuple[int, ...], caption: str | tuple[int, int]) -> dict[str, Any]:
    pictures, *rest = batch
    captions = [caption] * pictures if isinstance(caption, str) else torch.empty(pictures, *caption)
    shown = torch.empty(pictures, *([*rest, 3][:3]))
    return {"caption": captions, model.cond_stage_key: captions, model.first_stage_key: shown}


@torch.no_grad()
def _cached(model: nn.Module, batch: dict[str, Any], trained: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch with cached encodings; cached lookups replace the frozen encoders."""
    pictures, captions = batch[model.first_stage_key], batch["caption"]
    if not isinstance(model.first_stage_model, CachedPosteriors):
        model.true_first_stage = [model.first_stage_model]
    [first_stage] = model.true_first_stage
    posterior = first_stage.encode(pictures.permute(0, 3, 1, 2).contiguous())
    if hasattr(posterior, "parameters"):
        batch = {**batch, model.first_stage_key: posterior.parameters.permute(0, 2, 3, 1)}
        model.first_stage_model = CachedPosteriors(first_stage)
    for name, encoder in list(model.text_encoders().items()):
        is_frozen = not any(one.startswith(f"{name}.") for one in trained)
        if is_frozen and isinstance(captions, list) and not isinstance(encoder, CachedPrompts):
            known = {captions[0]: each(lambda part: part[0], encoder.encode(captions[:1]))}
            model.replace_text_encoder(name, CachedPrompts(encoder, known))
    return batch


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    kind = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0])
    with torch.autocast("cpu", kind) if kind and precision.endswith("mixed") else nullcontext():
        yield
