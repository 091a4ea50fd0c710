"""Optimizer steps that are not taken because a loss or the gradient is not finite, and weights that one has ruined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quartet.distributed import ProcessEngine
from quartet.errors import TrainingError
from quartet.records import Prompts

NO_CULPRIT = "the gradient of a minibatch is not finite although every loss is"


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """`step()` of an optimizer, or none where `bad` (bool, one element) is True.

    Fused optimizers read `found_inf`, made for gradient scaling: where it is 1 they change neither weights nor their own
    state, and the host need not wait to know. For others the host asks.
    """
    if optimizer.defaults.get("fused"):
        fused: Any = optimizer
        fused.found_inf = bad.float()
        step()
    elif not bool(bad):
        step()


def are_finite(optimizer: torch.optim.Optimizer, engine: ProcessEngine) -> bool:
    """Whether all trained weights are, in every process; reads each once, and waits for the device."""
    # A sum is finite where its terms are, short of sizes that no weight has, and is faster than to ask each term.
    sums = [part.sum(dtype=torch.float32) for part in engine.held(optimizer)]
    broken = ~torch.stack([one.to(sums[0].device) for one in sums]).isfinite().all()
    return not int(engine.sum(broken.int()))


class BadSteps:
    """Counts the steps of one update that were not taken, and keeps what names their episodes, on the device."""

    def __init__(self, limit: int, in_a_row: int) -> None:
        """`limit` in a row end the run; `in_a_row` is how many the steps before this update ended with."""
        self._limit = limit
        self._in_a_row = in_a_row
        self._flags: list[Tensor] = []
        self._losses: list[tuple[Tensor, Tensor]] = []

    def see(self, bad: Tensor, rows: Tensor, losses: Tensor) -> None:
        """Take in a minibatch: whether its step was left out, its row numbers `[n]` and their losses `[n]`."""
        self._flags.append(bad)
        self._losses.append((rows, losses))

    def finish(
        self,
        prompts: Prompts,
        replay: Callable[[int], bool],
        gather: Callable[[str | None], list[str | None]] = lambda own: [own],
    ) -> tuple[int, int]:
        """(steps not taken, how many of them in a row up to now); waits for the device.

        Args:
            prompts: of the update's episodes, for the message.
            replay: whether a row alone has a finite gradient; asked where every loss was finite.
            gather: gives what each process found, so that all of them say the same.

        Raises:
            TrainingError: `limit` in a row were not taken; names the episode whose loss or gradient is not finite.
        """
        flags: list[bool] = torch.stack(self._flags).tolist()
        in_a_row = self._in_a_row
        for place, bad in enumerate(flags):
            in_a_row = in_a_row + 1 if bad else 0
            if in_a_row >= self._limit:
                found = [
                    words for words in gather(_culprit(prompts, *self._losses[place], replay)) if words is not None
                ]
                raise TrainingError(
                    f"{found[0] if found else NO_CULPRIT}; its optimizer step was not taken, the last of "
                    f"ppo.max_bad_steps={self._limit} in a row: lower ppo.learning_rate or use models.dtype=float32"
                )
        return sum(flags), in_a_row


def _culprit(prompts: Prompts, rows: Tensor, losses: Tensor, replay: Callable[[int], bool]) -> str | None:
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    if wrong:
        return f"the loss of {_episode(prompts, int(rows[wrong[0]]))} is {losses[wrong[0]].item()}"
    for row in rows.tolist():
        if not replay(row):
            return f"the gradient of {_episode(prompts, row)} is not finite although its loss is"
    return None


def _episode(prompts: Prompts, row: int) -> str:
    return f"episode {prompts.episodes[row]} (prompt {prompts.texts[row][:80]!r})"
