"""States after the frozen layers: computed once in scoring, kept in host memory, used in every epoch of the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quartet.records import Sequences


class TrunkStates:
    """Collects the states of a rollout's sequences, without their padding."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[str, list[Tensor | None]] = {}

    def keep(self, rows: Tensor, length: Callable[[int], int], states: Mapping[str, Tensor]) -> None:
        """Take in a microbatch's states `[n, L, H]` of each backbone; `length` gives the tokens of a row."""
        for name, tensor in states.items():
            places = self._kept.setdefault(name, [None] * self._count)
            for row, state in zip(rows.tolist(), tensor.cpu(), strict=True):
                places[row] = state[: length(row)].clone()

    def rows(self) -> dict[str, tuple[Tensor, ...]]:
        """`[sequence tokens, H]` of every sequence, by backbone."""
        return {name: tuple(state for state in rows if state is not None) for name, rows in self._kept.items()}


def with_trunks(sequences: Sequences, trunks: Mapping[str, tuple[Tensor, ...]], rows: Tensor) -> Sequences:
    """The same sequences, bringing along the states of their rows, padded."""
    if not trunks:
        return sequences
    device, width = sequences.input_ids.device, sequences.input_ids.shape[1]
    padded = {}
    for name, states in trunks.items():
        block = torch.zeros(len(rows), width, states[0].shape[-1], dtype=states[0].dtype)
        for place, row in enumerate(rows.tolist()):
            block[place, : len(states[row])] = states[row]
        padded[name] = block.to(device, non_blocking=True)
    return replace(sequences, trunks=padded)
