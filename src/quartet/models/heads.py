"""Heads: what turns hidden states into logits (the model's own LM head) or a scalar (value and score heads)."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from quartet.errors import CheckpointError
from quartet.models.checkpoint_info import PEFT_PREFIX, CheckpointInfo, TensorInfo, read_tensor
from quartet.models.linears import Weights, weights_of

LINEAR = re.compile(
    r"\n +logits = self\.lm_head\(hidden_states(\[:, slice_indices, :\])?\)(\.contiguous\(\))?\n\s*loss = None\n"
)
"""What the forward of a model says whose logits are those of its LM head."""
CHANGED = re.compile(r"\bhidden_states\b *[-+*/@]?= *(?!=)(?P<by>.*)")
UNCHANGED = re.compile(
    r"\w+(\[0\]|\.last_hidden_state)|hidden_states\[:, slice_indices, :\]|slice_logits_to_keep\(hidden_states, logits_to_keep\)"
)
"""What it may have made of the states before: at most fewer of them."""


@cache
def _is_linear(forward: Callable[..., Any] | None) -> bool:
    """Whether a model's logits are its LM head's output of the transformer's states and nothing else, by its source."""
    try:
        source = inspect.getsource(forward) if forward is not None else ""
    except (OSError, TypeError):
        return False
    found = LINEAR.search(source)
    if found is None:
        return False
    made = [change["by"].split("#")[0].strip() for change in CHANGED.finditer(source[: found.start()])]
    return bool(made) and all(UNCHANGED.fullmatch(one) for one in made)


class _States(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states, and None for whatever else a family's transformer gives (a router's logits)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PassThrough(nn.Module):
    """Stands where the transformer was and hands back the hidden states it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
        return _States(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _PassThrough:
        """Itself, for families whose forward goes around the transformer's outer module (OPT)."""
        return self


class LogitHead:
    """The LM head of any causal language model, with all that its class does to logits (soft-caps, scales).

    It runs the model's own `forward` with the transformer replaced by a pass-through, so no family needs to be known by
    name. Weights are shared with the model, not copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        shell: Any = copy.copy(model)
        shell._modules = dict(model._modules)
        shell._modules[model.base_model_prefix] = _PassThrough()
        self._shell = shell
        self._head = [m for n, m in model.named_children() if n != model.base_model_prefix]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, H]` to logits `[n, vocabulary]`, row by row."""
        # `forward`, not a call: hooks on the model (DeepSpeed's) are not meant for its shell.
        logits: Tensor = self._shell.forward(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0)

    @property
    def linear(self) -> Weights | None:
        """What the logits are computed from where they are one linear layer's output and nothing else; None where the model's
        class does more to them, or something waits for the call."""
        layer = self.layer
        found = None if layer is None else weights_of(layer)
        return None if found is None or found.down is not None else found

    @property
    def layer(self) -> nn.Module | None:
        """The layer whose output the logits are, and nothing else; None where the model's class does more to them."""
        layer: nn.Module | None = self._shell._modules.get("lm_head")
        return layer if _is_linear(getattr(self._shell.forward, "__func__", None)) else None

    @property
    def trainable(self) -> bool:
        """Whether a gradient flows into the head's weights."""
        return any(p.requires_grad for module in self._head for p in module.parameters())


class ScalarHead(nn.Module):
    """One number for each hidden state: `w · h`, without bias, always in float32."""

    def __init__(self, weight: Tensor, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone().reshape(1, -1))
        self.name = name
        """Name of the tensor in a classifier of this family, for saving: `score.weight` nearly everywhere."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., H]` to `[...]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.float() @ self.weight.t()).squeeze(-1)


def head_shapes(config: Any, trust_remote_code: bool) -> tuple[dict[str, torch.Size], str]:
    """Names and shapes of the classifier's head parameters in this family, and the prefix of its transformer.

    Raises:
        CheckpointError: transformers has no sequence classifier for this family.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise CheckpointError(
            f"transformers has no sequence classifier for {type(config).__name__}, so it cannot be a reward model; "
            "use a checkpoint of a family that has one"
        ) from error
    prefix = model.base_model_prefix + "."
    return {name: p.shape for name, p in model.named_parameters() if not name.startswith(prefix)}, prefix


def read_score_head(info: CheckpointInfo) -> ScalarHead:
    """The reward checkpoint's scalar head in float32, from the adapter where it holds one, else from the base.

    Raises:
        CheckpointError: the head is missing, has keys that would be dropped, or does not give exactly one number.
    """
    shapes, prefix = head_shapes(info.config, info.trust_remote_code)
    names = list(shapes)
    if info.adapter is None:
        _refuse_labels(info)
        stored = {n: (n, t) for n, t in info.tensors.items() if not n.startswith(prefix)}
    else:
        cut = {n.removeprefix(PEFT_PREFIX): (n, t) for n, t in info.adapter_tensors.items() if ".lora_" not in n}
        stored = {n: v for n, v in cut.items() if not n.startswith(prefix)}
        if not stored:
            stored = {n: (n, t) for n, t in info.tensors.items() if n in names}
    return _only_head(info, names, stored)


def _refuse_labels(info: CheckpointInfo) -> None:
    labels = getattr(info.config, "num_labels", None)
    if labels != 1 and any(name.startswith(("score", "classifier")) for name in info.tensors):
        raise CheckpointError(
            f"{info.key}={info.name!r} has num_labels={labels}; a reward model needs num_labels=1, one score a sequence"
        )


def _only_head(info: CheckpointInfo, names: list[str], stored: dict[str, tuple[str, TensorInfo]]) -> ScalarHead:
    where = f"{info.key}={info.name!r}"
    missing = [name for name in names if name not in stored]
    extra = sorted(stored.keys() - set(names))
    if missing:
        found = f" (it holds {', '.join(extra[:3])}{' …' if len(extra) > 3 else ''} instead)" if extra else ""
        raise CheckpointError(
            f"{where} has no scalar head: {', '.join(missing)} is missing{found}; "
            "give a checkpoint of AutoModelForSequenceClassification trained with num_labels=1"
        )
    if extra:
        raise CheckpointError(
            f"{where} holds {', '.join(extra)}, which transformers would drop and so change the scores; "
            "remove it or fold it into the head"
        )
    if len(names) != 1:
        raise CheckpointError(
            f"{where} has a head of several layers ({', '.join(names)}); a single linear layer is needed, as "
            "AutoModelForSequenceClassification of a decoder has it"
        )
    key, tensor = stored[names[0]]
    if len(tensor.shape) != 2 or tensor.shape[0] != 1:
        raise CheckpointError(
            f"{where} has num_labels={tensor.shape[0]} (its {names[0]} is {list(tensor.shape)}); a reward model needs "
            "num_labels=1"
        )
    return ScalarHead(read_tensor(tensor, key), names[0])
