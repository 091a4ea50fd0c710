"""A backbone: one set of transformer weights in memory, with or without LoRA adapters on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quartet.distributed import WeightKeeper, WholeWeights
from quartet.models.adapters import AdapterSwitch
from quartet.models.attention import one_sequence_a_row
from quartet.models.branch import Branch
from quartet.models.plan import BackboneSpec
from quartet.models.precision import autocast
from quartet.records import Sequences


class Backbone(nn.Module):
    """Weights and adapters of one plan entry; roles look at it through views."""

    def __init__(
        self, spec: BackboneSpec, model: PreTrainedModel, *, dtype: torch.dtype, frozen_layers: int = 0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.model = model
        self.dtype = dtype
        """Computation dtype; the weights of a trained backbone stay in float32."""
        self.adapters = AdapterSwitch(model)
        self.weights: WeightKeeper = WholeWeights()
        """Gathers the weights where processes hold shares of them."""
        self._recomputes = False
        layers = spec.frozen_layers or frozen_layers
        self.branch = Branch(self.transformer, layers) if layers else None

    @property
    def transformer(self) -> nn.Module:
        """The model without its head."""
        trunk = self.model.base_model
        assert isinstance(trunk, nn.Module)
        return trunk

    def heads(self) -> list[nn.Module]:
        """What the model has beside its transformer: an LM head or nothing."""
        return [module for name, module in self.model.named_children() if name != self.model.base_model_prefix]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def whole_bytes(self) -> int:
        """Bytes of all weights in the computation dtype, wherever they are."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())  # DeepSpeed leaves its count there
        return sum(sizes) * self.dtype.itemsize

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to the computation dtype."""
        return autocast(self.device, self.dtype, keeping=self.weights.are_whole)

    @contextmanager
    def role(self, adapter: str | None) -> Iterator[None]:
        """Run with a role's adapter state and precision; the state before is restored on the way out."""
        with self.adapters.on(adapter), self.autocast():
            yield

    @property
    def trunk(self) -> str | None:
        """Name under which sequences carry this backbone's trunk states; None where no trunk is frozen."""
        return self.spec.top_of or (self.spec.name if self.spec.frozen_layers else None)

    def hidden(self, sequences: Sequences, adapter: str | None) -> Tensor:
        """Last hidden states `[n, L, H]` of right-padded sequences `[n, L]`; only the top runs where they bring along
        the trunk's states.

        Right padding needs no mask under causal attention: a real token never looks at what follows it. Without a mask
        the attention takes its fast causal path.
        """
        states = None if self.trunk is None else sequences.trunks.get(self.trunk)
        with self.role(adapter), self._recomputing(), one_sequence_a_row():
            arguments = {"input_ids": sequences.input_ids, "use_cache": False}
            if states is None or self.branch is None:
                output: Any = self.transformer(**arguments)
            else:
                output = self.branch.top(states, **arguments)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def trunk_states(self, input_ids: Tensor) -> Tensor:
        """States `[n, L, H]` after the frozen layers, in the computation dtype."""
        assert self.branch is not None
        with self.role(None), one_sequence_a_row():
            return self.branch.bottom(input_ids=input_ids, use_cache=False).to(self.dtype)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, each under the adapter that its forward ran with."""

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            active = self.adapters.active
            return self.adapters.on(active), self.adapters.on(active)

        self._recomputes = True
        model: Any = self.model
        # The older name is deprecated in later versions of transformers.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": contexts})
        if not self.spec.trainable:
            self.model.enable_input_require_grads()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Training mode for a forward pass that a backward pass follows, where activations are recomputed.

        transformers recomputes in that mode only, and in that mode it drops the cache that generation needs. Every
        dropout is zero, so the mode changes no number.
        """
        if not (self._recomputes and torch.is_grad_enabled()):
            yield
            return
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()
