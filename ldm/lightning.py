"""Floor 0: Lightning's module class, or what stands for it in a process that trains nothing.

Lightning takes longer to import than a small model takes to draw a picture, since it brings torch's compiler and all
metrics of torchmetrics with it.
"""

from __future__ import annotations

import sys
from typing import Any

_left_out = False


def leave_out() -> None:
    """Let models of this process do without Lightning, unless something else imports it first. They cannot train."""
    global _left_out
    _left_out = True


def module_class() -> type:
    """`LightningModule`; in a process that leaves Lightning out, a module with the same properties."""
    if _left_out and "pytorch_lightning" not in sys.modules:
        return _untrained()
    import pytorch_lightning as pl

    return pl.LightningModule


def _untrained() -> type:
    import torch
    from torch import nn

    class Untrained(nn.Module):
        """What models use of a `LightningModule` when they do not train."""

        _trainer = None
        global_step = 0

        @property
        def device(self) -> Any:
            """Where the weights are."""
            first = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0))
            return first.device

    return Untrained
