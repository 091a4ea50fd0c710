"""What the server that forks test processes imports once."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import peft
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama

import pipeline
import processes
import quartet.rollout.static
import quartet.trainer

__all__ = ["deepspeed", "peft", "pipeline", "processes", "quartet", "torch", "transformers"]
