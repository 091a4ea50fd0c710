"""Cutting a transformer after its first k layers: the bottom (trunk) runs once, the top runs on the trunk's states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quartet.errors import ConfigError


class _Skip(nn.Module):
    """Stands in a layer's place and hands on what it gets; other attributes are the layer's own."""

    def __init__(self, layer: nn.Module, form: list[bool]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: its weights belong to the real list
        self._form = form

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return self._shaped(hidden_states)

    def _shaped(self, hidden_states: Tensor) -> Any:
        """As the family's layers return it: a tensor, or a tuple that starts with it."""
        return (hidden_states,) if self._form and self._form[-1] else hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)


class _Inject(_Skip):
    """Hands on the trunk's states instead of what it gets."""

    def __init__(self, layer: nn.Module, form: list[bool]) -> None:
        super().__init__(layer, form)
        self.states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        assert self.states is not None
        return self._shaped(self.states)


class Branch:
    """Runs one transformer's bottom or top alone.

    The layers keep their places (those left out are replaced by pass-throughs), so that what a family decides by a layer's
    number stays right. The embeddings run in both halves; they cost next to nothing and spare knowing a family's
    treatment of positions and scales.
    """

    def __init__(self, transformer: nn.Module, layers: int, form: list[bool] | None = None) -> None:
        """
        Args:
            layers: of the bottom.
            form: of another branch of the same family, which it shares from then on.
        """
        self._transformer = transformer
        self._name, whole = layer_list(transformer)
        self._whole = whole
        form = [] if form is None else form
        skips = [_Skip(layer, form) for layer in whole]
        self._inject = _Inject(whole[layers - 1], form)
        self._bottom = nn.ModuleList([*whole[:layers], *skips[layers:]])
        self._top = nn.ModuleList([*skips[: layers - 1], self._inject, *whole[layers:]])
        self._seam = whole[layers - 1]
        self.form = form
        """Whether the family's layers return tuples: learned when the bottom runs, which it does before any top."""

    def bottom(self, **arguments: Any) -> Tensor:
        """States `[n, L, H]` after the trunk's last layer."""
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.form[:] = [isinstance(output, tuple)]
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self._seam.register_forward_hook(keep)
        try:
            with self._layers(self._bottom):
                self._transformer(**arguments)
        finally:
            handle.remove()
        return found[0]

    def top(self, states: Tensor, **arguments: Any) -> Any:
        """The transformer's output from the trunk's states `[n, L, H]`."""
        self._inject.states = states
        try:
            with self._layers(self._top):
                return self._transformer(**arguments)
        finally:
            self._inject.states = None

    @contextmanager
    def _layers(self, layers: nn.ModuleList) -> Iterator[None]:
        self._transformer._modules[self._name] = layers
        try:
            yield
        finally:
            self._transformer._modules[self._name] = self._whole


def layer_list(transformer: nn.Module, option: str = "models.freeze_layers") -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its attribute's name.

    Args:
        option: what needs it, for the message.

    Raises:
        ConfigError: the family keeps its layers elsewhere.
    """
    depth = getattr(getattr(transformer, "config", None), "num_hidden_layers", None)
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name, child
    raise ConfigError(
        f"{option} cannot be used with {type(transformer).__name__}: it holds no list of its {depth} layers; leave it out"
    )


def freeze_trunk(model: PreTrainedModel, layers: int, dtype: torch.dtype) -> None:
    """Freeze embeddings and the first layers, and hold them in the computation dtype.

    A language model whose LM head is tied to the embeddings keeps both frozen: the reference shares them and must not
    move. An untied head belongs to the top and is trained.

    Raises:
        ConfigError: more layers than the model has, or none left to train.
    """
    transformer: Any = model.base_model
    name, whole = layer_list(transformer)
    if layers >= len(whole):
        raise ConfigError(
            f"models.freeze_layers={layers} leaves nothing to train: {type(model).__name__} has {len(whole)} layers; "
            f"use at most {len(whole) - 1}"
        )
    for child_name, child in transformer.named_children():
        if child_name == name:
            break
        _freeze(child, dtype)
    for layer in whole[:layers]:
        _freeze(layer, dtype)


def copy_top(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy that shares every frozen parameter and owns copies of the trained ones."""
    shared = [*(parameter for parameter in model.parameters() if not parameter.requires_grad), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    twin = copy.deepcopy(model, memo)
    return twin.requires_grad_(False)


def _freeze(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
