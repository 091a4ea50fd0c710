"""What would make the host wait for a GPU, seen on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
"""Operations whose result, or its shape, the host has to wait for."""


class Questions(TorchDispatchMode):
    """Notes every operation that would make the host wait, with the place that calls it."""

    def __init__(self, *, lists: bool = False) -> None:
        """With `lists`, tensors that are read as lists are noted too."""
        super().__init__()
        self.seen: list[str] = []
        self._patch = pytest.MonkeyPatch()
        self._lists = lists

    def __enter__(self) -> Questions:
        if self._lists:
            self._patch.setattr(torch.Tensor, "tolist", self._noted(torch.Tensor.tolist))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._patch.undo()
        super().__exit__(*raised)

    def _noted(self, read: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def noting(tensor: torch.Tensor) -> Any:
            self.seen.append(f"tolist in {''.join(traceback.format_stack()[-4:-1])}")
            return read(tensor)

        return noting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name() == "aten::index.Tensor" else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or func.name().partition(".")[0] in ASKING:
            self.seen.append(f"{func.name()} in {''.join(traceback.format_stack()[-8:-1])}")
        return func(*args, **(kwargs or {}))
