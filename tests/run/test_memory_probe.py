"""Memory as the kernel counts it, measured on blocks of known size."""

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quartet.run import memory_probe
from quartet.run.memory_probe import PeakMemory, anonymous_bytes

MIB = 1024**2
BLOCK = 64 * MIB
SLACK = 16 * MIB

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def block() -> mmap.mmap:
    """64 MiB of written memory that closing gives back to the system at once, whatever the allocator does."""
    memory = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, BLOCK, mmap.PAGESIZE):
        memory[start] = 1
    return memory


@linux
def test_peak_remembers_what_was_freed_until_the_reset() -> None:
    peak = PeakMemory("cpu")
    assert peak.since_start
    peak.reset()
    if peak.since_start:
        pytest.skip("this kernel does not permit resetting the peak")
    before = peak.peak_bytes()
    block().close()
    assert BLOCK - SLACK < peak.peak_bytes() - before < BLOCK + SLACK
    peak.reset()
    assert abs(peak.peak_bytes() - before) < SLACK


@linux
def test_reset_not_permitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_probe, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    peak = PeakMemory("cpu")
    peak.reset()
    assert peak.since_start
    block().close()
    assert peak.peak_bytes() > BLOCK


def test_system_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_STATUS", "_CLEAR_REFS", "_SMAPS_ROLLUP"):
        monkeypatch.setattr(memory_probe, name, tmp_path / "absent" / name)
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    unit = 1 if sys.platform == "darwin" else 1024
    assert peak.peak_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert anonymous_bytes() is None


@linux
def test_anonymous_counts_written_memory_and_not_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * BLOCK)
    start = anonymous_bytes()
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), BLOCK, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    read = sum(mapped[place] for place in range(0, BLOCK, mmap.PAGESIZE))
    assert read == BLOCK // mmap.PAGESIZE
    after_reading = anonymous_bytes()
    for place in range(0, BLOCK // 2, mmap.PAGESIZE):
        mapped[place] = 2
    after_writing = anonymous_bytes()
    mapped.close()
    assert start is not None
    assert after_reading is not None
    assert after_writing is not None
    assert abs(after_reading - start) < SLACK
    assert abs(after_writing - after_reading - BLOCK // 2) < SLACK


@linux
def test_anonymous_keeps_counting_what_a_child_shares() -> None:
    """In a fresh process, because forking one with threads is deprecated."""
    script = """
import mmap, os
from quartet.run.memory_probe import anonymous_bytes
start = anonymous_bytes()
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"1" * len(memory)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.close(write)
    os.read(read, 1)
    os._exit(0)
grown = anonymous_bytes() - start
os.close(write)
os.waitpid(child, 0)
print(grown >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert 60 <= int(done.stdout) <= 100


def test_fields_are_read_from_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rollup = tmp_path / "rollup"
    rollup.write_text(
        "5581-7ffe ---p 00000000 00:00 0    [rollup]\nRss:     900 kB\nAnonymous:   100 kB\nLazyFree:   30 kB\n"
        "AnonHugePages:   64 kB\nSwap:    5 kB\nSwapPss:   2 kB\n"
    )
    monkeypatch.setattr(memory_probe, "_SMAPS_ROLLUP", rollup)
    assert anonymous_bytes() == 75 * 1024


def test_cuda_asks_torch_for_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(("peak", device)) or 123)
    peak = PeakMemory("cuda:1")
    peak.reset()
    assert peak.peak_bytes() == 123
    assert not peak.since_start
    assert asked == [("reset", torch.device("cuda:1")), ("peak", torch.device("cuda:1"))]
