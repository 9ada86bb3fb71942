"""Memory and threads of this process."""

import ctypes
import os
import platform

import torch

from upright.cores import count_cores

M_TOP_PAD, M_MMAP_THRESHOLD = -2, -3


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory for the next tensors, of up to 32 MiB each.

    By default glibc returns the top of the heap to the system as soon as it is free, and every step requests it again.
    This made LeNet's step a quarter slower (CPU, batches of 128), at the same peak of memory. A large block would go
    back alone, so the second option puts it on the heap: a photograph is decoded in many such blocks.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def leave_a_core() -> None:
    """Compute with one thread fewer than there are cores, unless OMP_NUM_THREADS sets the number.

    All threads wait for the slowest one, several hundred times per step. If another process takes a core, one thread
    per core is many times slower (``benchmarks/threads.py``).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cores() - 1))
