"""Sizes of a backbone's weights, from its configuration and its safetensors headers; no weight is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from quartet.errors import CheckpointError
from quartet.memory.trace import NotTraceable
from quartet.models.branch import freeze_trunk
from quartet.models.cache import FLOATS, NAMES
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.loading import without_dropout
from quartet.models.plan import Task


@dataclass(frozen=True)
class BackboneShape:
    """What is in a backbone, adapters and scalar heads aside."""

    tensors: dict[str, tuple[int, ...]]
    """Shapes of the distinct parameters by name."""
    head: frozenset[str]
    """Which of them are the LM head's own; empty where it is tied to the embeddings."""
    linear: dict[str, int]
    """Which of them quantization replaces, weights of linear layers within the transformer, and how many inputs they have."""
    trained: frozenset[str]
    """Which of them full fine-tuning trains: all, or those above the frozen layers."""
    buffer_bytes: int
    prefix: str
    """Of the transformer's parameters, with a dot."""
    layers: int
    hidden: int
    largest_layer: int
    """Parameters of the largest decoder layer."""
    largest_in_layer: int
    """Elements of the largest parameter in a decoder layer."""
    outside: int
    """Parameters outside of the decoder layers."""
    period: int
    """The layers repeat after this many; `layers` where they do not repeat."""

    @property
    def parameters(self) -> int:
        """Number of distinct parameters, LM head included."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def count(self, names: Iterable[str]) -> int:
        """Elements of some of the parameters."""
        return sum(math.prod(self.tensors[name]) for name in names)

    def in_file(self, info: CheckpointInfo, dtype: torch.dtype | None) -> set[str]:
        """Parameters whose tensor in the file has this shape and dtype (None: any float): loading on a CPU maps these
        and copies nothing."""
        found = set()
        for name, shape in self.tensors.items():
            bare = name.removeprefix(self.prefix)
            stored = next((info.tensors[n] for n in (name, bare, self.prefix + bare) if n in info.tensors), None)
            if (
                stored is not None
                and stored.shape == shape
                and (stored.dtype in FLOATS if dtype is None else stored.dtype == NAMES[dtype])
            ):
                found.add(name)
        return found


def empty_model(
    info: CheckpointInfo, task: Task, *, depth: int | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The checkpoint's model as loading makes it, without the classifier's head, on the current default device.

    Args:
        depth: number of decoder layers; None for all.

    Raises:
        CheckpointError: transformers has no such class for this family.
    """
    config = truncated(without_dropout(info.config), depth)
    config.use_cache = False
    loader: Any = AutoModelForCausalLM
    if task == "classifier":
        loader, config.num_labels = AutoModelForSequenceClassification, 1
    try:
        model = loader.from_config(config, dtype=dtype, trust_remote_code=info.trust_remote_code)
    except ValueError as error:
        raise CheckpointError(
            f"{info.key}={info.name!r} is a {type(info.config).__name__}, for which transformers has no {loader.__name__}; "
            "use a checkpoint of a family that has one"
        ) from error
    if task == "classifier":
        for name in [n for n, _ in model.named_children() if n != model.base_model_prefix]:
            delattr(model, name)
    result: PreTrainedModel = model
    return result


def shape_of(info: CheckpointInfo, task: Task, frozen_layers: int = 0) -> BackboneShape:
    """Build the model on the meta device, at full depth, and count.

    Args:
        frozen_layers: layers at the bottom that full fine-tuning leaves out.

    Raises:
        CheckpointError: as `empty_model`.
        ConfigError: too many frozen layers.
    """
    with torch.device("meta"):
        model = empty_model(info, task)
    if frozen_layers:
        freeze_trunk(model, frozen_layers, torch.float32)
    prefix = model.base_model_prefix + "."
    tensors = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layers = decoder_layers(model)
    modules = dict(model.named_modules())
    linear = {
        name: shape[0] if type(modules[name.removesuffix(".weight")]).__name__ == "Conv1D" else shape[-1]
        for name, shape in tensors.items()
        if name.startswith(prefix)
        and name.endswith(".weight")
        and type(modules[name.removesuffix(".weight")]).__name__ in ("Linear", "Conv1D")
    }
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    return BackboneShape(
        tensors=tensors,
        head=frozenset(name for name in tensors if not name.startswith(prefix)),
        linear=linear,
        trained=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        prefix=prefix,
        layers=len(layers),
        hidden=hidden_size(info),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        largest_in_layer=max(p.numel() for layer in layers for p in layer.parameters()),
        outside=sum(p.numel() for p in model.parameters() if id(p) not in in_layers),
        period=_period(layers, info.config),
    )


def hidden_size(info: CheckpointInfo) -> int:
    """Features of the last hidden states, which OPT projects."""
    config = info.config.get_text_config()
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: the largest module list of the transformer."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise NotTraceable(f"{type(model).__name__} has no list of layers, so its memory cannot be planned")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def truncated(config: PretrainedConfig, depth: int | None) -> PretrainedConfig:
    """A copy with that many decoder layers; lists with an entry a layer are cut alike."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    full = text.num_hidden_layers
    if depth is None or depth == full:
        return config
    for name, given in list(vars(text).items()):
        if isinstance(given, list) and len(given) == full:
            setattr(text, name, given[:depth])
    text.num_hidden_layers = depth
    return config


def _period(layers: nn.ModuleList, config: PretrainedConfig) -> int:
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""] * len(layers)
    signs = [
        (kind, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(kinds, layers, strict=True)
    ]
    for period in range(1, len(signs)):
        if all(one == other for one, other in zip(signs, signs[period:], strict=False)):
            return period
    return len(signs)
