"""What libraries take for themselves on a CPU, as measured by benchmarks/memory_plan.py and benchmarks/scaling.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from quartet.distributed import CUTTING
from quartet.kernels import decodes
from quartet.memory.adapter_sizes import TensorSizes
from quartet.memory.choices import Choices, Workload, torch_dtype
from quartet.memory.figures import RoleBytes
from quartet.memory.shapes import BackboneShape
from quartet.models.cache import largest_to_convert
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.plan import BackboneSpec, SharingPlan

LIBRARIES = 22 * 2**20
"""On a CPU: anonymous memory that libraries take on first use and keep (packing buffers of MKL and oneDNN, model code
imported at loading), with one thread. Measured at 14 to 35 MiB with models of 15 to 110 million parameters; see
benchmarks/memory_plan.py."""
FEW_ROWS = {"float32": 7 * 2**20, "bfloat16": 5 * 2**20}
"""The part of that, and of `IN_BFLOAT16`, which oneDNN takes for products of few rows: not there where compiled kernels decode,
as measured there; runs with a process engine and quantized layers keep it."""
WITH_QUANTIZATION = {"4bit": 16 * 2**20, "torchao-int8": 14 * 2**20}
"""The same where frozen layers are quantized, as measured there; 8 bit keeps as much as float32."""
SECOND_THREAD = 8 * 2**20
"""What is kept beside that with two threads: 2 to 11 MiB there; four threads on two cores keep as much as two. More cores were
not measured."""
WITH_ENGINE = 7 * 2**20
"""On a CPU, what a run with a process engine keeps beyond `LIBRARIES` by its third iteration: 7 to 14 MiB with LoRA, full
fine-tuning less, in benchmarks/scaling.py. It depends little on the engine and the number of processes, and a run of that
benchmark without an engine keeps as much; the two iterations of benchmarks/memory_plan.py, with prompts of one length, do
not."""
IN_BFLOAT16 = 8 * 2**20
"""In place of `LIBRARIES` where oneDNN multiplies in bfloat16, beside the model code of loading and the compiled kernels."""
KERNEL = 600 * 2**10
"""On a CPU: what oneDNN keeps for one matrix product in bfloat16 of one shape (the compiled kernel and its buffers)."""
KERNELS = 1024
"""Kernels that oneDNN keeps (ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
PROMPT_LENGTHS = 2
"""Lengths to which the prompts of a rollout are padded, in a batch whose longest is up to twice as long as its shortest."""
AT_LOAD = int(2.2 * 2**20)
"""The part of `LIBRARIES` that loading brings in: model code that is imported."""
ADAPTERS_AT_LOAD = int(0.8 * 2**20)
"""The same of PEFT's."""
MODULES = 6 * 2**10
"""Bytes of a weight's share in the Python objects of a model: modules, their dictionaries, hooks."""
ADAPTER_MODULES = 12 * 2**10
"""The same for a tensor of an adapter, which has more objects around it."""
QUANTIZING = {"4bit": 5.6}
"""Bytes a weight while bitsandbytes quantizes it on a CPU, one layer after the other."""


def libraries_at_load(
    plan: SharingPlan,
    roles: Iterable[RoleBytes],
    shapes: Sequence[BackboneShape],
    quantization: str | None,
    objects: float,
    converting: float,
) -> float:
    """Bytes at the peak of loading beside weights and adapters: an adapter's file is read beside the adapter that it fills.

    Args:
        shapes: of all backbones.
        objects: `model_objects`.
        converting: while frozen checkpoints are converted, which happens among the loading of the others.
    """
    specs = [adapter for spec in plan.backbones for adapter in spec.adapters]
    read = {adapter.name for adapter in specs if adapter.source is not None}
    fills: set[str] = {view.role for view in plan.views if view.adapter is not None and view.adapter in read}
    largest = max((role.adapters for role in roles if role.role in fills), default=0)
    quantizing = 0.0
    if quantization is not None:
        layer = max((math.prod(shape.tensors[name]) for shape in shapes for name in shape.linear), default=0)
        quantizing = layer * QUANTIZING.get(quantization, 0.0)
    imported = AT_LOAD + ADAPTERS_AT_LOAD * bool(specs)
    return imported + max(objects + max(largest, quantizing), converting)


def model_objects(shapes: Iterable[BackboneShape], adapters: Iterable[TensorSizes]) -> int:
    """Bytes of the Python objects of all backbones, and of all adapters on them."""
    objects = MODULES * sum(len(shape.tensors) for shape in shapes)
    return objects + ADAPTER_MODULES * sum(tensors for sizes in adapters for _, tensors in sizes.counts)


def converting(plan: SharingPlan, choices: Choices, info_of: Callable[[BackboneSpec], CheckpointInfo]) -> int:
    """Bytes on a CPU while frozen checkpoints are converted, one tensor after the other; 0 where the cache has their copies."""
    if choices.quantization is not None or choices.engine in CUTTING:
        return 0
    frozen = [spec for spec in plan.backbones if not spec.trainable and spec.top_of is None]
    dtype = torch_dtype(choices.dtype)
    return max((largest_to_convert(info_of(spec), dtype) for spec in frozen), default=0)


def libraries_in_phases(choices: Choices, objects: float) -> float:
    """Bytes that libraries keep in the phases after loading, without kernels.

    Args:
        objects: `model_objects`.
    """
    # A launcher of several processes gives each one thread.
    threads = SECOND_THREAD * (choices.engine == "none" and torch.get_num_threads() > 1)
    kept = WITH_QUANTIZATION.get(choices.quantization or "", LIBRARIES) + threads
    if choices.dtype == "bfloat16" and choices.quantization is None:
        kept = AT_LOAD + ADAPTERS_AT_LOAD * (choices.lora is not None) + int(objects) + IN_BFLOAT16
    if choices.engine == "none" and choices.quantization is None and decodes(torch_dtype(choices.dtype)):
        kept -= FEW_ROWS[choices.dtype]
    return kept + WITH_ENGINE * (choices.engine != "none")


def kernels(products: Mapping[str, int], choices: Choices, workload: Workload) -> float:
    """Bytes of the kernels for bfloat16 that the phases leave compiled on a CPU.

    Args:
        products: different matrix products of a batch in each phase. Each batch has a width of its own, and so have its
            products' shapes; prompts of a rollout are read in groups of several lengths.
    """
    if choices.dtype != "bfloat16":
        return 0
    rows, step = workload.process_rows(choices.world_size), workload.minibatch_rows(choices.world_size)
    batches = {
        "rollout": PROMPT_LENGTHS,
        "scoring": -(-rows // choices.scoring_rows),
        "update": -(-rows // min(choices.microbatch_rows, step)),
    }
    return KERNEL * min(sum(batches[name] * count for name, count in products.items()), KERNELS)
