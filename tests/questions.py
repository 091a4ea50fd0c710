"""What would make the host wait for a GPU, seen on a CPU."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
"""Operations whose result, or its shape, the host has to wait for."""


class Questions(TorchDispatchMode):
    """Notes every operation that would make the host wait, with the place that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name() == "aten::index.Tensor" else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or func.name().partition(".")[0] in ASKING:
            self.seen.append(f"{func.name()} in {''.join(traceback.format_stack()[-8:-1])}")
        return func(*args, **(kwargs or {}))
