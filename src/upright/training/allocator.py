"""How this process gives memory back."""

import ctypes
import platform

M_TOP_PAD = -2


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB that tensors have left, for the next ones.

    By default it returns the top of the heap to the system as soon as it is free, and every step faults it in again:
    LeNet's step took a quarter longer for it (CPU, batches of 128), at the same peak of memory.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_TOP_PAD, 64 * 2**20)
