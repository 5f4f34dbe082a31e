"""Floor 0: torch files (`torch.save`, of today and of before 1.6) as tensors and plain values, without unpickling.

A pickle is a program for a stack machine. `pickletools.genops` takes it apart, and the machine here (`machine.py`)
knows only what weights need: it makes containers, numbers and texts. What a pickle would "call" are the functions of
`BUILDERS` (`builders.py`), which are ours and do nothing else. No name is looked up in any module, and nothing is
imported. numpy and torch make nothing before all claims are checked: that a storage is in the file, and that a tensor
lies within its storage.

`torch.load(weights_only=True)` is not enough for files of strangers. Its own list of allowed functions, which nobody
can shorten, holds those for sparse, quantized, nested and meta tensors; it allocates what a file merely claims; and it
lets tensors be larger than their storages.

The formats: https://docs.pytorch.org/docs/stable/notes/serialization.html and `torch/serialization.py`.
"""

from ldm.pickles.files import read

__all__ = ["read"]
