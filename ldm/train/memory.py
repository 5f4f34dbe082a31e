"""How the C library treats memory that CPU tensors free."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, as its malloc.h numbers them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 * 2**20  # bytes; glibc refuses a higher threshold
NEVER = -1


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next step. Returns whether that is possible here.

    By default glibc returns free memory at the end of its heap to the kernel. Then the activations of each step lie in
    new pages, and the kernel clears each page at first touch. Results do not change. The price: the process holds its
    peak memory until it ends.

    Blocks above 32 MiB still come from the kernel and go back to it. On the heap, small blocks would settle between
    them and the heap would grow to several times the memory in use. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
