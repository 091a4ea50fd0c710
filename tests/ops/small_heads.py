"""Small language-model heads for the tests of chunked log-probabilities."""

from __future__ import annotations

import torch
from torch import nn

N, H, V = 11, 6, 23


class Capped(nn.Module):
    """A head with the soft cap of Gemma 2: `cap * tanh(logits / cap)`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(H, V, bias=False, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2.0 * torch.tanh(self.linear(hidden) / 2.0)


def make(kind="plain", dtype=torch.float32, trainable=False):
    torch.manual_seed(0)
    head = Capped(dtype) if kind == "capped" else nn.Linear(H, V, dtype=dtype)
    head.requires_grad_(trainable)
    hidden = (2 * torch.randn(N, H, dtype=dtype)).requires_grad_()
    return head, hidden, torch.randint(V, (N,)), torch.randn(N, dtype=dtype), torch.randn(N, dtype=dtype)
