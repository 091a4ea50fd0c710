"""Measures the memory of this process: the peak since the last reset, and what it holds now that no file backs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SMAPS_ROLLUP = Path("/proc/self/smaps_rollup")


class PeakMemory:
    """Peak memory of `device` since the last reset.

    CUDA: bytes allocated by torch on that device. CPU on Linux: the peak resident set (VmHWM), file pages such as
    memory-mapped weights included. Where the kernel does not permit resetting it (some containers), and on other
    systems, it is the peak since the process started: `since_start` is then True.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.since_start = self._device.type != "cuda"

    def reset(self) -> None:
        """Start a new measurement, where the system permits it."""
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
            return torch.cuda.max_memory_allocated(self._device)
        peak = _fields(_STATUS).get("VmHWM")
        return _peak_of_the_process() if peak is None else peak


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
