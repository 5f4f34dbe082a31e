"""Floor 0: Lightning's module class, or a replacement in processes that do not train.

The import of Lightning takes longer than a small model needs for a picture, because it imports torch's compiler and all
of torchmetrics.
"""

from __future__ import annotations

import sys
from typing import Any

_left_out = False


def leave_out() -> None:
    """Do not import Lightning for models of this process, unless something else has. They cannot train."""
    global _left_out
    _left_out = True


def module_class() -> type:
    """`LightningModule`; after `leave_out`, a plain module with the properties that models need."""
    if _left_out and "pytorch_lightning" not in sys.modules:
        return _untrained()
    import pytorch_lightning as pl

    return pl.LightningModule


def _untrained() -> type:
    import torch
    from torch import nn

    class Untrained(nn.Module):
        """The part of `LightningModule` that models use when they do not train."""

        _trainer = None
        global_step = 0

        @property
        def device(self) -> Any:
            """The device of the weights."""
            first = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0))
            return first.device

    return Untrained
