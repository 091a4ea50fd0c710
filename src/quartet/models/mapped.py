"""Frozen weights mapped from files, whose pages leave memory while no role needs them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import UntypedStorage
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quartet.models.backbone import Backbone
from quartet.models.plan import Role, SharingPlan
from quartet.models.residency import Residency

PAGEMAP = "/proc/self/pagemap"
"""A number of 64 bits for each page of the address space (Linux, Documentation/admin-guide/mm/pagemap.rst)."""
_OF_A_FILE, _SWAPPED, _PRESENT = 61, 62, 63
"""Its bits. A page of a private mapping that was written to is no longer one of the file's."""


class Mapped(Residency):
    """Drops the pages of mapped weights that the roles which are about to run do not need.

    The system's file cache keeps them, so that the next pass finds them without reading the disk; they only cease to be this
    process's memory. Storages with a trained weight, or that another backbone uses, stay, and so does all that is not
    mapped from a file or has been written to.
    """

    def __init__(self, plan: SharingPlan, backbones: Mapping[str, Backbone]) -> None:
        self._plan = plan
        self._backbones = backbones
        self._inside = set(backbones)

    def use(self, *roles: Role) -> None:
        """Drop what these roles do not need. What they need comes when it is read."""
        needed = {self._plan.view(role).backbone for role in roles}
        left, self._inside = self._inside - needed, needed
        for storage in self._frozen_storages(left):
            _drop_pages(storage)

    def _frozen_storages(self, names: Set[str]) -> list[UntypedStorage]:
        """Storages of nothing but frozen weights of these backbones, in host memory."""
        found: dict[int, UntypedStorage] = {}
        others: set[int] = set()
        for name, backbone in self._backbones.items():
            parameters: list[Any] = list(backbone.model.parameters())
            for parameter in parameters:
                if is_traceable_wrapper_subclass(parameter):  # quantized or cut: not what lies in a file
                    continue
                storage = parameter.untyped_storage()
                if name in names and not parameter.requires_grad and parameter.device.type == "cpu":
                    found[storage.data_ptr()] = storage
                else:
                    others.add(storage.data_ptr())
        return [storage for address, storage in found.items() if address not in others]


def can_drop_pages() -> bool:
    """Whether this system tells which pages are a file's, and drops them when asked."""
    return os.access(PAGEMAP, os.R_OK) and hasattr(mmap, "MADV_DONTNEED")


def _drop_pages(storage: UntypedStorage) -> None:
    """Drop the whole pages of a storage if each is one of a file, unchanged, or not in memory."""
    page, start = mmap.PAGESIZE, storage.data_ptr()
    first, end = -(-start // page), (start + storage.nbytes()) // page
    if first < end and _are_of_a_file(first, end - first):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * page), ctypes.c_size_t((end - first) * page), mmap.MADV_DONTNEED
        )


def _are_of_a_file(first: int, count: int) -> bool:
    try:
        with open(PAGEMAP, "rb", buffering=0) as file:
            file.seek(first * 8)
            entries = torch.frombuffer(bytearray(file.read(count * 8)), dtype=torch.int64)
    except OSError:
        return False
    held = (entries >> _PRESENT | entries >> _SWAPPED) & 1
    return len(entries) == count and bool((held <= (entries >> _OF_A_FILE & 1)).all())
