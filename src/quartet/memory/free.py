"""How much memory a process can still take."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Control groups of version 1 write a number near 2**63 for no limit."""


def free_memory(device: torch.device, processes_here: int = 1) -> int | None:
    """Bytes free on the GPU, or in host memory within the limits of the process's control groups.

    Args:
        processes_here: processes of the run on this machine, each of which gets its share of the host's memory.

    On a GPU, what torch holds unused counts as free. In a control group, so do pages of files, which the kernel drops
    when memory is asked for.

    Returns:
        None where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(_MEMINFO), flags=re.MULTILINE)
    known = [] if found is None else [int(found[1]) * 1024]
    left = min(known + _left_in_groups(), default=None)
    return None if left is None else left // processes_here


def _left_in_groups() -> list[int]:
    """Bytes left below the limit of the process's control group and of those around it."""
    left = []
    for line in _text(_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _MOUNT / "memory" if controllers else _MOUNT
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = root / path.strip("/")
        # A container's own group is often mounted at the root, with the path as seen from outside.
        for folder in (place, *(parent for parent in place.parents if parent.is_relative_to(root))):
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                left.append(max(0, int(limit) - int(used) + _file_pages(folder)))
    return left


def _file_pages(folder: Path) -> int:
    """Bytes of file pages that count as used in a group."""
    found = re.findall(r"^(?:active_file|inactive_file) (\d+)$", _text(folder / "memory.stat"), flags=re.MULTILINE)
    return sum(map(int, found))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
