"""What becomes of host memory that tensors give back: kept by the C library for the next ones, or returned to the system."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Literal

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""mallopt(3)."""
LARGEST = 32 * 2**20
"""The most that glibc lets the bytes be set to from which a block is mapped by itself."""
NEVER = -1
"""In place of the free bytes at the end of the heap from which they are returned unasked."""
RETURNED_FROM = 65_536
"""Bytes from which a block is returned as soon as it is freed, where memory is tight."""
LARGE = 4 * 2**20
"""The same where tensors come and go: what is larger than the states of a microbatch, usually."""


def one_heap() -> None:
    """Have glibc make no further heaps: threads that start from now on take turns at those that are there, of which there is
    one as long as no thread has made another. Whoever said how many there may be in the environment is not overruled.

    With a heap for each thread, what one has freed is lost to the others, and a heap may go back to the system when all in it
    is free: a thread that comes and goes with each update, as that of a model whose passes run beside another's, then fetches
    and clears its memory each time.
    """
    asked = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not asked and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_freed_memory(wanted: bool | Literal["auto"], *, tight: bool, fleeting: bool) -> int | None:
    """Make the C library return the memory of freed tensors to the system at once, for the rest of the process.

    By default glibc cuts new blocks out of freed ones and keeps what is left over, but for what lies at the end of its heap.
    Tensors of many sizes leave gaps that nothing fills, which can double what a process holds. Returned memory has to be
    fetched and cleared again, which takes time: where blocks are kept, those at the end are kept too.

    Args:
        wanted: auto decides by what follows.
        tight: whether memory is scarce: then blocks of all but small tensors are returned.
        fleeting: whether tensors that come and go are most of what the process will hold: then large ones are.

    Returns:
        The bytes from which blocks are returned; None where they are kept (but for those of 32 MiB or more), as on systems
        without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    smallest = None
    if wanted is True or (wanted == "auto" and tight):
        smallest = RETURNED_FROM
    elif wanted == "auto" and fleeting:
        smallest = LARGE
    library = ctypes.CDLL(None)
    # A threshold that is set no longer moves by itself, neither of the two.
    if smallest != RETURNED_FROM:
        library.mallopt(_M_TRIM_THRESHOLD, NEVER)
    done = library.mallopt(_M_MMAP_THRESHOLD, smallest or LARGEST)
    return smallest if done else None


def return_gaps() -> None:
    """Make the C library return what it keeps of freed tensors now; it goes on keeping what is freed later.

    An update leaves gaps as large as its activations, which the tensors of rollout and scoring, of other sizes, fill badly.
    Returning and fetching again half a gigabyte takes a few tenths of a second of one core.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
