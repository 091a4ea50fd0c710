"""What the network carries in one iteration, by phase; pure.

Ring algorithms are counted, in which every process sends as many bytes as it receives and no algorithm sends fewer (Patarasuk
and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; arXiv 1910.02054, section 7, for ZeRO).
What is left out: flags and sums of a few bytes, padding of shares, and what travels once at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quartet.distributed import CUTTING
from quartet.memory.choices import Choices, Workload, torch_dtype
from quartet.memory.figures import PhaseTraffic
from quartet.memory.shapes import BackboneShape
from quartet.memory.sharding import FLOAT
from quartet.models.plan import BackboneSpec, SharingPlan
from quartet.rollout.static import PREFILL_TOKENS

EPISODE, TOKEN = 5, 22
"""Bytes of an episode that all processes get to know (score, stopped), and of each place in its response (token, two masks,
log-probability, reference log-probability, value)."""


def all_gather(whole: float, processes: int) -> float:
    """Bytes that each process sends, and receives: the N - 1 other shares pass through it, (N - 1) / N of the whole. A
    reduce-scatter takes as many."""
    return whole * (processes - 1) / processes


def all_reduce(whole: float, processes: int) -> float:
    """Bytes that each process sends, and receives: a reduce-scatter and an all-gather, 2 (N - 1) / N of the whole."""
    return 2 * all_gather(whole, processes)


@dataclass(frozen=True, slots=True)
class TravelBytes:
    """One backbone's weights as they travel, in bytes, adapters included."""

    layers: float
    outside: float
    """Embeddings, last norm, LM head."""
    head: float
    """The LM head, part of `outside`."""

    @property
    def whole(self) -> float:
        """Everything."""
        return self.layers + self.outside


def travel_bytes(spec: BackboneSpec, shape: BackboneShape, whole: int, choices: Choices) -> TravelBytes:
    """A backbone's weights as an engine sends them: fsdp2 in the computation's dtype, ZeRO-3 as they are held.

    Args:
        whole: numbers, adapters included.
    """
    width = torch_dtype(choices.dtype).itemsize
    held = choices.engine == "zero3"
    base, small = FLOAT if held and spec.trainable else width, FLOAT if held else width
    layers = (shape.parameters - shape.outside) * base + (whole - shape.parameters) * small
    return TravelBytes(layers, shape.outside * base, shape.count(shape.head) * base)


def traffic(
    plan: SharingPlan, choices: Choices, workload: Workload, backbones: Mapping[str, TravelBytes], trained: float
) -> tuple[PhaseTraffic, ...]:
    """Bytes that each process sends in an iteration, and receives.

    Args:
        backbones: by name.
        trained: bytes of the gradients of all that is trained.
    """
    processes = choices.world_size
    share = workload.batch_size * (EPISODE + TOKEN * workload.response_length)
    return (
        PhaseTraffic("rollout", all_gather(_rollout(plan, choices, workload, backbones), processes), 0, 0),
        PhaseTraffic(
            "scoring",
            all_gather(_scoring(plan, choices, workload, backbones), processes),
            0,
            all_gather(share, processes),
        ),
        _update(plan, choices, workload, backbones, trained),
    )


def _rollout(plan: SharingPlan, choices: Choices, workload: Workload, backbones: Mapping[str, TravelBytes]) -> float:
    """Weights that are gathered: all of them once, or for each forward pass those of the layers.

    Without gathering, every `batch_rows` prompts take a pass for each group of PREFILL_TOKENS tokens, and a pass for each
    token of a response but its first, which the prompt's pass gives. What fsdp2 holds throughout is what is outside of the
    layers, what ZeRO-3 holds is the LM head.
    """
    if choices.engine not in CUTTING:
        return 0
    policy = backbones[plan.view("policy").backbone]
    if choices.gather_for_rollout:
        return policy.whole
    passes, left = 0, workload.process_rows(choices.world_size)
    group = max(1, PREFILL_TOKENS // workload.longest_prompt)
    while left > 0:
        rows = min(left, choices.batch_rows)
        passes += -(-rows // group) + workload.response_length - 1
        left -= rows
    held = policy.outside if choices.engine == "fsdp2" else policy.head
    return held + passes * (policy.whole - held)


def _scoring(plan: SharingPlan, choices: Choices, workload: Workload, backbones: Mapping[str, TravelBytes]) -> float:
    """Weights that are gathered: those of reference, value and reward model once for each batch of `scoring_rows`."""
    if choices.engine not in CUTTING:
        return 0
    batches = -(-workload.process_rows(choices.world_size) // choices.scoring_rows)
    return batches * sum(backbones[plan.view(role).backbone].whole for role in ("reference", "value", "reward"))


def _update(
    plan: SharingPlan,
    choices: Choices,
    workload: Workload,
    backbones: Mapping[str, TravelBytes],
    trained: float,
) -> PhaseTraffic:
    """ddp: an all-reduce of the gradients for each optimizer step. zero2: an all-reduce for each microbatch (DeepSpeed keeps
    its share of the sum) and an all-gather of the moved weights for each step. zero3 and fsdp2: a reduce-scatter for each
    microbatch, and the weights gathered for its forward and for its backward pass; with gradient checkpointing ZeRO-3
    gathers the layers a third time, fsdp2 keeps what is outside of the layers from forward to backward.
    """
    n, steps = choices.world_size, workload.epochs * workload.minibatches
    rows = workload.minibatch_rows(n)
    passes = steps * -(-rows // min(rows, choices.microbatch_rows))
    if choices.engine == "ddp":
        return PhaseTraffic("update", 0, steps * all_reduce(trained, n), 0)
    if choices.engine == "zero2":
        return PhaseTraffic("update", steps * all_gather(trained, n), passes * all_reduce(trained, n), 0)
    if choices.engine not in CUTTING:
        return PhaseTraffic("update", 0, 0, 0)
    policy, value = plan.view("policy"), plan.view("value")
    used = [backbones[policy.backbone]]
    if (value.backbone, value.adapter) != (policy.backbone, policy.adapter):
        used.append(backbones[value.backbone])
    if choices.engine == "fsdp2":
        gathered = sum(2 * one.layers + one.outside for one in used)
    else:
        times = 3 if choices.checkpointing else 2
        gathered = sum(times * one.layers + 2 * one.outside for one in used)
    return PhaseTraffic("update", passes * all_gather(gathered, n), passes * all_gather(trained, n), 0)
