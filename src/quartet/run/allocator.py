"""What becomes of host memory that tensors give back: kept by the C library for the next ones, or returned to the system."""

from __future__ import annotations

import ctypes
import platform
from typing import Literal

_M_MMAP_THRESHOLD = -3
"""mallopt(3)."""
RETURNED_FROM = 65_536
"""Bytes from which a block is returned as soon as it is freed, where memory is tight."""
LARGE = 2 * 2**20
"""The same where tensors come and go: a block of a huge page or more is mapped and returned with few page faults."""


def return_freed_memory(wanted: bool | Literal["auto"], *, tight: bool, fleeting: bool) -> int | None:
    """Make the C library return the memory of freed tensors to the system at once, for the rest of the process.

    By default glibc cuts new blocks out of freed ones and keeps what is left over. Tensors of many sizes leave gaps that
    nothing fills, which can double what a process holds. Returned memory has to be fetched and cleared again, which
    takes time.

    Args:
        wanted: auto decides by what follows.
        tight: whether memory is scarce: then blocks of all but small tensors are returned.
        fleeting: whether tensors that come and go are most of what the process will hold: then large ones are.

    Returns:
        The bytes from which blocks are returned; None where they are kept, as on systems without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    smallest = None
    if wanted is True or (wanted == "auto" and tight):
        smallest = RETURNED_FROM
    elif wanted == "auto" and fleeting:
        smallest = LARGE
    # A threshold that is set no longer grows by itself, which it does up to 32 MiB.
    return smallest if smallest and ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, smallest) else None


def return_gaps() -> None:
    """Make the C library return what it keeps of freed tensors now; it goes on keeping what is freed later.

    An update leaves gaps as large as its activations, which the tensors of rollout and scoring, of other sizes, fill badly.
    Returning and fetching again half a gigabyte takes a few tenths of a second of one core.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
