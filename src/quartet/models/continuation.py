"""Trained adapters that go on from a checkpoint's adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from quartet.config import LoraConfig
from quartet.errors import CheckpointError, ConfigError
from quartet.models.adapters import attach_checkpoint, attach_fresh, detach, lora_layers
from quartet.models.checkpoint_info import PEFT_PREFIX, CheckpointInfo


def attach_continuation(model: nn.Module, name: str, lora: LoraConfig, info: CheckpointInfo, *, seed: int) -> None:
    """Inject a trainable adapter that computes exactly what the checkpoint's adapter computes.

    The new adapter has the configured rank r >= the checkpoint's rank r': its first r' rows of A and columns of B are the
    checkpoint's (B scaled by the ratio of the two alpha / r), the remaining columns of B are zero.

    Raises:
        ConfigError: the configured adapter is too small for the checkpoint's, in rank or in modules.
        CheckpointError: the adapter is of a kind that cannot be continued so (DoRA, biases).
    """
    content = info.adapter_config
    if content.get("use_dora") or content.get("lora_bias") or content.get("bias", "none") != "none":
        raise CheckpointError(
            f"{info.key}={info.adapter!r} uses DoRA or trained biases, which cannot be continued; merge it into its base"
        )
    attach_fresh(model, name, lora, seed=seed)
    temporary = f"{name}_start"
    attach_checkpoint(model, temporary, info)
    try:
        for path, layer in lora_layers(model):
            if temporary in layer.lora_A:
                _embed(path, layer, name, temporary, info)
    finally:
        detach(model, temporary)


def refuse_adapted_embeddings(*infos: CheckpointInfo) -> None:
    """Check that the checkpoints' adapters can be continued.

    Raises:
        CheckpointError: one adapts an embedding.
    """
    for info in infos:
        found = [name.partition(".lora_embedding_")[0] for name in info.adapter_tensors if ".lora_embedding_" in name]
        if found:
            raise CheckpointError(
                f"{info.key}={info.adapter!r} adapts the embedding {found[0].removeprefix(PEFT_PREFIX)}, which cannot be "
                "continued; merge it into its base"
            )


def _embed(path: str, layer: LoraLayer, name: str, start: str, info: CheckpointInfo) -> None:
    if name not in layer.lora_A:
        raise ConfigError(
            f"models.lora.target_modules leaves out {path}, which the adapter {info.key}={info.adapter!r} adapts and "
            "training starts from; use all-linear or add it"
        )
    parts: Any = layer  # torch types a ModuleDict's entries too vaguely to compute with
    old_rank, new_rank = layer.r[start], layer.r[name]
    refuse_smaller_rank(info, old_rank, new_rank)
    with torch.no_grad():
        parts.lora_A[name].weight[:old_rank] = parts.lora_A[start].weight
        parts.lora_B[name].weight.zero_()
        scale = parts.scaling[start] / parts.scaling[name]
        parts.lora_B[name].weight[:, :old_rank] = parts.lora_B[start].weight * scale


def refuse_smaller_rank(info: CheckpointInfo, old: int, new: int) -> None:
    """A trained adapter has room for the one that it starts from.

    Raises:
        ConfigError: its rank is smaller.
    """
    if old > new:
        raise ConfigError(
            f"models.lora.r={new} is smaller than rank {old} of the adapter {info.key}={info.adapter!r} that training starts "
            f"from; set models.lora.r={old} or more"
        )
