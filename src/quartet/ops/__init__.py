"""Pure functions over tensors: the arithmetic of PPO for language models, without models, devices or configuration."""
