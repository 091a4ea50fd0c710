"""Quartet: PPO-based RLHF for language models, the four models of PPO in the memory of one."""

__version__ = "0.1.0"
