"""For tests of decoder layers in one pass."""

from __future__ import annotations

from typing import Any

import pytest

from quartet.models import decoder_layer


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each layer, whether it was computed in one pass."""
    found: list[bool] = []
    taken_apart = decoder_layer._taken_apart

    def noted(*given: Any, **more: Any) -> Any:
        result = taken_apart(*given, **more)
        found.append(result is not None)
        return result

    monkeypatch.setattr(decoder_layer, "_taken_apart", noted)
    return found
