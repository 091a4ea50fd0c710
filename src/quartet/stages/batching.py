"""Cutting a rollout into microbatches that hold little padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.records import Rollout, Sequences


@dataclass(frozen=True, slots=True)
class SequenceTable:
    """All sequences of a rollout, right-padded once; microbatches are trimmed slices of it."""

    input_ids: Tensor
    """int64 `[B, longest]`."""
    prompt_lengths: Tensor
    response_lengths: Tensor

    @staticmethod
    def of(rollout: Rollout) -> SequenceTable:
        """Lay prompts and responses side by side without a gap."""
        tokens, device = rollout.tokens, rollout.tokens.device
        prompts = torch.nn.utils.rnn.pad_sequence(list(rollout.prompts.tokens), batch_first=True).to(device)
        prompt_lengths = torch.tensor([len(t) for t in rollout.prompts.tokens], device=device)
        response_lengths = rollout.response_mask.sum(-1)
        longest = int((prompt_lengths + response_lengths).max())
        place = torch.arange(longest, device=device).expand(len(tokens), -1)
        step = place - prompt_lengths[:, None]
        from_prompt = prompts.gather(1, place.clamp(max=prompts.shape[1] - 1))
        from_response = tokens.gather(1, step.clamp(0, tokens.shape[1] - 1))
        ids = torch.where(step < 0, from_prompt, from_response)
        # After the end any valid id will do: no real token looks there.
        ids = torch.where(step < response_lengths[:, None], ids, torch.zeros_like(ids))
        return SequenceTable(ids, prompt_lengths, response_lengths)

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        total: list[int] = (self.prompt_lengths + self.response_lengths).tolist()
        return total

    def rows(self, rows: Tensor, longest: int) -> Sequences:
        """Some sequences, trimmed to `longest` tokens."""
        return Sequences(self.input_ids[rows, :longest], self.prompt_lengths[rows], self.response_lengths[rows])


def microbatches(
    table: SequenceTable, lengths: list[int], rows: list[int], size: int
) -> Iterator[tuple[Tensor, Sequences]]:
    """Cut `rows` into microbatches of at most `size` sequences of like length, longest first.

    Yields:
        int64 row numbers `[n]` and their sequences, trimmed to the longest of them.
    """
    order = sorted(rows, key=lambda row: -lengths[row])
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield _rows(table, chosen), table.rows(_rows(table, chosen), lengths[chosen[0]])


def _rows(table: SequenceTable, rows: list[int]) -> Tensor:
    return torch.tensor(rows, device=table.input_ids.device)
