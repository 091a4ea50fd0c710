"""Generation engines behind one small interface."""

from quartet.rollout.engine import RolloutEngine, SamplingSettings

__all__ = ["RolloutEngine", "SamplingSettings"]
