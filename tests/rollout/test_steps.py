"""Recorded decoding steps against steps that are run: played back by operations on fixed tensors, as a CUDA graph does."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import SimpleNamespace
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

pytestmark = pytest.mark.usefixtures("without_kernels")  # as on a GPU


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

    def refusing(self) -> AbstractContextManager[None]:
        return nullcontext()


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


def test_what_was_run_in_one_rollout_is_recorded_at_once_in_the_next() -> None:
    """Greedy steps and steps that draw run other operations: each kind is run once before it is recorded."""
    engine, made = recording(make_policy(FAMILIES["llama"]()))
    run_as_they_are = []
    for greedy in (False, True, False, True):
        found = engine.generate(make_prompts(), greedy=greedy)
        run_as_they_are.append(found.decode_steps - made[-1].played)
    assert all(count > 0 for count in run_as_they_are[:2])
    assert run_as_they_are[2:] == [0, 0]


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


def test_steps_that_draw_are_checked_too() -> None:
    policy = make_policy(FAMILIES["llama"]())

    class StaleDraws(Recorder):
        def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
            play, (tokens, logprobs) = super().__call__(work)
            if self.recorded == 1:
                return play, (tokens, logprobs)
            return play, (torch.zeros_like(tokens), logprobs)

    with pytest.raises(NotDrivable, match="off by"):
        StaticEngine(policy, settings(top_p=0.9)).record_with(StaleDraws)


def test_recordings_of_one_recorder_live_side_by_side() -> None:
    """A pool of CUDA graphs whose graphs are all gone takes no other one: torch's allocator then fails an assertion."""
    policy = make_policy(FAMILIES["llama"]())

    class Pooled(Recorder):
        def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
            if self.recorded and not any(play() for play in plays):
                raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
            play, result = super().__call__(work)
            plays.append(weakref.ref(play))
            return play, result

    plays: list[weakref.ref[Callable[[], None]]] = []
    engine = StaticEngine(policy, settings())
    engine.record_with(Pooled)
    assert len(plays) == 2
    engine.generate(make_prompts())


def test_a_step_that_asks_is_refused_before_it_is_recorded() -> None:
    """A recording that fails half-way would leave the GPU's allocator in a state of its own."""
    policy = make_policy(FAMILIES["llama"]())
    tried: list[bool] = []

    class Refusing(Recorder):
        def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
            tried.append(True)
            return super().__call__(work)

        @contextmanager
        def refusing(self) -> Iterator[None]:
            def asked(*_: Any) -> None:
                raise RuntimeError("called a synchronizing CUDA operation")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "item", asked)
                yield

    layer = policy.backbone.model.model.layers[0]
    handle = layer.register_forward_hook(lambda *_: torch.ones(()).item() and None)
    with pytest.raises(NotDrivable, match="fails with RuntimeError: called a synchronizing CUDA operation"):
        StaticEngine(policy, settings()).record_with(Refusing)
    assert tried == []
    handle.remove()
    StaticEngine(policy, settings()).record_with(Refusing)
    assert tried != []


def test_a_recording_that_fails_later_is_told_and_the_rollout_goes_on() -> None:
    policy = make_policy(FAMILIES["llama"]())
    asked: list[int] = []

    class FailsLater(Recorder):
        def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
            asked.append(1)
            if len(asked) > 3:  # two of the check, one of the rollout
                raise RuntimeError("out of memory\nwhen capturing")
            return super().__call__(work)

    said: list[str] = []
    engine = StaticEngine(policy, settings(batch_rows=6))
    engine.record_with(FailsLater, said.append)
    expected = StaticEngine(policy, settings(batch_rows=6)).generate(make_prompts())
    for _ in range(2):
        found = engine.generate(make_prompts())
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    assert len(asked) == 4
    reason = "recording a decoding step fails with RuntimeError: out of memory when capturing"
    assert said == [f"rollout.cuda_graphs is off from here on: {reason}"]


class Gpu:
    """What `CudaRecorder` asks of torch, with a stream and an allocator that remember; its recordings fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.mode, self.pools = "own", 0, [(0, 7)]
        self.modes: list[Any] = []
        for name in ("graph", "stream", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.pools.remove(pool), raising=False)

    @contextmanager
    def _stream(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _graph(self, *_: Any, **__: Any) -> Iterator[None]:
        self.stream = "recording"
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def _set_sync_debug_mode(self, mode: Any) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
        self.mode = mode
        self.modes.append(mode)


def test_a_recording_that_fails_leaves_stream_and_allocator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    with pytest.raises(RuntimeError, match="during capture"):
        CudaRecorder()(lambda: (torch.zeros(1), torch.zeros(1)))
    assert (gpu.stream, gpu.pools) == ("own", [])


def test_waiting_for_the_gpu_is_an_error_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    gpu.mode = 1
    with suppress(ZeroDivisionError), CudaRecorder().refusing():
        assert gpu.mode == "error"
        print(1 / 0)
    assert gpu.modes == ["error", 1]


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
