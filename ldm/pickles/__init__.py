"""Floor 0: torch files (`torch.save`, of today and of before 1.6) as tensors and plain values, without unpickling.

A pickle is a program for a stack machine. `pickletools.genops` parses it, and our machine (`machine.py`) supports only
the operations that weights need: it makes containers, numbers and texts. Pickles can "call" only the functions in
`BUILDERS` (`builders.py`), which are ours and harmless. No name is looked up in a module, and nothing is imported. No
tensor is made before the claims are checked: the storage must be in the file, and the tensor within its storage.

`torch.load(weights_only=True)` is not enough for untrusted files. Its list of allowed functions, which cannot be
shortened, includes sparse, quantized, nested and meta tensors; it allocates memory that a file only claims to hold; and
it allows tensors that are larger than their storages.

The formats: https://docs.pytorch.org/docs/stable/notes/serialization.html and `torch/serialization.py`.
"""

from ldm.pickles.files import read

__all__ = ["read"]
