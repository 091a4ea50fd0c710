"""Rewards beside the reward model's: Python functions and HTTP endpoints, summed with weights."""

from quartet.rewards.function import FunctionReward, RewardFunction
from quartet.rewards.http import HttpReward
from quartet.rewards.sources import RewardSource, build_sources, combine

__all__ = ["FunctionReward", "HttpReward", "RewardFunction", "RewardSource", "build_sources", "combine"]
