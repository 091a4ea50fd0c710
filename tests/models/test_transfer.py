"""Copies from the host: by way of page-locked memory to a GPU, and nothing but a copy elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quartet.models.transfer import to_device


class Host:
    """A tensor that says what was done with it."""

    def __init__(self, done: tuple[Any, ...] = ()) -> None:
        self.done = done

    def pin_memory(self) -> Host:
        return Host((*self.done, "pinned"))

    def to(self, device: torch.device, *, non_blocking: bool) -> Host:
        assert non_blocking
        return Host((*self.done, device.type))


@pytest.mark.parametrize(("device", "done"), [("cuda", ("pinned", "cuda")), ("cpu", ("cpu",))])
def test_only_copies_to_a_gpu_are_pinned_first(device: str, done: tuple[str, ...]) -> None:
    host: Any = Host()
    assert to_device(host, torch.device(device)).done == done  # type: ignore[attr-defined]
