"""States after the frozen layers: computed once in scoring, kept in host memory, used in every epoch of the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quartet.models.transfer import to_device
from quartet.records import Sequences


class TrunkStates:
    """Collects the states of a rollout's sequences, without their padding."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[str, list[Tensor | None]] = {}

    def keep(self, sequences: Sequences, length: Callable[[int], int], states: Mapping[str, Tensor]) -> None:
        """Take in a microbatch's states `[n, L, H]` of each backbone; `length` gives the tokens of a row of the rollout."""
        assert sequences.rows is not None
        for name, tensor in states.items():
            places = self._kept.setdefault(name, [None] * self._count)
            for row, state in zip(sequences.rows, tensor.cpu(), strict=True):
                places[row] = state[: length(row)].clone()

    def rows(self) -> dict[str, tuple[Tensor, ...]]:
        """`[sequence tokens, H]` of every sequence, by backbone."""
        return {name: tuple(state for state in rows if state is not None) for name, rows in self._kept.items()}


def with_trunks(sequences: Sequences, trunks: Mapping[str, tuple[Tensor, ...]]) -> Sequences:
    """The same sequences, bringing along the states of their rows, padded."""
    if not trunks:
        return sequences
    assert sequences.rows is not None
    device, width = sequences.input_ids.device, sequences.input_ids.shape[1]
    padded = {}
    for name, states in trunks.items():
        shape, pinned = (len(sequences.rows), width, states[0].shape[-1]), device.type == "cuda"
        block = torch.zeros(shape, dtype=states[0].dtype, pin_memory=pinned)
        for place, row in enumerate(sequences.rows):
            block[place, : len(states[row])] = states[row]
        padded[name] = to_device(block, device)
    return replace(sequences, trunks=padded)
