"""Small tensors from the host to where the models are."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory on the device, for which the host does not wait.

    To a GPU it goes by way of page-locked memory: out of other memory a copy may hold up the host until the GPU gets to it.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
