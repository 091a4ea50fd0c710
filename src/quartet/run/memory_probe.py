"""Measures the memory of this process: the peak since the last reset, and what it holds now that no file backs."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SMAPS_ROLLUP = Path("/proc/self/smaps_rollup")
_STATM = Path("/proc/self/statm")
_SAMPLED_EVERY = 0.01
"""Seconds between two looks at the anonymous memory. A look takes about 50 microseconds, most of them for waking up."""


class PeakMemory:
    """Peak memory of `device` since the last reset.

    CUDA: bytes allocated by torch on that device. CPU on Linux: the peak resident set (VmHWM), file pages such as
    memory-mapped weights included. Where the kernel does not permit resetting it (some containers), and on other
    systems, it is the peak since the process started: `since_start` is then True.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.since_start = self._device.type != "cuda"
        self._before = 0

    def reset(self) -> None:
        """Start a new measurement, where the system permits it."""
        self._before = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            # 5 resets the peak resident set to the current one (proc_pid_clear_refs(5)).
            _CLEAR_REFS.write_text("5")
            self.since_start = False
        except OSError:
            self.since_start = True

    def peak_bytes(self) -> int:
        """Bytes of the peak."""
        if self._device.type == "cuda":
            return max(self._before, torch.cuda.max_memory_allocated(self._device))
        peak = _fields(_STATUS).get("VmHWM")
        return _peak_of_the_process() if peak is None else peak

    @contextmanager
    def phase(self) -> Iterator[PhasePeak]:
        """Measure a stretch of the code by itself, within the measurement since the last reset."""
        found = PhasePeak()
        if self._device.type == "cuda":
            self._before = self.peak_bytes()
            torch.cuda.reset_peak_memory_stats(self._device)
            yield found
            found.peak = torch.cuda.max_memory_allocated(self._device)
            return
        if not _STATM.exists():
            yield found
            return
        with _AnonymousSampler() as sampler:
            yield found
        found.peak = sampler.largest


class PhasePeak:
    """What `PeakMemory.phase` found."""

    peak: int | None = None
    """CUDA: bytes allocated by torch. CPU on Linux: anonymous memory, sampled. None before the end and on other
    systems."""


class _AnonymousSampler:
    """A thread that looks at the anonymous memory of this process every `_SAMPLED_EVERY` seconds."""

    def __init__(self) -> None:
        self.largest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _AnonymousSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        file = os.open(_STATM, os.O_RDONLY)
        try:
            while True:
                self.largest = max(self.largest, _resident_less_shared(os.pread(file, 256, 0)))
                if self._done.wait(_SAMPLED_EVERY):
                    break
            self.largest = max(self.largest, _resident_less_shared(os.pread(file, 256, 0)))
        finally:
            os.close(file)


def quick_anonymous_bytes() -> int | None:
    """Resident memory that no file backs, in microseconds where `anonymous_bytes` walks all pages; None where unknown."""
    try:
        return _resident_less_shared(_STATM.read_bytes())
    except OSError:
        return None


def _resident_less_shared(statm: bytes) -> int:
    """Bytes by a line of /proc/PID/statm: pages of the program, resident, backed by files or shared, ..."""
    _, resident, shared, *_ = statm.split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int | None:
    """Bytes that this process holds in memory or swap and no file backs; None where the kernel does not tell.

    `Anonymous - LazyFree + Swap` of /proc/self/smaps_rollup. Resident memory would count clean pages of memory-mapped
    weights, which are shared and cost nothing to give up; their pages become anonymous when written to. `Anonymous` is
    taken rather than `Private_Dirty`, because the latter loses every page that a forked child still shares and every
    page that is clean again after a swap-in, though both are still paid for. Pages given back but not collected yet
    (`LazyFree`) do not count; shared memory does not either.
    """
    fields = _fields(_SMAPS_ROLLUP)
    if "Anonymous" not in fields:
        return None
    return fields["Anonymous"] - fields.get("LazyFree", 0) + fields.get("Swap", 0)


def _fields(path: Path) -> dict[str, int]:
    """The `Name:  123 kB` lines of a /proc file in bytes; none if the system has no such file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)}


def _peak_of_the_process() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux and the BSDs count KiB.
    return peak if sys.platform == "darwin" else peak * 1024
