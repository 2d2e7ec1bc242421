"""Freed memory that a process keeps, instead of giving it back to the system and asking for it again.

The activations of a model are freed and asked for again in every pass. From 32 MiB on (those of 8 images in
PVT v2-B1, of 16 in ViT-B/16) glibc takes each from the system anew, which hands it out as zeroed pages, one
at a time: up to a third of a forward pass. Kept, it costs a higher peak: up to a third more memory.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST = 2**31 - 1
_OF_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees from now on; every `vitrail` command begins with it.

    Settings of the same in the environment (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, or in
    GLIBC_TUNABLES) are left alone.

    Returns:
        Whether it was done: False where the environment decides, or with another C library than glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _OF_ENVIRONMENT) or any(name in tunables for name in _TUNABLES):
        return False
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_TRIM_THRESHOLD, _LARGEST) & libc.mallopt(_MMAP_THRESHOLD, _LARGEST))
