"""Generation where processes hold shares of the policy: gathered for the time of a rollout, or a layer at a time in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from quartet.distributed import ProcessEngine
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout.engine import RolloutEngine


class ShardedRollout:
    """Puts a rollout engine to work on a policy that is cut over the processes.

    Gathered: every process holds the whole policy while it generates, and they need not wait for each other. Otherwise each
    forward pass fetches every layer from all processes, so all of them run as many: before each one they ask whether any
    still has rows to decode, and those that have none run along on one token until nobody has.
    """

    def __init__(
        self, policy: LanguageView, processes: ProcessEngine, make: Callable[[], RolloutEngine], *, gather: bool
    ) -> None:
        """`make` makes the engine that generates; it may run forward passes, as many in every process."""
        self._policy, self._processes, self._gather = policy, processes, gather
        with torch.no_grad(), policy.backbone.weights.head():  # not whole: loading is not to hold a whole model
            self._inner = make()

    @torch.no_grad()
    def generate(self, prompts: Prompts, *, greedy: bool = False) -> Rollout:
        """Sample (or decode greedily) one response for each prompt; see `RolloutEngine`."""
        with self._weights():
            if self._gather:
                return self._inner.generate(prompts, greedy=greedy)
            with self._in_step():
                rollout = self._inner.generate(prompts, greedy=greedy)
            while self._processes.any(False):
                self._run_along()
            return rollout

    @contextmanager
    def _weights(self) -> Iterator[None]:
        keeper = self._policy.backbone.weights
        with keeper.whole() if self._gather else keeper.head():
            yield

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Tell the others before each forward pass."""

        def tell(module: nn.Module, arguments: tuple[object, ...]) -> None:
            self._processes.any(True)

        handle = self._policy.backbone.transformer.register_forward_pre_hook(tell)
        try:
            yield
        finally:
            handle.remove()

    def _run_along(self) -> None:
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._policy.backbone.device)
        with self._policy.active():
            self._policy.backbone.transformer(input_ids=token, use_cache=False)
