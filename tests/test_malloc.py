"""Freed memory is kept: page faults of arrays that come and go, counted in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
import numpy as np
from vitrail.malloc import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(2):
    np.ones(16_000_000)  # 128 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(16_000_000)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    """Whether memory is said to be kept, and the page faults of 512 MB."""
    inherited = {
        name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"
    }
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    done = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=True, timeout=60
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept() -> None:
    given_back = faults("give back")[1]
    said, kept = faults("keep")
    assert said == "True"
    # numpy may ask for huge pages, which are few: compare, rather than count pages of 4 KiB.
    assert kept < given_back / 10
    assert given_back > 100


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
)
def test_settings_of_the_environment_stay(environment: dict[str, str]) -> None:
    assert faults("keep", **environment)[0] == "False"
