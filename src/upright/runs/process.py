"""How this process shares the machine: memory that it keeps, cores that it leaves."""

import ctypes
import os
import platform

import joblib
import torch

M_TOP_PAD = -2


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB that tensors have left, for the next ones.

    By default it returns the top of the heap to the system as soon as it is free, and every step faults it in again:
    LeNet's step took a quarter longer for it (CPU, batches of 128), at the same peak of memory.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_TOP_PAD, 64 * 2**20)


def leave_a_core() -> None:
    """Compute with one thread less than there are cores, unless OMP_NUM_THREADS says how many.

    All threads wait for the last one, several hundred times in a step. Where another process takes a core, as many
    threads as cores are many times slower (``benchmarks/threads.py``).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        # joblib's count knows of what a container or a scheduler has left of the machine.
        torch.set_num_threads(max(1, joblib.cpu_count() - 1))
