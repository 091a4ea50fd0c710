"""Counts the bytes of every tensor that comes and goes while code runs on fake tensors, which have shapes but no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quartet.errors import CheckpointError

ACTIVATIONS, GRADIENTS, LOGITS, CACHE = "activations", "gradients", "logits", "kv_cache"
SETUP = "setup"
"""Stage of what a run does not do at this moment, and which does not count."""
KINDS = (ACTIVATIONS, GRADIENTS, LOGITS, CACHE)
_DEVICE = torch.ops.prim.device.default
_LOOKED_UP = {torch.ops.aten._unsafe_view.default: torch.ops.aten.view.default}
"""Operations that do the same to shapes and storages as others, whose results torch keeps and looks up."""
_PRODUCTS = frozenset(
    ["aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise"]
)
Bytes = dict[str, float]
"""Bytes by kind of tensor."""


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions of a tensor but for those of one element, from the one with the widest steps to the narrowest."""
    return tuple(sorted((d for d in range(tensor.ndim) if tensor.shape[d] > 1), key=tensor.stride, reverse=True))


class NotTraceable(CheckpointError):
    """A family of models whose code does not run on shapes alone, so that its memory cannot be predicted."""


@dataclass
class _Storage:
    nbytes: int
    kind: str


class MemoryTrace(TorchDispatchMode):
    """Live bytes by kind, and their maximum within each labelled stretch of the code.

    A storage counts from the operation that makes it until nothing refers to it, as in a real allocator that wastes
    nothing. Buffers inside a kernel are not seen.
    """

    def __init__(self, known: Iterable[Tensor], *, vocabulary: int) -> None:
        """
        Args:
            known: tensors that exist already and are counted elsewhere (weights).
            vocabulary: tensors whose last dimension has this size are logits.
        """
        start: Any = super().__init__  # torch leaves it untyped
        start()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._vocabulary = vocabulary
        self._live: dict[int, _Storage] = {}
        self._ends: dict[int, object] = {}
        self._now: Bytes = dict.fromkeys(KINDS, 0)
        self._label = ""
        self.stage = ""
        """Prefix of the labels: forward or backward."""
        self.peaks: dict[str, Bytes] = {}
        self.highest = 0.0
        """Most live bytes since the last `restart`."""
        self.products: set[tuple[object, ...]] = set()
        """The different matrix products in bfloat16: operation, shapes and layouts. oneDNN compiles a kernel for each."""

    def enter(self, label: str) -> None:
        """Start a stretch of the code; its peak is kept under `stage label`."""
        self._label = f"{self.stage} {label}".strip()
        self._see()

    @property
    def total(self) -> float:
        """Live bytes now."""
        return sum(self._now.values())

    def restart(self) -> None:
        """Let `highest` speak of what comes from here on."""
        self.highest = self.total

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what kind some live tensors are."""
        for tensor in tensors:
            storage = self._live.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                self._now[storage.kind] -= storage.nbytes
                self._now[kind] += storage.nbytes
                storage.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        return self.count(func, args, lambda: func(*args, **(kwargs or {})))

    def count(self, func: Any, args: Any, run: Callable[[], Any]) -> Any:
        """What an operation, which `run` runs, returns; its tensors count from now on."""
        if func.name() == "mkldnn::_reorder_linear_weight":
            result = torch.empty_like(args[0])  # as large in oneDNN's own layout, of which fake tensors know nothing
        else:
            result = run()
        name = func._schema.name  # whatever its overload: with a tensor to write to, say
        if name in _PRODUCTS and self.stage != SETUP and args[0].dtype == torch.bfloat16:
            self.products.add((name, *((tuple(t.shape), _order(t)) for t in args if isinstance(t, Tensor))))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        kind = LOGITS if tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary else ACTIVATIONS
        self._live[key] = _Storage(storage.nbytes(), kind)
        self._now[kind] += storage.nbytes()
        self._ends[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._see()

    def _forget(self, key: int) -> None:
        del self._ends[key]
        storage = self._live.pop(key, None)
        if storage is not None:
            self._now[storage.kind] -= storage.nbytes

    def _see(self) -> None:
        total = self.total
        self.highest = max(self.highest, total)
        before = self.peaks.get(self._label)
        if before is None or total > sum(before.values()):
            self.peaks[self._label] = dict(self._now)


class FakeTensors(FakeTensorMode):
    """A mode in which tensors have shape, dtype and device but no data, and which lets a trace count them.

    A trace that is a mode of its own, on top of this one, would count the same and take longer: each operation would be
    dispatched to Python twice.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._trace: MemoryTrace | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping it from being compiled takes time at each operation

    @contextmanager
    def counted_by(self, trace: MemoryTrace) -> Iterator[None]:
        """Make and compute fake tensors in the block, and have them counted."""
        with self:
            self._trace = trace
            try:
                yield
            finally:
                self._trace = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on shapes; what it is made of inside does not count, as in a kernel."""
        if func is _DEVICE:  # more than half of all calls
            return args[0].fake_device
        func = _LOOKED_UP.get(func, func)
        trace, self._trace = self._trace, None
        try:
            if trace is None:
                return self.dispatch(func, types, args, kwargs or {})
            return trace.count(func, args, lambda: self.dispatch(func, types, args, kwargs or {}))
        finally:
            self._trace = trace


@dataclass
class LayerLabels:
    """Enters a label of a trace at each decoder layer, in the forward and in the backward pass, and where the gradient of the
    embeddings begins.

    Only the first and the last layer get labels of their own: from layer to layer the live bytes change by the same
    amount, so that the largest are at one of the two ends, and there they are linear in the number of layers.
    """

    trace: MemoryTrace
    handles: list[Any] = field(default_factory=list)

    def watch(self, layers: nn.ModuleList, name: Any, *, frozen: int = 0) -> None:
        """Label the layers of one transformer; `name()` says which role runs, the first `frozen` layers are a trunk."""
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            place = "first layer" if index == frozen else "last layer" if index == last else "middle layer"
            if index < frozen:
                place = "frozen layers"
            self.handles.append(layer.register_forward_pre_hook(self._forward(name, place)))
            self.handles.append(layer.register_forward_hook(self._backward(name, place)))
        self.handles.append(layers[0].register_forward_pre_hook(self._end(name), with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()

    def _forward(self, name: Any, place: str) -> Any:
        def hook(*_: Any) -> None:
            self.trace.enter(f"{name()} {place}")

        return hook

    def _backward(self, name: Any, place: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._when_known(output[0] if isinstance(output, tuple) else output, f"{name()} {place}")

        return hook

    def _end(self, name: Any) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._when_known(args[0] if args else kwargs.get("hidden_states"), f"{name()} embeddings")

        return hook

    def _when_known(self, states: Any, label: str) -> None:
        """Enter a label when the gradient of these states is known."""
        if isinstance(states, Tensor) and states.requires_grad:
            states.register_hook(lambda _: self.trace.enter(label))


def at_depth(small: Mapping[str, Bytes], larger: Sequence[tuple[Mapping[str, Bytes], float]]) -> dict[str, Bytes]:
    """Peaks at another depth, each label and kind along the lines through a small depth and larger ones.

    Args:
        small: peaks by label at the small depth.
        larger: those at larger depths, and how many times the way from the small depth to that one is to be gone.
    """
    found = {}
    for label, low in small.items():
        if "middle layer" in label or any(label not in large for large, _ in larger):
            continue
        found[label] = {
            kind: low[kind] + sum(times * (large[label][kind] - low[kind]) for large, times in larger) for kind in KINDS
        }
    return found


def largest(peaks: Mapping[str, Bytes]) -> tuple[str, Bytes]:
    """The label with most bytes and its bytes."""
    return max(peaks.items(), key=lambda item: sum(item[1].values()))


def vocabulary_of(model: nn.Module) -> int:
    """Rows of a model's input embeddings."""
    ask: Any = model.get_input_embeddings  # a method of transformers' models, which torch types as a tensor or module
    embeddings = ask()
    return int(embeddings.weight.shape[0]) if isinstance(embeddings, nn.Embedding) else -1
