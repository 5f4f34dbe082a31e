"""An exponential moving average of a model's trainable parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from ldm.errors import InputError


class LitEma(nn.Module):
    """Shadow copies of the trainable parameters of `model`; frozen ones are not tracked.

    The copies are buffers. Their names are those of the parameters without dots, as in released checkpoints; further
    buffers are `decay` and `num_updates`. With `use_num_upates` (LDM's spelling) the decay starts low and grows.

    Copies that exist in `known`, averages of the same model, are taken over.
    Raises `InputError` unless 0 <= decay <= 1.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True, known: LitEma | None = None
    ):
        super().__init__()
        if not 0 <= decay <= 1:
            raise InputError(f"the decay of a moving average lies between 0 and 1, got {decay}")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        self.m_name2s_name = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        before = dict(known.named_buffers()) if known is not None else {}
        for name, shadow_name in self.m_name2s_name.items():
            start = before.get(shadow_name, model.get_parameter(name))
            self.register_buffer(shadow_name, start.detach().clone())
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """One update: shadow <- d shadow + (1 - d) parameter, d = min(decay, (1 + n) / (10 + n)) at the n-th update."""
        self.num_updates += self.num_updates >= 0  # -1: no counting. Only tensors, so the GPU is never waited for.
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        decay = torch.where(self.num_updates < 0, self.decay, torch.minimum(self.decay, warm_up))
        for shadow, parameter in self._pairs(model):
            shadow.sub_((1 - decay).to(shadow.dtype) * (shadow - parameter))

    def tracks(self, model: nn.Module) -> bool:
        """Whether the copies are of exactly the parameters of `model` that are trainable now."""
        return set(self.m_name2s_name) == {name for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def begin(self, model: nn.Module, shadows: Container[str]) -> None:
        """Set the named shadow copies to the model's current parameters."""
        for name, shadow_name in self.m_name2s_name.items():
            if shadow_name in shadows:
                self.get_buffer(shadow_name).copy_(model.get_parameter(name))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averages into the model."""
        for shadow, parameter in self._pairs(model):
            parameter.copy_(shadow)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Store the current values of `parameters` for `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put back the values that `store` kept."""
        for stored, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.copy_(stored)
        self.collected_params = []

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        return [(self.get_buffer(s), model.get_parameter(name)) for name, s in self.m_name2s_name.items()]
