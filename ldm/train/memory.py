"""What the C library does with memory that tensors on a CPU free."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, as its malloc.h numbers them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 * 2**20  # bytes; glibc refuses a higher threshold
NEVER = -1


def keep_freed_memory() -> bool:
    """Have this process keep what tensors free for those of the next step; whether it does so from now on.

    glibc gives free memory at the end of its heap back to the kernel, so that each step's activations lie in new pages,
    which the kernel clears one by one at first touch. Kept memory is there already. Results do not change. The price:
    the process holds the most that it ever needed until it ends.

    Blocks above 32 MiB still come from the kernel and go back to it: on the heap, where small ones settle between them,
    few fit into the place of another, and the heap grows to several times of what is in use.
    Other C libraries, which have rules of their own, are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
