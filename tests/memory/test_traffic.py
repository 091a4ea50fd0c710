"""Bytes that the network carries: by hand for small sizes, and counted in runs of two processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.runs import count_bytes_sent
from pipeline import Pipeline
from processes import results
from quartet.memory.choices import Choices, Workload, choices_of, workload_of
from quartet.memory.estimate import Estimator
from quartet.memory.traffic import TravelBytes, all_gather, all_reduce, traffic
from quartet.models.plan import Source, make_plan

LM, CLASSIFIER = TravelBytes(layers=1000, outside=300, head=100), TravelBytes(layers=1000, outside=200, head=0)
BACKBONES = {"policy": LM, "reference": LM, "value": CLASSIFIER, "reward": CLASSIFIER}
WORKLOAD = Workload(10, 6, 16, 2, 3, False, 1.0, 1.0)
"""Two minibatches of 8 episodes in each of 3 epochs: 6 steps."""


def carried(engine: str, processes: int = 4, **changes: Any) -> dict[str, tuple[float, float, float]]:
    plan = make_plan(
        "separate", lora=False, sft=Source("a", None), reward=Source("b", None), bases_equal=False, freeze_layers=0
    )
    choices = Choices("separate", None, "float32", False, 1, 2, world_size=processes, engine=engine)
    found = traffic(plan, replace(choices, **changes), WORKLOAD, BACKBONES, 2400)
    return {one.phase: (one.weights, one.gradients, one.episodes) for one in found}


def test_rings() -> None:
    # Four processes: three of the four shares go through each, once or twice.
    assert (all_gather(400, 4), all_reduce(400, 4)) == (300, 600)
    assert (all_gather(400, 1), all_reduce(400, 1)) == (0, 0)


def test_by_hand() -> None:
    # 16 episodes of 5 bytes and 6 places of 22: 2192, three quarters of it.
    episodes = 1644.0
    assert carried("ddp") == {"rollout": (0, 0, 0), "scoring": (0, 0, episodes), "update": (0, 6 * 2 * 1800, 0)}
    # Two episodes a process and minibatch: two microbatches of one.
    assert carried("zero2")["update"] == (6 * 1800, 12 * 2 * 1800, 0)
    # Four episodes a process in batches of two: 2 * (1300 + 1200 + 1200).
    assert carried("zero3")["scoring"] == carried("fsdp2")["scoring"] == (0.75 * 7400, 0, episodes)
    assert carried("zero3")["update"] == (12 * 0.75 * 2 * (1300 + 1200), 12 * 1800, 0)
    assert carried("zero3", checkpointing=True)["update"][0] == 12 * 0.75 * (2 * 2500 + 2000)
    assert carried("fsdp2")["update"] == (12 * 0.75 * (2 * 2000 + 500), 12 * 1800, 0)
    assert carried("fsdp2", gather_for_rollout=True)["rollout"] == (975, 0, 0)
    # Two batches of one pass over the prompts and five steps.
    assert carried("fsdp2")["rollout"] == (0.75 * (300 + 12 * 1000), 0, 0)
    assert carried("zero3")["rollout"] == (0.75 * (100 + 12 * 1200), 0, 0)
    assert carried("none", 1)["update"] == (0, 0, 0)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_as_counted_in_two_processes(engine: str, tiny_run: Any, tmp_path: Path) -> None:
    """The collectives of one iteration: gradients and weights are all that is large in them."""
    values = tiny_run(**{"distributed.engine": engine, "rollout.stop": None, "rollout.batch_size": 8})
    pipeline = Pipeline({**values, "distributed": {}})
    estimator = Estimator(
        pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config, 5), torch.device("cpu")
    )
    choices = choices_of(pipeline.config, torch.device("cpu"), world_size=2, engine=engine)
    predicted = estimator.estimate(pipeline.inputs.plan, choices).traffic
    counted = results(tmp_path / "results", 2, count_bytes_sent, values)
    weights, gradients = (sum(getattr(one, kind) for one in predicted) for kind in ("weights", "gradients"))
    for own in counted:
        assert own["gradients"] == pytest.approx(gradients, rel=0.01)
        # The first backward pass of an iteration may fetch a layer ahead that is not the next.
        assert own["weights"] == pytest.approx(weights, rel=0.02)
