"""Where tests of kernels for GPUs run: on a GPU, or on a CPU by Triton's interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mend_the_interpreter() -> None:
    """numpy from 2.4 on makes no number of an array of one number, which Triton 3.6's interpreter asks of it for a loop's
    bounds. And its products take the bits of bfloat16 for whole numbers, and its bfloat16 is cut off, where GPUs round."""
    import triton.language as tl
    from triton.runtime import interpreter

    whole: Any = interpreter
    builder = whole.InterpreterBuilder
    patch, dot, cast = whole._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def with_numbers(tensor: Any, scope: Any) -> Any:
        result = patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        return result

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return whole.TensorHandle(bits.view("float32"), tl.float32)

    def with_bfloat16(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return dot(self, widened(left), widened(right), *others)

    def rounding(self: Any, given: Any, kind: Any) -> Any:
        if (given.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, given, kind)
        bits = given.data.view("uint32")
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return whole.TensorHandle(bits.astype("uint16"), tl.bfloat16)

    whole._patch_lang_tensor, builder.create_dot, builder.cast_impl = with_numbers, with_bfloat16, rounding


_mend_the_interpreter()
