"""Freed memory goes back to the system, where the C library would keep it."""

import platform
import subprocess
import sys

import pytest

from tinyq_lightning.plan.heap import return_freed_memory

MEASURE = """
import re, torch
from tinyq_lightning.plan.heap import return_freed_memory

def resident():  # MiB
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

del (large := [torch.ones(4 * 2**20)])[0]  # from now on, what is smaller lies on the heap
weights = [torch.ones(2**18) for _ in range(128)]
del weights[::2]
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left to themselves")
def test_memory_freed_between_blocks_in_use_goes_back():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 50  # of 64


def test_it_can_be_called_anywhere():
    return_freed_memory()
