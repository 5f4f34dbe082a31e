"""Reads mutants of torch files, walks over every tensor, and tells how it went:

    python -m tests.campaign.fuzz_torch_files --count 20000 --seed 0

A file is refused in one line (`InputError`) or read. Whatever else happens ends the process: an exception that is not
refused, a tensor outside its storage, and of course a signal.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch

from ldm.checkpoints import read_object
from ldm.errors import InputError
from tests.campaign.torch_files import FORMATS, bodies, mutant


def tensors_in(value):
    """Every tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            assert not isinstance(key, torch.Tensor)
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from tensors_in(part)
    else:
        assert isinstance(value, (str, bytes, int, float, bool, type(None), type, torch.dtype)), type(value)


def walk(value) -> int:
    """Check that every tensor is plain and lies within its storage, and read all of its elements."""
    count = 0
    for tensor in tensors_in(value):
        assert type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        assert not tensor.is_quantized and not tensor.is_complex() and not tensor.requires_grad
        if tensor.numel():
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            assert min(tensor.stride(), default=0) >= 0
            end = (tensor.storage_offset() + reach + 1) * tensor.element_size()
            assert end <= tensor.untyped_storage().nbytes()
        tensor.double().sum()
        count += 1
    return count


def run(count: int, seed: int) -> dict[str, int]:
    draws = random.Random(seed)
    tried = {"read": 0, "refused": 0, "tensors": 0}
    starts = bodies()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.pt"
        for number in range(count):
            data = FORMATS[draws.choice(list(FORMATS))](mutant(draws.choice(starts), draws))
            if number % 4 == 0:  # the container is damaged, too
                data = mutant(data, draws)
            path.write_bytes(data)
            try:
                tried["tensors"] += walk(read_object(path))
                tried["read"] += 1
            except InputError as error:
                assert "\n" not in str(error) and "weights_only" not in str(error) and str(path) in str(error), error
                tried["refused"] += 1
    return tried


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(run(options.count, options.seed))
