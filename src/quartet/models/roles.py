"""The four roles as views of backbones, and the two trained ones as one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quartet.models.adapters import adapter_parameters
from quartet.models.backbone import Backbone
from quartet.models.frozen_head import frozen_logprobs
from quartet.models.heads import LogitHead, ScalarHead
from quartet.models.layout import Layout, filled_up
from quartet.models.linear_head import linear_logprobs
from quartet.models.linears import Weights
from quartet.models.plan import Role, SharingPlan
from quartet.models.residency import Residency
from quartet.ops.logprobs import chunked_logprobs
from quartet.records import Sequences


class LanguageView(nn.Module):
    """Policy or reference: log-probabilities of tokens under one adapter state of a backbone."""

    def __init__(self, backbone: Backbone, adapter: str | None, head: LogitHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.head = head

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the backbone as this role."""
        with self.backbone.role(self.adapter):
            yield

    def forward(
        self,
        sequences: Sequences,
        mask: Tensor,
        *,
        temperature: float,
        with_entropy: bool = False,
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability and entropy of the response tokens.

        Args:
            sequences: n right-padded sequences.
            mask: bool `[n, T]`; only these response positions are computed.
            temperature: divides the logits.
            with_entropy: also compute the entropy.
            entropy_grad: let gradients flow through the entropy.

        Returns:
            float32 `[n, T]` log-probabilities in nats and entropy (or None), zero outside the mask.
        """
        layout = self.backbone.lay_out(sequences)
        hidden = self.backbone.hidden(layout, self.adapter)
        return self.from_hidden(
            hidden, layout, mask, temperature=temperature, with_entropy=with_entropy, entropy_grad=entropy_grad
        )

    def from_hidden(
        self,
        hidden: Tensor,
        layout: Layout,
        mask: Tensor,
        *,
        temperature: float,
        with_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The same from last hidden states `[m, H]`."""
        sequences = layout.sequences
        row, step = sequences.places(mask)
        places = [filled_up(places, self.backbone.tile) for places in (row, step)]
        selected, tokens = hidden[layout.before(*places)], sequences.response_tokens(*places)
        with self.backbone.role(self.adapter), self.backbone.weights.head():
            logprobs, entropy = self._logprobs(selected, tokens, temperature, with_entropy, entropy_grad)
        zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=logprobs.device)
        found = [None if flat is None else flat[: len(row)] for flat in (logprobs, entropy)]
        placed = [None if flat is None else zeros.index_put((row, step), flat) for flat in found]
        assert placed[0] is not None
        return placed[0], placed[1]

    def _logprobs(
        self, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, entropy_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropy `[N]` from states `[N, H]`; a head that is one layer is taken apart where a gradient
        flows through it."""
        learns = torch.is_grad_enabled()
        trained, linear = self.head.trainable and learns, self._linear_head() if learns else None
        wanted: dict[str, Any] = {"temperature": temperature, "with_entropy": with_entropy}
        if linear is not None and linear.weight.requires_grad:
            return linear_logprobs(hidden, linear, tokens, **wanted, entropy_grad=entropy_grad)
        if linear is not None and hidden.requires_grad and not (trained or entropy_grad):
            return frozen_logprobs(hidden, linear, tokens, **wanted)
        wanted |= {"chunk_tokens": self.backbone.chunk_tokens, "head_trainable": trained, "entropy_grad": entropy_grad}
        return chunked_logprobs(hidden, self.head, tokens, **wanted)

    def _linear_head(self) -> Weights | None:
        """The head's weights, where taking it apart pays: on the CPU (elsewhere unmeasured), and where it is one layer."""
        here = self.backbone.weights.are_whole and self.backbone.device.type == "cpu"
        return self.head.linear if here else None


class ScalarView(nn.Module):
    """Value or reward: one number at chosen tokens under one adapter state of a backbone."""

    def __init__(self, backbone: Backbone, adapter: str | None, head: ScalarHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.head = head

    def forward(self, sequences: Sequences, mask: Tensor) -> Tensor:
        """Numbers *before* each response token, as a value function needs them: `[n, T]`, zero outside the mask.

        Args:
            sequences: n right-padded sequences.
            mask: bool `[n, T]`; True at `t = response length` asks for the number at the last token.
        """
        layout = self.backbone.lay_out(sequences)
        return self.from_hidden(self.backbone.hidden(layout, self.adapter), layout, mask)

    def from_hidden(self, hidden: Tensor, layout: Layout, mask: Tensor) -> Tensor:
        """The same from last hidden states `[m, H]`."""
        with self.backbone.weights.done():
            numbers: Tensor = self.head(hidden)[layout.before_every_step(mask.shape[1])]
        return numbers.where(mask, 0.0)

    def scores(self, sequences: Sequences) -> Tensor:
        """The number at the last token of each sequence: `[n]`."""
        layout = self.backbone.lay_out(sequences)
        hidden = self.backbone.hidden(layout, self.adapter)
        with self.backbone.weights.done():
            numbers: Tensor = self.head(hidden[layout.last])
        return numbers


class TrainedPair(nn.Module):
    """Policy and value. One call gives both outputs; called one after the other, each with its backward pass, they hold
    the activations of one at a time."""

    def __init__(self, policy: LanguageView, value: ScalarView) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    @property
    def one_pass(self) -> bool:
        """Whether the value is a head on the policy's own states, so that one forward pass serves both."""
        return (self.value.backbone, self.value.adapter) == (self.policy.backbone, self.policy.adapter)

    @property
    def recomputes(self) -> bool:
        """Whether the backward passes compute activations again."""
        return self.policy.backbone.recomputes or self.value.backbone.recomputes

    def packs(self, longest: int) -> bool:
        """Whether training passes compute sequences of up to so many tokens side by side, in both."""
        return longest <= min(self.policy.backbone.packs_up_to, self.value.backbone.packs_up_to)

    def forward(
        self,
        sequences: Sequences,
        mask: Tensor,
        value_mask: Tensor,
        *,
        temperature: float,
        with_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities `[n, T]`, entropy `[n, T]` or None, and values `[n, T]` of the same sequences."""
        policy, value = self.policy, self.value
        layout = policy.backbone.lay_out(sequences)
        hidden = policy.backbone.hidden(layout, policy.adapter)
        logprobs, entropy = policy.from_hidden(
            hidden, layout, mask, temperature=temperature, with_entropy=with_entropy, entropy_grad=entropy_grad
        )
        if not self.one_pass:
            layout = value.backbone.lay_out(sequences)
            hidden = value.backbone.hidden(layout, value.adapter)
        return logprobs, entropy, value.from_hidden(hidden, layout, value_mask)


@dataclass(frozen=True)
class Roles:
    """All that a sharing plan laid out, loaded."""

    plan: SharingPlan
    backbones: dict[str, Backbone]
    policy: LanguageView
    reference: LanguageView
    value: ScalarView
    reward: ScalarView
    trained: TrainedPair
    residency: Residency

    def use(self, *roles: Role) -> None:
        """Make the weights of these roles usable; call it before they run. Those of others may leave the device."""
        self.residency.use(*roles)

    def trained_parameters(self, role: Role) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that training moves for `policy` or `value`, in a fixed order."""
        view, policy = self.plan.view(role), self.plan.view("policy")
        backbone = self.backbones[view.backbone]
        if view.adapter is not None:
            found = adapter_parameters(backbone.model, view.adapter)
        else:
            found = [(name, p) for name, p in backbone.model.named_parameters() if p.requires_grad]
        if role == "value":
            if (view.backbone, view.adapter) == (policy.backbone, policy.adapter):
                found = []  # a head on the policy's states: all else is the policy's
            found.append((self.value.head.name, self.value.head.weight))
        return found

    def trunk_states(self, sequences: Sequences) -> dict[str, Tensor]:
        """States after the frozen layers of every backbone that has a trunk, by its name."""
        owners = [backbone for backbone in self.backbones.values() if backbone.spec.frozen_layers]
        return {backbone.spec.name: backbone.trunk_states(sequences.input_ids) for backbone in owners}
