"""A backbone: one set of transformer weights in memory, with or without LoRA adapters on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quartet.distributed import WeightKeeper, WholeWeights
from quartet.models.adapters import AdapterSwitch
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.attention import one_sequence_a_row
from quartet.models.branch import Branch
from quartet.models.layout import Layout, PackedLayout, packed_as, packed_now
from quartet.models.plan import BackboneSpec
from quartet.models.precision import autocast, chunk_tokens_of, tile_of
from quartet.records import Sequences


class Backbone(nn.Module):
    """Weights and adapters of one plan entry; roles look at it through views."""

    def __init__(
        self, spec: BackboneSpec, model: PreTrainedModel, *, dtype: torch.dtype, below: Backbone | None = None
    ) -> None:
        """
        Args:
            below: the backbone whose frozen bottom this one shares.
        """
        super().__init__()
        self.spec = spec
        self.model = model
        self.dtype = dtype
        """Computation dtype; the weights of a trained backbone stay in float32."""
        self.adapters = AdapterSwitch(model)
        self.weights: WeightKeeper = WholeWeights()
        """Gathers the weights where processes hold shares of them."""
        self.packs_up_to = 0
        """Tokens of a sequence up to which sequences may lie side by side; `packing.py` decides."""
        self._recomputes = False
        self.branch: Branch | None = None
        if below is not None and below.branch is not None:
            self.branch = Branch(self.transformer, below.spec.frozen_layers, below.branch.form)
        elif spec.frozen_layers:
            self.branch = Branch(self.transformer, spec.frozen_layers)

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
        """Where the weights are when they run."""
        return self.weights.device or next(self.model.parameters()).device

    def whole_bytes(self) -> int:
        """Bytes of all weights in the computation dtype, wherever they are."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())  # DeepSpeed leaves its count there
        return sum(sizes) * self.dtype.itemsize

    @cached_property
    def tile(self) -> int:
        """Rows of which products should have a multiple."""
        return tile_of(self.device, self.dtype)

    @cached_property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at once."""
        return chunk_tokens_of(self.device)

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

    def lay_out(self, sequences: Sequences) -> Layout:
        """How to compute these sequences: side by side as in training, where the model was seen to allow it; else padded.

        Frozen roles stay bit for bit what their checkpoints compute alone, on rows of the same length.
        """
        known = computes_as_in_training() and sequences.responses is not None
        if known and sequences.input_ids.shape[1] <= self.packs_up_to:
            return PackedLayout.of(sequences, self.tile)
        return Layout.padded(sequences)

    def hidden(self, layout: Layout, adapter: str | None) -> Tensor:
        """Last hidden states `[m, H]` of the tokens that the layout speaks of; only the top runs where the sequences bring
        along the trunk's states."""
        states = None if self.trunk is None else layout.trunk(self.trunk)
        with self.role(adapter), self._recomputing(), one_sequence_a_row(), layout.active():
            arguments = {**layout.arguments, "use_cache": False}
            if states is None or self.branch is None:
                output: Any = self.transformer(**arguments)
            else:
                output = self.branch.top(states, **arguments)
        return layout.states(output.last_hidden_state)

    @torch.no_grad()
    def trunk_states(self, input_ids: Tensor) -> Tensor:
        """States `[n, L, H]` after the frozen layers, in the computation dtype."""
        assert self.branch is not None
        with self.role(None), one_sequence_a_row():
            return self.branch.bottom(input_ids=input_ids, use_cache=False).to(self.dtype)

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes activations again."""
        return self._recomputes

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, each under the adapter and layout that its forward ran with."""

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            active, layout = self.adapters.active, packed_now()

            @contextmanager
            def again() -> Iterator[None]:
                with self.adapters.on(active), packed_as(layout):
                    yield

            return nullcontext(), again()

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
