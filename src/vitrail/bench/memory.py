"""Peak memory, measured where nothing else has been: in a process of its own.

A process never gives back all that it once used, so what ran before hides what comes after. On Linux the peak
is that of `/proc/self/status` (VmHWM) and not getrusage's, which a process inherits from the one that started
it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")


class PeakMemory:
    """How much memory has been added since this was made, at the highest.

    Args:
        device: Whose memory: the GPU's on cuda, else that of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _release()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / 2**20
        else:
            self._before = _forget_peak()

    def grown(self) -> float:
        """MiB at the peak so far beyond what there was at the beginning."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20 - self._before
        return max(0.0, highest() - self._before)


def peak_growth(act: Callable[[], object], times: int) -> float:
    """MiB by which this process's highest memory grows while something is done some times."""
    peak = PeakMemory(torch.device("cpu"))
    for _ in range(times):
        act()
    return peak.grown()


def printed_by(*words: str) -> str:
    """What a Python program prints in a process of its own.

    Args:
        words: The program and its arguments, as `python` takes them.

    Raises:
        ValueError: It failed; with the last line it wrote.
    """
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        # What the system killed has no last words; the usual reason is memory.
        last = (done.stderr.strip() or f"exit code {done.returncode}, perhaps out of memory").splitlines()[-1]
        raise ValueError(f"the process that measures memory failed: {last}")
    return done.stdout.strip()


def highest() -> float:
    """MiB that this process had at its peak, since a `PeakMemory` was made if one was."""
    if _STATUS.is_file():
        return _status("VmHWM")
    units = 2**20 if sys.platform == "darwin" else 2**10  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def _forget_peak() -> float:
    """Let the peak begin at what is used now, where the system can; MiB at which it begins."""
    if os.access(_FORGET, os.W_OK):
        _FORGET.write_text("5")  # proc(5): resets the peak of the resident set
    return highest()


def _status(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def _release() -> None:
    """Give back what is no longer used, so that it does not count as used before."""
    gc.collect()
    # glibc keeps freed memory for itself: what comes next would seem to need none.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
