"""Which engine generates."""

from __future__ import annotations

from quartet.models.roles import LanguageView
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.engine import RolloutEngine, SamplingSettings


def make_engine(name: str, policy: LanguageView, settings: SamplingSettings) -> RolloutEngine:
    """The engine of `rollout.engine`."""
    return DynamicEngine(policy, settings)
