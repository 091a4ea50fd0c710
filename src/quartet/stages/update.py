"""Stage 4: clipped policy and value losses over epochs, minibatches and microbatches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quartet.config import PPOConfig
from quartet.distributed import ProcessEngine
from quartet.errors import TrainingError
from quartet.models.converted import CONVERTED
from quartet.models.gradients import IN_PLACE
from quartet.models.lending import LENDER
from quartet.records import Advantaged, Sequences, UpdateStats
from quartet.stages.bad_steps import BadSteps, are_finite, step_unless
from quartet.stages.batching import SequenceTable, microbatches
from quartet.stages.lanes import Lanes
from quartet.stages.out_of_memory import is_out_of_memory, release_memory
from quartet.stages.passes import ALL, Losses, Pass
from quartet.stages.trunks import with_trunks
from quartet.stages.update_sums import UpdateSums, update_stats


class Updater:
    """Runs the update stage.

    The losses of a minibatch are divided by its number of response tokens (all processes together), so the gradient does
    not depend on `microbatch_rows`. There is one optimizer step for each minibatch.
    """

    def __init__(
        self,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        engine: ProcessEngine,
        ppo: PPOConfig,
        *,
        temperature: float,
        seed: int,
        at_once: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            trained: called as a `TrainedPair` is.
            at_once: policy and value take their passes at the same time, each on half of the processor's threads. For two
                backbones in one process, none of which recomputes its activations.
            say: told when microbatches are made smaller because memory ran out.
        """
        self._trained: Any = trained
        self._optimizer = optimizer
        self._engine = engine
        self._ppo = ppo
        self._losses = Losses(trained, ppo, temperature=temperature, one_module=engine.one_module)
        self._seed = seed
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._rows = ppo.microbatch_rows
        self._with_entropy = True
        # Several processes cannot repeat what one of them failed at, nor can engines that hold shares of the gradients.
        self._alone = engine.world_size == 1 and not engine.shares_state
        self._in_place = engine.name == "none"  # the others wait for what autograd brings
        self._lanes = Lanes(2 if at_once else 1)
        self._say = say

    def update(self, batch: Advantaged, *, iteration: int, bad_steps: int = 0) -> UpdateStats:
        """`epochs` passes over the batch.

        A minibatch with a loss or gradient that is not finite takes no step and is counted.

        Args:
            bad_steps: how many steps in a row up to now were not taken.

        Raises:
            TrainingError: `ppo.max_bad_steps` in a row were not taken, or a single sequence needs more memory than there
                is; the weights are as they were after the last good step. Or a step made them something not finite.
        """
        with (
            LENDER.keeping(),
            CONVERTED.keeping(self._in_place and not self._trained.recomputes),
            IN_PLACE.added(self._in_place),
            self._lanes.open(),
        ):
            return self._update(batch, iteration, bad_steps)

    def _update(self, batch: Advantaged, iteration: int, bad_steps: int) -> UpdateStats:
        ppo, table = self._ppo, SequenceTable.of(batch.scored.rollout)
        sums, guard = UpdateSums(), BadSteps(ppo.max_bad_steps, bad_steps)
        count = len(table) // ppo.minibatches
        for epoch in range(ppo.epochs):
            # Where the loss has no use for it, the entropy is measured once, on the first pass over the tokens.
            self._with_entropy = ppo.entropy_coef > 0 or epoch == 0
            order = self._permutation(len(table), iteration, epoch)
            for start in range(0, len(order), count):
                self._minibatch(batch, table, order[start : start + count], sums, guard)
        if not are_finite(self._optimizer, self._engine):
            raise TrainingError(
                f"an optimizer step of iteration {iteration} made weights that are not finite; lower ppo.learning_rate or "
                "ppo.value_learning_rate"
            )
        skipped, in_a_row = guard.finish(
            batch.scored.rollout.prompts, lambda row: self._replay(batch, table, row), self._engine.gather
        )
        return update_stats(self._engine, sums, ppo.epochs * ppo.minibatches, skipped, in_a_row)

    def _permutation(self, count: int, iteration: int, epoch: int) -> list[int]:
        seed = ((self._seed * 1_000_003 + iteration) * 1_009 + epoch) % 2**64  # torch takes no larger ones
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _minibatch(
        self,
        batch: Advantaged,
        table: SequenceTable,
        rows: list[int],
        sums: UpdateSums,
        guard: BadSteps,
    ) -> None:
        seen, part, losses = self._gradients_within_memory(batch, table, rows)
        norm = self._engine.clip_gradients(self._parameters, self._ppo.max_grad_norm).detach()
        bad = self._engine.sum((~(norm.isfinite() & losses.isfinite().all())).int()) > 0
        step_unless(bad, self._optimizer, lambda: self._engine.step(self._optimizer))
        seen.norms.append(norm)
        sums.merge(seen, bad)
        guard.see(bad, part, losses)

    def _gradients_within_memory(
        self, batch: Advantaged, table: SequenceTable, rows: list[int]
    ) -> tuple[UpdateSums, Tensor, Tensor]:
        """`_gradients`, with ever smaller microbatches where memory runs out.

        Every attempt starts from no gradient at all, so that what a broken-off pass left counts nowhere.
        """
        while True:
            try:
                return self._gradients(batch, table, rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._alone:
                    raise
            self._take_less()

    def _take_less(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        release_memory()
        if self._lanes.count > 1:
            self._lanes = Lanes(1)
            self._say(
                "out of memory in the update: from now on policy and value take their passes one after the other "
                "(run.parallel_passes=false does so from the start)"
            )
            return
        if self._rows == 1:
            raise TrainingError(
                "memory ran out in the update with a single sequence (ppo.microbatch_rows=1); `quartet plan --memory` finds "
                "what fits, such as models.gradient_checkpointing=true or models.lora={}"
            )
        self._rows //= 2
        self._say(
            f"out of memory in the update: going on with {self._rows} sequences at once instead of "
            f"ppo.microbatch_rows={self._ppo.microbatch_rows}; the gradient is the same"
        )

    def _gradients(self, batch: Advantaged, table: SequenceTable, rows: list[int]) -> tuple[UpdateSums, Tensor, Tensor]:
        """Forward and backward over this process's part of a minibatch: its sums, row numbers `[n]`, their losses `[n]`."""
        scored = batch.scored
        chosen = table.on_device(rows)
        policy_tokens, value_tokens = scored.rollout.response_mask[chosen].sum(), scored.value_mask[chosen].sum()
        packed = self._alone and self._trained.packs(table.longest)
        batches = list(microbatches(table, self._own(table, rows), self._rows, fill=self._alone, packed=packed))
        # What passes lend each other is made once for the largest, and fits the others.
        batches.sort(key=lambda part: -part[1].size(packed=packed))
        if self._in_place:
            # Of several microbatches the last has all these gradients and its activations in memory anyway.
            IN_PLACE.reset(self._parameters, reuse=len(batches) > 1)
        else:
            self._optimizer.zero_grad(set_to_none=True)
        passes = self._losses.passes(batch, policy_tokens, value_tokens, with_entropy=self._with_entropy)
        sums = [UpdateSums() for _ in passes]
        losses = self._lanes.run(
            [
                partial(self._one_pass, batch, batches, passing, own, last=passing is passes[-1])
                for passing, own in zip(passes, sums, strict=True)
            ]
        )
        CONVERTED.forget()  # the weights are about to change
        for other in sums[1:]:
            sums[0].join(other)
        return sums[0], torch.cat([part for part, _ in batches]), torch.stack(losses).sum(0)

    def _one_pass(
        self,
        batch: Advantaged,
        batches: list[tuple[Tensor, Sequences]],
        passing: Pass,
        sums: UpdateSums,
        *,
        last: bool,
    ) -> Tensor:
        """Forward and backward over the microbatches: losses `[n]` of all rows.

        Args:
            last: no other pass comes after this one in the minibatch.
        """
        losses, known = [], batch.scored.trunks
        trunks = known if passing.trunk == ALL else {name: known[name] for name in known if name == passing.trunk}
        for number, (part, plain) in enumerate(batches, start=1):
            self._lanes.go_on()
            loss = passing.losses(part, with_trunks(plain, trunks), sums)
            self._engine.backward(loss.sum(), last=last and number == len(batches))
            losses.append(loss.detach())
            # Some layers keep tensors for as long as their graph lives: it must not live into the next forward.
            del loss
        if self._lanes.count == 1:  # of one model at a time, as its activations
            CONVERTED.forget()
        return torch.cat(losses)

    def _replay(self, batch: Advantaged, table: SequenceTable, row: int) -> bool:
        """Whether an episode alone has a finite gradient."""
        if not self._alone:
            return True
        self._gradients(batch, table, [row])
        finite = bool(self._engine.clip_gradients(self._parameters, None).isfinite())
        self._optimizer.zero_grad(set_to_none=True)
        return finite

    def _own(self, table: SequenceTable, rows: list[int]) -> list[int]:
        """This process's episodes of a minibatch: as many for each, of like lengths."""
        return table.by_length(rows)[self._engine.rank :: self._engine.world_size]
