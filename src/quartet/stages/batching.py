"""Cutting a rollout into microbatches that hold little padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.models.transfer import to_device
from quartet.records import Rollout, Sequences

CPU_ROWS = 16
"""Sequences that a processor computes at once without gradients: fewer take more calls, more hold more padding."""


def scoring_rows(batch_rows: int, device_type: str, *, cut: bool) -> int:
    """Sequences that scoring computes at once.

    Args:
        batch_rows: `rollout.batch_rows`.
        cut: whether weights are shared out over processes, and have to be gathered for each pass.
    """
    return min(batch_rows, CPU_ROWS) if device_type == "cpu" and not cut else batch_rows


@dataclass(frozen=True, slots=True)
class SequenceTable:
    """All sequences of a rollout, right-padded once; microbatches are trimmed slices of it."""

    input_ids: Tensor
    """int64 `[B, longest]`."""
    prompt_lengths: Tensor
    response_lengths: Tensor
    prompts: tuple[int, ...]
    """Tokens of each prompt, known to the host."""
    responses: tuple[int, ...]
    """Tokens of each response, likewise: the one thing the device is asked, and no microbatch asks it again."""
    widest: int
    """Tokens of the longest prompt and the longest response that there could be; a plan of memory counts no fewer."""

    @staticmethod
    def of(rollout: Rollout) -> SequenceTable:
        """Lay prompts and responses side by side without a gap."""
        tokens, device = rollout.tokens, rollout.tokens.device
        prompts = torch.nn.utils.rnn.pad_sequence(list(rollout.prompts.tokens), batch_first=True).to(device)
        prompt_counts = tuple(len(t) for t in rollout.prompts.tokens)
        prompt_lengths = torch.tensor(prompt_counts, device=device)
        response_lengths = rollout.response_mask.sum(-1)
        response_counts: tuple[int, ...] = tuple(response_lengths.tolist())
        longest = max(map(sum, zip(prompt_counts, response_counts, strict=True)))
        place = torch.arange(longest, device=device).expand(len(tokens), -1)
        step = place - prompt_lengths[:, None]
        from_prompt = prompts.gather(1, place.clamp(max=prompts.shape[1] - 1))
        from_response = tokens.gather(1, step.clamp(0, tokens.shape[1] - 1))
        ids = torch.where(step < 0, from_prompt, from_response)
        # After the end any valid id will do: no real token looks there.
        ids = torch.where(step < response_lengths[:, None], ids, torch.zeros_like(ids))
        widest = max(prompt_counts) + tokens.shape[1]
        return SequenceTable(ids, prompt_lengths, response_lengths, prompt_counts, response_counts, widest)

    def __len__(self) -> int:
        return len(self.prompts)

    def length(self, row: int) -> int:
        """Tokens of a sequence."""
        return self.prompts[row] + self.responses[row]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.input_ids.shape[1]

    def by_length(self, rows: Iterable[int]) -> list[int]:
        """Row numbers, longest sequence first."""
        return sorted(rows, key=lambda row: -self.length(row))

    def on_device(self, rows: list[int]) -> Tensor:
        """Row numbers int64 `[n]`; the host does not wait until they are there."""
        return to_device(torch.tensor(rows), self.input_ids.device)

    def rows(self, rows: list[int]) -> tuple[Tensor, Sequences]:
        """Row numbers int64 `[n]` and their sequences, trimmed to the longest of them."""
        places, longest = self.on_device(rows), max(self.length(row) for row in rows)
        sequences = Sequences(
            self.input_ids[places, :longest],
            self.prompt_lengths[places],
            self.response_lengths[places],
            prompts=tuple(self.prompts[row] for row in rows),
            responses=tuple(self.responses[row] for row in rows),
            rows=tuple(rows),
        )
        return places, sequences


def microbatches(
    table: SequenceTable, rows: Iterable[int], size: int, *, fill: bool = False, packed: bool = False
) -> Iterator[tuple[Tensor, Sequences]]:
    """Cut `rows` into microbatches of sequences of like length, longest first.

    Args:
        size: sequences in each, at most.
        fill: more of shorter ones, up to the tokens, with padding, of `size` of the table's longest; of as few microbatches
            as that makes the largest is as small as it can be.
        packed: sequences will lie side by side, so that what is filled up counts tokens without padding. With padding, which
            attention makes where no kernel computes it, they are not more than those of `size` of the table's widest.

    Yields:
        As `SequenceTable.rows`.
    """
    order = table.by_length(rows)
    yield from map(table.rows, _filled(table, order, size, packed=packed) if fill else _slices(order, size))


def _slices(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _filled(table: SequenceTable, order: list[int], size: int, *, packed: bool) -> list[list[int]]:
    lengths = [table.length(row) for row in order]
    most = size * table.longest
    padded = size * table.widest if packed else None
    parts = _within(order, lengths, most, padded)
    least, fewest = 0, len(parts)
    while least < most:  # the smallest limit that makes no more parts
        middle = (least + most) // 2
        found = _within(order, lengths, middle, padded)
        if len(found) == fewest:
            parts, most = found, middle
        else:
            least = middle + 1
    return parts


def _within(order: list[int], lengths: list[int], most: int, most_padded: int | None) -> list[list[int]]:
    """As long parts as hold no more tokens than that, but one sequence at least.

    Args:
        most_padded: those of them with padding; None: `most` counts padding.
    """
    parts: list[list[int]] = []
    longest = tokens = 0
    for row, length in zip(order, lengths, strict=True):
        tokens += length
        padded = longest * (len(parts[-1]) + 1) if parts else 0
        full = padded > most if most_padded is None else tokens > most or padded > most_padded
        if not parts or full:
            parts.append([])
            longest = tokens = length
        parts[-1].append(row)
    return parts
