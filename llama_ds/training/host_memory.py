"""The C library's allocator, told to keep what a training step frees: the next step wants the same again."""

from __future__ import annotations

import ctypes
import platform

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Stop glibc from returning large freed blocks to the system, where their pages would be zeroed at every step.

    For training on the CPU; measured at 63 M parameters: up to 0.3 s of a step of 1.2 s. Does nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
