"""Recorded decoding steps against steps that are run: played back by operations on fixed tensors, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from quartet.models.roles import LanguageView
from quartet.rollout.choose import make_engine
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.static import StaticEngine
from quartet.rollout.static_cache import NotDrivable
from quartet.rollout.steps import CudaRecorder, Picked, power_of_two
from rollout_policies import FAMILIES, make_policy, make_prompts, settings, with_stops


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Recorder:
    """Keeps the operations of some work with the very tensors they ran on; no Python runs again when it is played back."""

    def __init__(self) -> None:
        self.recorded = 0
        self.played = 0

    def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
        operations: Any = make_fx(work)()
        result = tuple(torch.empty_like(part) for part in operations())
        self.recorded += 1

        def play() -> None:
            self.played += 1
            for kept, fresh in zip(result, operations(), strict=True):
                kept.copy_(fresh)

        return play, (result[0], result[1])


def recording(policy: LanguageView, **changes: Any) -> tuple[StaticEngine, list[Recorder]]:
    """A static engine that records, and the recorders that it asked for."""
    made: list[Recorder] = []

    def recorder() -> Recorder:
        made.append(Recorder())
        return made[-1]

    engine = StaticEngine(policy, settings(**changes))
    engine.record_with(recorder)
    return engine, made


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2", "qwen2-window"])
def test_recorded_steps_give_what_steps_give(family: str, greedy: bool) -> None:
    """Rows that stop, move and are refilled included; the prompts fill six rows, so that some are computed along."""
    policy = make_policy(FAMILIES[family](), lora=family == "llama")
    chosen = {"stop_id": with_stops(policy, greedy=greedy).stop_id, "batch_rows": 6}
    engine, made = recording(policy, **chosen)
    found = engine.generate(make_prompts(), greedy=greedy)
    expected = StaticEngine(policy, settings(**chosen)).generate(make_prompts(), greedy=greedy)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.response_mask, expected.response_mask)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    assert 0 < made[-1].recorded < made[-1].played


def test_weights_of_now_are_used_in_every_rollout() -> None:
    """A rollout records anew: the tensors that the last one was recorded with may be gone."""
    policy = make_policy(FAMILIES["llama"](), lora=True)
    engine, made = recording(policy)
    engine.generate(make_prompts())
    with torch.no_grad():
        for parameter in policy.backbone.model.parameters():
            parameter.mul_(1.3)
    found = engine.generate(make_prompts())
    assert torch.equal(found.tokens, DynamicEngine(policy, settings()).generate(make_prompts()).tokens)
    assert len(made) == 3
    assert [recorder.recorded > 0 for recorder in made] == [True, True, True]


def test_steps_that_cannot_be_recorded_or_differ_are_refused() -> None:
    policy = make_policy(FAMILIES["llama"]())

    class Fails(Recorder):
        def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
            raise RuntimeError("operation not permitted\nwhen capturing")

    class Stale(Recorder):
        def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
            _, result = super().__call__(work)
            return lambda: None, (result[0].zero_(), result[1].zero_())

    engine = StaticEngine(policy, settings())
    with pytest.raises(NotDrivable, match="fails with RuntimeError: operation not permitted when capturing"):
        engine.record_with(Fails)
    with pytest.raises(NotDrivable, match="off by"):
        engine.record_with(Stale)
    found = engine.generate(make_prompts())
    assert torch.equal(found.tokens, StaticEngine(policy, settings()).generate(make_prompts()).tokens)


def test_nothing_is_recorded_on_the_cpu() -> None:
    said: list[str] = []
    engine = make_engine("auto", make_policy(FAMILIES["llama"]()), settings(), said.append, cuda_graphs=True)
    assert isinstance(engine, StaticEngine)
    assert engine._recorder is None
    assert said == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs() -> None:
    policy = make_policy(FAMILIES["llama"](), lora=True)
    policy.backbone.model.cuda()
    engine = StaticEngine(policy, settings())
    engine.record_with(CudaRecorder)
    found = engine.generate(make_prompts())
    expected = StaticEngine(policy, settings()).generate(make_prompts())
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-3, atol=1e-3)


def test_power_of_two() -> None:
    assert [power_of_two(count, 12) for count in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]
