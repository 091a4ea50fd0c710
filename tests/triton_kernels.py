"""Where Triton's kernels run in tests: on a GPU, or in its interpreter, which has to be asked for before Triton is imported.

Run them without a GPU by `TRITON_INTERPRET=1 python -m pytest ...` where Triton is installed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or DEVICE == "cuda"), reason="needs a GPU, or Triton and TRITON_INTERPRET=1"
)


def _mend_interpreter() -> None:
    """Let Triton 3.6's interpreter round to bfloat16 as a GPU does, where it cuts off, and read numbers from arrays of one
    element as NumPy 2.4 wants it."""
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float
    patch: Any = interpreter._patch_lang_tensor

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.tensor(data, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view("uint16")

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float, interpreter._patch_lang_tensor = rounded, patched


if INTERPRETED:
    _mend_interpreter()
