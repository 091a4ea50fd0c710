"""The result: `policy/` and `value/`, loadable with transformers or PEFT and nothing of Quartet."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from quartet.distributed import ProcessEngine, SingleProcess
from quartet.errors import CheckpointError, brief, cause_of
from quartet.models.adapter_files import adapter_state, save_adapter
from quartet.models.checkpoint_info import PEFT_PREFIX, CheckpointInfo
from quartet.models.plan import Role
from quartet.models.roles import Roles
from quartet.run.trust import resume_command


def export(
    roles: Roles,
    folder: Path,
    *,
    sft: CheckpointInfo,
    reward: CheckpointInfo,
    tokenizer: Any,
    engine: ProcessEngine | None = None,
    remedy: str | None = None,
) -> None:
    """Write `folder/policy` and `folder/value`, each beside and then renamed; every process calls this, the main one writes.

    With LoRA both are PEFT adapter folders over the checkpoint's base (the value head among the adapter's weights);
    otherwise whole models of `AutoModelForCausalLM` and `AutoModelForSequenceClassification`.

    Args:
        remedy: what to do about a full disk; None where `folder` is the run's own.

    Raises:
        CheckpointError: the disk is full or not writable; nothing half written is left.
    """
    remedy = remedy or (
        f"free some space, then `{resume_command(folder)}` ends with it after training, and `quartet export` begins anew"
    )
    engine = engine or SingleProcess()
    critic = sft if roles.value.backbone is roles.policy.backbone and roles.plan.name != "single" else reward
    for role, info in (("policy", sft), ("value", critic)):
        state = _state(roles, role, engine)
        _by_main(engine, folder, remedy, partial(_write, roles, role, info, folder, state, tokenizer))
    _by_main(engine, folder, remedy, partial(_rename, folder))


def _by_main(engine: ProcessEngine, folder: Path, remedy: str, act: Callable[[], None]) -> None:
    def checked() -> None:
        if engine.rank:
            return
        try:
            act()
        except (OSError, SafetensorError) as error:
            for role in ("policy", "value"):
                shutil.rmtree(folder / f".writing-{role}", ignore_errors=True)
            raise CheckpointError(
                f"the result could not be written to {folder} ({cause_of(error)}); {remedy}"
            ) from error

    engine.agree(checked)


def _rename(folder: Path) -> None:
    """Both are whole before either replaces an older one."""
    for role in ("policy", "value"):
        shutil.rmtree(folder / role, ignore_errors=True)
        (folder / f".writing-{role}").replace(folder / role)


def _state(roles: Roles, role: Any, engine: ProcessEngine) -> dict[str, Tensor]:
    """Whole weights of a role on the host, by name; those that are one tensor under two names stay one. Empty in all
    processes but the main one."""
    view = roles.plan.view(role)
    model = roles.backbones[view.backbone].model
    if view.adapter is None:
        own: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    else:
        own = adapter_state(model, view.adapter)
    if role == "value":
        prefix = model.base_model_prefix + "."
        own = own if view.adapter is not None else {k: tensor for k, tensor in own.items() if k.startswith(prefix)}
        own = {**own, (PEFT_PREFIX if view.adapter else "") + roles.value.head.name: roles.value.head.weight}
    whole = {id(tensor): engine.whole(tensor) for tensor in own.values()}
    found = {name: whole[id(tensor)] for name, tensor in own.items()}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def _write(
    roles: Roles, role: Any, info: CheckpointInfo, folder: Path, state: dict[str, Tensor], tokenizer: Any
) -> None:
    view, temporary = roles.plan.view(role), folder / f".writing-{role}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model: Any = roles.backbones[view.backbone].model
    if view.adapter is not None:
        task = "CAUSAL_LM" if role == "policy" else "SEQ_CLS"
        origin = info.origin or info.base
        base = str(Path(origin).resolve()) if Path(origin).is_dir() else origin
        heads = [roles.value.head.name] if role == "value" else []
        save_adapter(model, view.adapter, temporary, state, base=base, task=task, heads=heads)
    else:
        # The widest: what was trained above frozen layers in bfloat16 is float32.
        dtype = reduce(torch.promote_types, (t.dtype for t in state.values() if t.is_floating_point()))
        if role == "value":
            model = _classifier(info)  # no weights of its own: it names the class and its tensors
        before = model.config
        model.config = _saved_config(role, info, model, dtype, tokenizer.pad_token_id)
        try:
            model.save_pretrained(temporary, state_dict=state)
            model.config.dtype = dtype  # where transformers has put that of the model's first weight
            model.config.save_pretrained(temporary)
        finally:
            model.config = before
    try:
        tokenizer.save_pretrained(temporary)
    except Exception as error:  # tokenizers raises Exception itself where the disk is full
        raise OSError(brief(error)) from error


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
