"""The rollout on fake tensors: prompts into the cache, then the last step, when the cache is longest."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from quartet import kernels
from quartet.memory.choices import Choices, Workload
from quartet.memory.trace import CACHE, SETUP, MemoryTrace
from quartet.models.roles import Roles
from quartet.rollout.sampling import sample
from quartet.rollout.static import PREFILL_TOKENS
from quartet.rollout.static_cache import NotDrivable
from quartet.rollout.static_decoder import Decoder, generating, rounded


def decoding(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    """Run what the chosen engine runs; `auto` is the preallocated cache where it can drive the model.

    vLLM's own memory is not of this process: on a GPU it is the share that `rollout.vllm.gpu_memory_utilization` names.
    """
    with roles.policy.backbone.weights.whole() if choices.gather_for_rollout else nullcontext():
        _decoding(trace, roles, choices, workload)


def _decoding(trace: MemoryTrace, roles: Roles, choices: Choices, workload: Workload) -> None:
    rows = min(choices.batch_rows, workload.together(choices.world_size))
    if choices.rollout_engine == "vllm":
        trace.stage = "decoding"
        trace.enter("policy embeddings")
        torch.empty((rows, workload.response_length))  # what comes back
        return
    decoder = None
    if choices.rollout_engine != "dynamic":
        try:
            decoder = Decoder(roles.policy)
        except NotDrivable:
            decoder = None
    if decoder is None:
        with torch.no_grad(), roles.policy.active():
            _growing(trace, roles, workload, rows)
        return
    if choices.merge_adapters is True:
        trace.stage = "merging"
        trace.enter("policy embeddings")
    with generating(roles.policy, merged=choices.merge_adapters is True):
        _preallocated(trace, decoder, roles, workload, rows)


def _growing(trace: MemoryTrace, roles: Roles, workload: Workload, rows: int) -> None:
    trace.stage = "prompts"
    trace.enter("policy embeddings")
    _grow(trace, roles, workload, rows, workload.longest_prompt)
    trace.stage = SETUP
    trace.enter("cache")
    cache = _grow(trace, roles, workload, rows, workload.longest - 1)
    trace.stage = "decoding"
    trace.enter("policy embeddings")
    _grow(trace, roles, workload, rows, 1, cache, before=workload.longest - 1)


def _grow(
    trace: MemoryTrace, roles: Roles, workload: Workload, rows: int, tokens: int, cache: Any = None, *, before: int = 0
) -> Any:
    backbone = roles.policy.backbone
    cache = cache if cache is not None else DynamicCache(config=backbone.model.config)
    arguments: dict[str, Any] = {
        "input_ids": torch.empty((rows, tokens), dtype=torch.int64),
        "attention_mask": torch.empty((rows, before + tokens), dtype=torch.int64),
        "past_key_values": cache,
        "use_cache": True,
    }
    if "position_ids" in inspect.signature(backbone.transformer.forward).parameters:
        arguments["position_ids"] = torch.empty((rows, tokens), dtype=torch.int64)
    hidden = backbone.transformer(**arguments).last_hidden_state
    _mark(trace, cache)
    _draw(roles, hidden[:, -1], workload)
    return cache


def _preallocated(trace: MemoryTrace, decoder: Decoder, roles: Roles, workload: Workload, rows: int) -> None:
    cache = decoder.new_cache(rows, workload.longest)
    group = max(1, min(rows, PREFILL_TOKENS // workload.longest_prompt))
    trace.stage = SETUP
    trace.enter("cache")
    _prefill(decoder, cache, roles, group, workload)  # shapes that come again: what was found for them is looked up
    _mark(trace, cache)
    trace.stage = "prompts"
    trace.enter("policy embeddings")
    _prefill(decoder, cache, roles, group, workload)
    trace.stage = "decoding"
    trace.enter("policy embeddings")
    counts = torch.empty(rows, dtype=torch.int64)
    products = set(trace.products)
    _draw(roles, decoder.step(cache, counts, counts.clone(), rounded(workload.longest)), workload)
    if rows <= kernels.FEW and kernels.decodes(roles.policy.backbone.dtype):
        trace.products = products  # few rows are not multiplied by oneDNN, and leave none of its kernels


def _prefill(decoder: Decoder, cache: Any, roles: Roles, rows: int, workload: Workload) -> None:
    ids = torch.empty((rows, workload.longest_prompt), dtype=torch.int64)
    _draw(roles, decoder.prefill(cache, 0, ids, torch.empty(rows, dtype=torch.int64)), workload)


def _draw(roles: Roles, hidden: Tensor, workload: Workload) -> None:
    uniform = torch.empty(len(hidden), dtype=torch.float64)
    sample(roles.policy.head(hidden), uniform, temperature=workload.temperature, top_p=workload.top_p)


def _mark(trace: MemoryTrace, cache: Any) -> None:
    trace.mark([t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None], CACHE)
