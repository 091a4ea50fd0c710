"""What `auto` means for device and dtype, and what a GPU does without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quartet.models.precision import resolve_device


@pytest.fixture(autouse=True)
def _cudnn_as_before() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_attention_on_a_gpu_does_without_cudnn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(name).type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_on_a_cpu_the_kernels_stay_as_they_are() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert torch.backends.cuda.cudnn_sdp_enabled()
