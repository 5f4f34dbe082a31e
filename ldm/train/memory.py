"""What the C library does with memory that tensors on a CPU free."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, as its malloc.h numbers them.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep what tensors free for those of the next step; whether it does so from now on.

    glibc asks the kernel for every large block and gives it back when the block is freed, so that each step's
    activations lie in new pages, which the kernel clears one by one at first touch. Kept memory is there already. The
    price: the process holds the most that it ever needed until it ends. Results do not change. Other C libraries, which
    have rules of their own, are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
