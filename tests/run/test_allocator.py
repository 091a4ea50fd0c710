"""Freed tensors leave the process where that is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quartet.run.allocator import return_freed_memory

SCRIPT = """
import sys
from quartet.run.allocator import return_freed_memory, return_gaps
from quartet.run.memory_probe import anonymous_bytes
import torch
assert return_freed_memory(sys.argv[1] == "return", tight=False) is (sys.argv[1] == "return")
torch.ones(24 * 2**18).sum()  # 24 MiB: glibc's own threshold grows to this size once it is freed
before = anonymous_bytes()
tensors = [torch.ones(2**18) for _ in range(64)]  # 64 blocks of 1 MiB
held = tensors[1::2]
del tensors
if sys.argv[1] == "now":
    return_gaps()
print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_gaps_between_tensors_are_returned() -> None:
    """Every second of 64 MiB is freed: the system gets 32 MiB back, or nothing."""
    taken = {}
    for mode in ("keep", "return", "now"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
        taken[mode] = int(done.stdout)
    assert taken["keep"] > 60 * 2**20
    assert max(taken["return"], taken["now"]) < 40 * 2**20


def test_auto_waits_until_memory_is_tight() -> None:
    assert not return_freed_memory("auto", tight=False)
    assert not return_freed_memory(False, tight=True)
