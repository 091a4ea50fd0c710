"""LoRA adapters as PEFT's files have them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quartet.models.adapters import adapter_parameters
from quartet.models.checkpoint_info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX


def adapter_state(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Weights of one adapter under PEFT's names (`base_model.model.….lora_A.weight`)."""
    return {
        PEFT_PREFIX + re.sub(rf"(\.lora_\w+)\.{re.escape(name)}(\.|$)", r"\1\2", key): parameter
        for key, parameter in adapter_parameters(model, name)
    }


def save_adapter(
    model: nn.Module,
    name: str,
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    base: str,
    task: str,
    heads: Sequence[str] = (),
) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` loads.

    Args:
        tensors: whole weights under PEFT's names, those of the heads among them.
        base: what goes into `base_model_name_or_path`.
        task: CAUSAL_LM or SEQ_CLS.
        heads: tensors of modules saved whole (the value head), by their name in the base model.
    """
    from safetensors.torch import save_file

    configs: Any = model.peft_config
    content: dict[str, Any] = configs[name].to_dict()
    content.update(
        base_model_name_or_path=base,
        task_type=task,
        inference_mode=True,
        modules_to_save=sorted({key.rpartition(".")[0] for key in heads}) or None,
    )
    for key in ("target_modules", "exclude_modules"):
        if isinstance(content.get(key), set):
            content[key] = sorted(content[key])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", "utf-8")
