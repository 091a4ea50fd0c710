"""What the phases of an iteration run, on fake tensors: the run's own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quartet.memory.choices import Choices, Workload
from quartet.memory.decoding import decoding
from quartet.memory.skeleton import PlannedSequences, tensors_of
from quartet.memory.trace import GRADIENTS, SETUP, MemoryTrace
from quartet.models.as_in_training import as_in_training
from quartet.models.converted import CONVERTED
from quartet.models.gradients import IN_PLACE
from quartet.models.lending import LENDER
from quartet.models.roles import Roles
from quartet.records import Sequences

TOGETHER = ("zero2", "zero3")
"""Engines under which policy and value are one module with one backward pass."""


def rollout(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    """Decoding, and the policy's pass over the responses where their log-probabilities are computed once more."""
    decoding(trace, roles, choices, workload)
    if workload.corrects:
        trace.stage = "correction"
        trace.enter("policy embeddings")
        plain = _scored(choices, workload)
        with torch.no_grad(), as_in_training():
            roles.policy(plain, plain.mask(), temperature=workload.temperature)


def _scored(choices: Choices, workload: Workload) -> PlannedSequences:
    """What passes without gradients compute at once."""
    rows = min(choices.scoring_rows, workload.together(choices.world_size))
    return PlannedSequences.of(rows, workload.longest, workload.response_length)


def scoring(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    """One microbatch through the roles, one after the other."""
    plain = _scored(choices, workload)
    mask = plain.mask()
    with torch.no_grad():
        trace.enter("trunk embeddings")
        sequences = replace(plain, trunks=roles.trunk_states(plain))
        trace.enter("reference embeddings")
        roles.reference(sequences, mask, temperature=workload.temperature)
        trace.enter("value embeddings")
        with as_in_training():
            roles.value(sequences, mask)
        trace.enter("reward embeddings")
        roles.reward.scores(sequences)


def update(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    """One microbatch, after others of its minibatch where there are several: their gradients are there then.

    Alone a process adds to the gradients that it has, those of the role whose turn has not come included. Engines let go of
    them all and get them anew, one role after the other.
    """
    count = workload.minibatch_rows(choices.world_size)
    rows = min(choices.microbatch_rows, count)
    trainable = [p for p in tensors_of(roles) if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], GRADIENTS)) for p in trainable]
    trace.stage = SETUP
    trace.enter("trunk")
    roles.trunk_states(PlannedSequences.of(1, 1, 1))  # scoring did, and what the layers return is known from then on
    one_pass = roles.trained.one_pass or choices.engine in TOGETHER
    alone = choices.engine == "none"
    if count > rows and (one_pass or alone):
        _have_gradients(trace, trainable)
    plain = PlannedSequences.of(rows, workload.longest, workload.response_length)
    keeps = alone and not choices.checkpointing
    with LENDER.keeping(), CONVERTED.keeping(keeps), IN_PLACE.added(alone):
        if one_pass:
            _pass(trace, roles, "both", plain, workload)
        elif choices.parallel_passes:
            _both(trace, roles, plain, workload)
        else:
            for role, backbone in (("policy", roles.policy.backbone), ("value", roles.value.backbone)):
                if count > rows and not alone:
                    own = {id(parameter) for parameter in backbone.model.parameters()}
                    _have_gradients(trace, [p for p in trainable if id(p) in own])
                _pass(trace, roles, role, plain, workload)
    for handle in handles:
        handle.remove()


def _have_gradients(trace: MemoryTrace, parameters: Sequence[Tensor]) -> None:
    """Earlier microbatches left the gradients of these, where there are none yet."""
    stage, trace.stage = trace.stage, SETUP
    trace.enter("gradients")
    new = [parameter for parameter in parameters if parameter.grad is None]
    for parameter in new:
        parameter.grad = torch.empty_like(parameter)
    trace.mark([p.grad for p in new if p.grad is not None], GRADIENTS)
    trace.stage = stage


def _pass(trace: MemoryTrace, roles: Roles, role: str, plain: PlannedSequences, workload: Workload) -> None:
    _backward(trace, role, _forward(trace, roles, role, plain, workload))


def _both(trace: MemoryTrace, roles: Roles, plain: PlannedSequences, workload: Workload) -> None:
    """Policy and value at the same time: the policy's passes beside all that the value's come to."""
    value = _forward(trace, roles, "value", plain, workload)
    kept = trace.total
    trace.restart()
    _backward(trace, "value", value, last=False)
    more = torch.empty(int(max(trace.highest - kept, 0)), dtype=torch.uint8)
    value = _forward(trace, roles, "value", plain, workload)
    _backward(trace, "policy", _forward(trace, roles, "policy", plain, workload), last=False)
    del more
    _backward(trace, "value", value)


def _forward(trace: MemoryTrace, roles: Roles, role: str, plain: PlannedSequences, workload: Workload) -> list[Tensor]:
    """The loss of a role; in a list, so that its graph can end with the backward pass."""
    trace.stage = "forward"
    trace.enter(f"{'policy' if role == 'both' else role} embeddings")
    view = roles.value if role == "value" else roles.policy
    trunks = _trunk_blocks(roles, len(plain.input_ids), plain.input_ids.shape[1])
    own = trunks if role == "both" else {name: block for name, block in trunks.items() if name == view.backbone.trunk}
    del trunks
    sequences = replace(plain, trunks=own)
    return [_loss(roles, role, sequences, plain.mask(), workload)]


def _backward(trace: MemoryTrace, role: str, loss: list[Tensor], *, last: bool = True) -> None:
    trace.stage = "backward"
    trace.enter(f"{'policy' if role == 'both' else role} start")
    loss.pop().backward()
    if last:
        CONVERTED.forget()


def _loss(roles: Roles, role: str, sequences: Sequences, mask: Tensor, workload: Workload) -> Tensor:
    """What the update takes the gradient of for a role, or for both in one pass."""
    trained = roles.trained
    wanted = {
        "temperature": workload.temperature,
        "with_entropy": True,
        "entropy_grad": workload.entropy_gradient,
    }
    if role == "value":
        return torch.as_tensor(trained.value(sequences, mask).sum())
    if role == "both":
        logprobs, entropy, values = trained(sequences, mask, mask, **wanted)
        loss = logprobs.sum() + values.sum()
    else:
        logprobs, entropy = trained.policy(sequences, mask, **wanted)
        loss = logprobs.sum()
    if workload.entropy_gradient and entropy is not None:
        loss = loss + entropy.sum()
    return torch.as_tensor(loss)


def _trunk_blocks(roles: Roles, rows: int, length: int) -> dict[str, Tensor]:
    """What `with_trunks` brings along."""
    found = {}
    for name, backbone in roles.backbones.items():
        if backbone.spec.frozen_layers:
            width = backbone.model.config.get_text_config().hidden_size
            found[name] = torch.empty((rows, length, width), dtype=backbone.dtype)
    return found


RUNS: dict[str, Callable[[MemoryTrace, Roles, Choices, Workload], None]] = {
    "rollout": rollout,
    "scoring": scoring,
    "update": update,
}
PHASES = tuple(RUNS)
