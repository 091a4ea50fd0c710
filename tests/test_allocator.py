"""Freed tensors leave the process where that is asked for."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

from quartet import allocator
from quartet.allocator import LARGE, RETURNED_FROM, one_heap, return_freed_memory


class Library:
    """Stands for the C library."""

    def __init__(self, told: list[tuple[int, int]]) -> None:
        self._told = told

    def mallopt(self, what: int, value: int) -> int:
        self._told.append((what, value))
        return 1


SCRIPT = """
import sys
from quartet.allocator import return_freed_memory, return_gaps
from quartet.run.memory_probe import anonymous_bytes
import torch
set_to = return_freed_memory(sys.argv[1] == "return", tight=False, fleeting=False)
assert set_to == (65536 if sys.argv[1] == "return" else None)
torch.ones(1).sum()
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


THREADS = """
import resource, threading
import quartet
import torch
from quartet.allocator import return_freed_memory
return_freed_memory(False, tight=False, fleeting=False)
def work():
    tensors = [torch.ones(2**16) for _ in range(320)]  # 320 blocks of 256 KiB
def in_thread():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print(*[in_thread() for _ in range(4)])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_threads_that_come_and_go_have_the_memory_of_those_before() -> None:
    """The first fetches it page by page, or by what a page holds here."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    first, *others = map(int, done.stdout.split())
    assert 10 * min(others) < first, done.stdout


@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}])
def test_who_says_how_many_heaps_is_not_overruled(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Library(told))
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    one_heap()
    assert told == ([] if own else [(-8, 1)])  # M_ARENA_MAX in malloc.h


@pytest.mark.parametrize(
    ("wanted", "tight", "fleeting", "smallest"),
    [
        ("auto", False, False, None),
        ("auto", False, True, LARGE),
        ("auto", True, True, RETURNED_FROM),
        ("auto", True, False, RETURNED_FROM),
        (True, False, False, RETURNED_FROM),
        (False, True, True, None),
    ],
)
def test_what_is_returned(
    wanted: bool | Literal["auto"], tight: bool, fleeting: bool, smallest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Library(told))
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert return_freed_memory(wanted, tight=tight, fleeting=fleeting) == smallest
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h; -1 turns trimming off, the last goes up to 32 MiB.
    trimming = [] if smallest == RETURNED_FROM else [(-1, -1)]
    assert told == [*trimming, (-3, smallest or 32 * 2**20)]
