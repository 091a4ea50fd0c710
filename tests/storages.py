"""How much memory tensors take, by their storages."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def count_bytes(modules: Iterator[nn.Module] | list[nn.Module]) -> int:
    """Bytes of all distinct storages of parameters and buffers."""
    seen: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
