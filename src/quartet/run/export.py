"""The result: `policy/` and `value/`, loadable with transformers or PEFT and nothing of Quartet."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from quartet.errors import CheckpointError
from quartet.models.adapters import save_adapter
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import Role
from quartet.models.roles import Roles


def export(roles: Roles, folder: Path, *, sft: CheckpointInfo, reward: CheckpointInfo, tokenizer: Any) -> None:
    """Write `folder/policy` and `folder/value`, each beside and then renamed.

    With LoRA both are PEFT adapter folders over the checkpoint's base (the value head among the adapter's weights);
    otherwise whole models of `AutoModelForCausalLM` and `AutoModelForSequenceClassification`.
    """
    try:
        _export(roles, folder, sft, reward, tokenizer)
    except OSError as error:
        raise CheckpointError(
            f"the result could not be written to {folder} ({error.strerror or error}); free some space and run: "
            f"quartet resume {folder}"
        ) from error


def _export(roles: Roles, folder: Path, sft: CheckpointInfo, reward: CheckpointInfo, tokenizer: Any) -> None:
    critic = sft if roles.value.backbone is roles.policy.backbone and roles.plan.name != "single" else reward
    for role, info in (("policy", sft), ("value", critic)):
        temporary = folder / f".writing-{role}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(roles, role, info, temporary, tokenizer.pad_token_id)
        tokenizer.save_pretrained(temporary)
    for role in ("policy", "value"):  # both are whole before either replaces an older one
        shutil.rmtree(folder / role, ignore_errors=True)
        (folder / f".writing-{role}").replace(folder / role)


def _write(roles: Roles, role: Any, info: CheckpointInfo, folder: Path, pad: int) -> None:
    view = roles.plan.view(role)
    backbone = roles.backbones[view.backbone]
    head = {} if role == "policy" else {roles.value.head.name: roles.value.head.weight.detach()}
    if view.adapter is not None:
        task = "CAUSAL_LM" if role == "policy" else "SEQ_CLS"
        base = str(Path(info.base).resolve()) if Path(info.base).is_dir() else info.base
        save_adapter(backbone.model, view.adapter, folder, base=base, task=task, extra=head)
        return
    model = backbone.model
    state = model.state_dict()
    if role == "value":
        model = _classifier(info)  # no weights of its own: it names the class and its tensors
        prefix = model.base_model_prefix + "."
        state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)} | head
    before = model.config
    model.config = _saved_config(role, info, model, backbone.model.dtype, pad)
    try:
        model.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in state.items()})
    finally:
        model.config = before


def _classifier(info: CheckpointInfo) -> Any:
    config = copy.deepcopy(info.config)
    config.num_labels = 1
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=info.trust_remote_code)


def _saved_config(role: Role, info: CheckpointInfo, model: Any, dtype: torch.dtype, pad: int) -> Any:
    """The checkpoint's own configuration (ours has dropout and cache switched off), of the right class and dtype."""
    config = copy.deepcopy(info.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if role == "value":
        config.num_labels = 1
        if config.pad_token_id is None:
            # A classifier needs one to find the last token of padded batches.
            config.pad_token_id = pad
    return config
