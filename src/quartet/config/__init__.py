"""The configuration: one YAML file, validated once, frozen afterwards."""

from quartet.config.load import load_config, parse_config, read_plain
from quartet.config.ppo import OptimizerConfig, PPOConfig
from quartet.config.rollout import RolloutConfig, VllmConfig
from quartet.config.schema import (
    Config,
    DataConfig,
    DistributedConfig,
    LoraConfig,
    ModelsConfig,
    RewardSourceConfig,
    RunConfig,
)
from quartet.config.values import by_key

__all__ = [
    "Config",
    "DataConfig",
    "DistributedConfig",
    "LoraConfig",
    "ModelsConfig",
    "OptimizerConfig",
    "PPOConfig",
    "RewardSourceConfig",
    "RolloutConfig",
    "RunConfig",
    "VllmConfig",
    "by_key",
    "load_config",
    "parse_config",
    "read_plain",
]
