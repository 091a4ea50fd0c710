"""Which errors mean that memory ran out."""

from __future__ import annotations

import pytest
import torch

from quartet.stages.out_of_memory import is_out_of_memory

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
DRIVER = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (torch.AcceleratorError(DRIVER), True),
        (RuntimeError(DRIVER), True),
        (RuntimeError(CUBLAS), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_errors_that_mean_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
