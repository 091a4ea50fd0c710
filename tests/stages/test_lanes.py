"""Policy and value at the same time: the same numbers, each on its share of the threads."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from pipeline import Pipeline
from quartet.kernels.threads import threads_now
from quartet.models.attention import one_sequence_a_row
from quartet.models.lending import LENDER, Lender
from quartet.stages.lanes import Lanes
from quartet.stages.passes import Losses
from quartet.stages.update import Updater
from stages_batch import batch_of
from tiny import TinyRun

SECONDS = 20


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


def meeting(barrier: threading.Barrier) -> Callable[[], tuple[int, int]]:
    """A job that ends only when another has come to the same point."""

    def job() -> tuple[int, int]:
        barrier.wait(SECONDS)
        return threading.get_ident(), torch.get_num_threads()

    return job


@pytest.mark.usefixtures("two_threads")
def test_jobs_run_at_the_same_time_on_their_share() -> None:
    lanes, barrier = Lanes(2), threading.Barrier(2)
    with lanes.open():
        for _ in range(2):  # in the same threads again
            (first, share), (second, other) = lanes.run([meeting(barrier)] * 2)
            assert first == threading.get_ident() != second
            assert share == other == 1
            assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_one_lane_is_the_thread_that_calls() -> None:
    lanes = Lanes(1)
    with lanes.open():
        assert lanes.run([torch.get_num_threads, threading.get_ident]) == [2, threading.get_ident()]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_waits_for_the_other_job(failing: int) -> None:
    ended = threading.Event()
    failed = threading.Event()

    def fails() -> None:
        failed.set()
        raise ValueError("in a lane")

    def goes_on() -> None:
        assert failed.wait(SECONDS)
        time.sleep(0.2)
        ended.set()

    jobs = [fails, goes_on] if failing == 0 else [goes_on, fails]
    lanes = Lanes(2)
    with lanes.open():
        with pytest.raises(ValueError, match="in a lane"):
            lanes.run(jobs)
        assert ended.is_set()
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("failing", [0, 1])
def test_the_other_job_is_left_when_it_asks(failing: int) -> None:
    lanes, rounds = Lanes(2), 0

    def fails() -> None:
        raise ValueError("in a lane")

    def asks() -> None:
        nonlocal rounds
        for _ in range(int(SECONDS / 0.01)):
            rounds += 1
            lanes.go_on()
            time.sleep(0.01)

    with lanes.open():
        with pytest.raises(ValueError, match="in a lane"):
            lanes.run([fails, asks] if failing == 0 else [asks, fails])
        assert rounds < SECONDS / 0.01 / 2
        assert lanes.run([lanes.go_on, lanes.go_on]) == [None, None]  # nothing of it is left


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("failing", [0, 1])
def test_memory_of_a_failed_job_is_free_once_its_error_is_dropped(failing: int) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def fails() -> None:
        large = torch.empty(1000)
        kept.append(weakref.ref(large))
        raise MemoryError(f"beside {large.numel()} numbers")

    lanes = Lanes(2)
    with lanes.open():
        gc.collect()
        gc.disable()  # a cycle would live until the collector comes by
        try:
            with contextlib.suppress(MemoryError):
                lanes.run([fails, lambda: None] if failing == 0 else [lambda: None, fails])
            assert kept[0]() is None
        finally:
            gc.enable()


@pytest.mark.usefixtures("two_threads")
def test_all_threads_are_shared_out() -> None:
    torch.set_num_threads(5)
    lanes = Lanes(2)
    with lanes.open():
        assert lanes.run([torch.get_num_threads] * 2) == [3, 2]
    assert torch.get_num_threads() == 5


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("first", [0, 1])
def test_kernels_of_the_job_that_is_left_take_the_threads_of_the_other(first: int) -> None:
    """And torch's operations do not, whose numbers may depend on it."""
    torch.set_num_threads(5)
    begun = threading.Event()

    def leaves() -> list[int]:
        assert begun.wait(SECONDS)
        return []

    def stays() -> list[int]:
        own, seen = torch.get_num_threads(), [threads_now()]
        begun.set()
        for _ in range(int(SECONDS / 0.01)):
            if threads_now() > own:
                break
            time.sleep(0.01)
        return [*seen, threads_now(), torch.get_num_threads()]

    lanes = Lanes(2)
    with lanes.open():
        for _ in range(2):  # nothing is left of the first time
            begun.clear()
            found = lanes.run([leaves, stays] if first == 0 else [stays, leaves])
            own = [3, 2][1 - first]
            assert found[1 - first] == [own, 5, own]
            assert threads_now() == 5


@pytest.mark.usefixtures("two_threads")
def test_threads_lend_nothing_to_each_other() -> None:
    lender, like = Lender(), torch.empty(0)

    def job() -> set[int]:
        taken = [lender.borrowed(like, 3, 3) for _ in range(4)]
        lender.given_back(*taken)
        return {tensor.untyped_storage().data_ptr() for tensor in taken}

    lanes = Lanes(2)
    with lender.keeping(), lanes.open():
        first = lanes.run([job, job])
        again = lanes.run([job, job])
        assert first == again
        assert not first[0] & first[1]
        lender.forget()
        assert lender._kept == {}


@pytest.mark.usefixtures("two_threads")
def test_transformers_is_told_until_the_last_thread_is_done() -> None:
    before, barrier = masking_utils.find_packed_sequence_indices, threading.Barrier(2)
    left = threading.Event()

    def leaves_first() -> bool:
        with one_sequence_a_row():
            barrier.wait(SECONDS)
        left.set()
        return True

    def leaves_last() -> bool:
        with one_sequence_a_row():
            barrier.wait(SECONDS)
            assert left.wait(SECONDS)
            return masking_utils.find_packed_sequence_indices is not before

    lanes = Lanes(2)
    with lanes.open():
        assert lanes.run([leaves_first, leaves_last]) == [True, True]
    assert masking_utils.find_packed_sequence_indices is before


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, bfloat16": {"models.dtype": "bfloat16"},
    "lora": {"models.lora": {"r": 4}, "models.sharing": "paired"},
    "lora, bfloat16": {"models.lora": {"r": 4}, "models.sharing": "paired", "models.dtype": "bfloat16"},
    "frozen layers": {"models.freeze_layers": 1},
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CASES)
def test_the_same_weights_and_metrics_bit_for_bit(
    tiny_run: TinyRun, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one after the other on one thread, which is what each has here."""
    several = {"rollout.batch_size": 8, "ppo.epochs": 2, "ppo.minibatches": 2, "ppo.microbatch_rows": 2}
    seen: set[int] = set()
    loss = Losses._value_loss

    def spy(self: Losses, *given: Any) -> Tensor:
        seen.add(threading.get_ident())
        return loss(self, *given)

    monkeypatch.setattr(Losses, "_value_loss", spy)

    def run(at_once: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        pipeline = Pipeline(tiny_run(**several, **CASES[name]))
        torch.set_num_threads(1)
        batch = batch_of(pipeline)
        torch.set_num_threads(2 if at_once else 1)
        return _updated(pipeline, pipeline.updater(at_once=at_once), batch)

    (expected, numbers), (found, others) = run(at_once=False), run(at_once=True)
    assert len(seen) == 2
    assert others == numbers
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def _updated(pipeline: Pipeline, updater: Updater, batch: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    before = pipeline.trained()
    metrics = updater.update(batch, iteration=1).metrics
    after = pipeline.trained()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert LENDER._kept is None
    return after, metrics
