"""What the processes of the tests do; importable by them."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from quartet.distributed import BackboneWeights, WeightKeeper, choose, stage3, stage3_hooks, stage3_weights
from quartet.distributed.deepspeed_setup import import_deepspeed
from quartet.distributed.fsdp2 import FullyShardedDataParallel
from quartet.distributed.zero3 import Zero3, Zero3Weights
from quartet.models.offload import refuse_unmovable
from quartet.run import setup
from quartet.run.progress import Progress
from quartet.trainer import resume, train


def train_run(values: dict[str, Any]) -> str:
    """A whole run."""
    return str(train(values))


def resume_run(run: str) -> str:
    """The rest of a run."""
    return str(resume(run))


class Killed(Progress):
    """Kills its process, as the system does where memory runs out, when iteration 2 begins its update; `when` then holds
    the time."""

    def __init__(self, when: Path) -> None:
        super().__init__()
        self._when = when
        self._rollouts = 0

    def stage(self, name: str) -> None:
        self._rollouts += name == "rollout"
        if self._rollouts == 2 and name == "update":
            self._when.write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(values: dict[str, Any], when: Path) -> str:
    """A run whose last process dies."""
    return str(train(values, progress=Killed(when) if os.environ["RANK"] == "1" else None))


def train_with_own(values: dict[str, Any], key: str, own: list[Any]) -> str:
    """A run whose processes differ in one key of a section."""
    section, name = key.split(".")
    mine = {**values, section: {**values.get(section, {}), name: own[int(os.environ["RANK"])]}}
    return str(train(mine))


def train_without_deepspeed(values: dict[str, Any], lacking: list[int]) -> str:
    """A run where some processes' machines lack DeepSpeed."""
    if int(os.environ["RANK"]) in lacking:
        choose.find_spec = lambda name: None  # type: ignore[assignment, attr-defined]
    return str(train(values))


def train_on_machines(values: dict[str, Any], folders: list[Path]) -> str:
    """A run whose processes are each the only one of their machine, and work in folders of their own."""
    os.environ["LOCAL_RANK"] = "0"
    return train_in_folder(values, folders)


def train_in_folder(values: dict[str, Any], folders: list[Path]) -> str:
    """A run whose processes work in folders of their own."""
    os.chdir(folders[int(os.environ["RANK"])])
    return str(train(values))


FUNCTIONS = (stage3_hooks.FETCH, stage3_hooks.RELEASE)


def different_hooks(model: torch.nn.Module) -> int:
    """How many functions DeepSpeed's hooks on the modules inside of a model are."""
    inside = [module for module in model.modules() if module is not model]
    here = [(*module._forward_pre_hooks.values(), *module._forward_hooks.values()) for module in inside]
    return len({id(hook) for hooks in here for hook in hooks if hook.__module__.startswith("deepspeed")})


def train_watching_stage3(values: dict[str, Any], *, known: bool) -> dict[str, Any]:
    """A run under zero3; what its set-up made, and what is there after the first backward pass.

    Args:
        known: whether DeepSpeed's set-up is taken for the one that is known.
    """
    found: dict[str, Any] = {"said": [], "cut into place": []}
    prepare, backward, hold, join = Zero3.prepare, Zero3.backward, Zero3Weights.whole, stage3_weights.joined

    def prepared(self: Zero3, *arguments: Any) -> Any:
        result = prepare(self, *arguments)
        found["whole in set-up"] = gathered.copy()
        cut = sorted(result.module.parameters(), key=lambda p: p.ds_id)
        found["cut"] = [(p.requires_grad, p.ds_numel) for p in cut]
        zero = self._engine.optimizer
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
        found["shared"] = all(master.data_ptr() == weights.data_ptr() for master, weights in pairs)
        found["gradients at first"] = not zero.grad_partitions_flat_buffer.is_meta
        found["device"] = zero.device
        bare = [m for m in result.module.modules() if next(m.parameters(recurse=False), None) is None]
        found["hooks without weights"] = sum(len(module._forward_pre_hooks) for module in bare)
        functions = {name: [vars(m)[name] for m in result.module.modules() if name in vars(m)] for name in FUNCTIONS}
        found["hooks"], found["names"] = different_hooks(result.module), len(debug.module_names)
        of_weights = [
            function for p in result.module.parameters() for function in vars(p).values() if callable(function)
        ]
        found["functions"] = len({id(getattr(function, "__func__", function)) for function in of_weights})
        found["modules"] = min(len(those) for those in functions.values())
        found["classes"] = len(
            {of if isinstance(of, type) else type(of) for those in functions.values() for of in those}
        )
        return result

    def passed(self: Zero3, loss: Tensor, *, last: bool) -> None:
        backward(self, loss, last=last)
        zero = self._engine.optimizer
        flat, places = zero.grad_partitions_flat_buffer, getattr(zero, stage3.GRADIENTS)
        found.setdefault("gradients then", float(flat.abs().sum()))
        found.setdefault("in their places", sum(place.numel() for place in places.values()) == flat.numel())

    @contextmanager
    def whole(self: Zero3Weights) -> Iterator[None]:
        with hold(self):
            found["hooks when whole"] = different_hooks(self.hooks.module)
            yield
        found["hooks then"] = different_hooks(self.hooks.module)

    def joined(tensors: list[Tensor]) -> Tensor | None:
        flat = join(tensors)
        found["cut into place"].append(flat is not None)
        return flat

    from deepspeed.runtime.zero import Init
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import debug

    gathered: list[int] = []
    gather = Init._all_gather

    def gathering(self: Any, weights: Any, *arguments: Any, **options: Any) -> Any:
        gathered.extend(weight.ds_id for weight in weights)
        return gather(self, weights, *arguments, **options)

    Init._all_gather = gathering

    def counting(name: str) -> Any:
        function, key = getattr(DeepSpeedZeRoOffload, name), f"calls of {name}"
        found[key] = 0

        def counted(self: Any, module: Any) -> Any:
            found[key] += next(module.parameters(recurse=False), None) is not None
            return function(self, module)

        return counted

    for name in ("pre_sub_module_backward_function", "post_sub_module_backward_function"):
        setattr(DeepSpeedZeRoOffload, name, counting(name))
    handler = logging.Handler()
    handler.emit = lambda record: found["said"].append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("quartet").addHandler(handler)
    Zero3.prepare, Zero3.backward = prepared, passed  # type: ignore[method-assign, assignment]
    Zero3Weights.whole = whole  # type: ignore[method-assign, assignment]
    stage3_weights.joined = joined
    if not known:
        stage3.USED[stage3.SETUP].add("what no DeepSpeed has")
    train(values)
    return found


def exported(run: Path) -> dict[str, Tensor]:
    """All weights of policy/ and value/."""
    found = {}
    for role in ("policy", "value"):
        for file in sorted((run / role).glob("*.safetensors")):
            found |= {f"{role}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all weights."""
    assert one
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether any weight differs."""
    return any(not torch.equal(one[name], other[name]) for name in one)


def count_bytes_sent(values: dict[str, Any]) -> dict[str, float]:
    """Bytes that each of two processes sends in the first iteration's stages for weights and for gradients."""
    counter = Collectives()
    train(values, progress=counter)
    return counter.sent


class Collectives(Progress):
    """Counts what the collective operations carry from the first rollout to the end of its update.

    By a ring of N processes an all-gather or reduce-scatter of b bytes sends (N - 1) / N b, an all-reduce twice as many.
    Small sums (flags, norms, metrics) and the gathering of episodes are left out by their size and operation.
    """

    SMALL = 1024

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"weights": 0.0, "gradients": 0.0}
        self._on = False
        self._patch("all_gather_single", "all_gather_into_tensor", kind="weights", whole=0, times=0.5)
        self._patch("reduce_scatter_single", "reduce_scatter_tensor", kind="gradients", whole=1, times=0.5)
        self._patch("all_reduce", kind="gradients", whole=0, times=1.0)

    def stage(self, name: str) -> None:
        self._on = name in ("rollout", "scoring", "update")

    def iteration(self, record: Any) -> None:
        self._on = False

    def _patch(self, *names: str, kind: str, whole: int, times: float) -> None:
        for name in names:
            original = getattr(dist, name, None)
            if original is not None:
                setattr(dist, name, self._counted(original, kind, whole, times))

    def _counted(self, original: Any, kind: str, whole: int, times: float) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
            size = max(tensor.nbytes for tensor in tensors) if whole else tensors[0].nbytes
            if self._on and size >= self.SMALL:
                self.sent[kind] += times * size
            return original(*arguments, **options)

        return call


def train_offloaded(values: dict[str, Any]) -> dict[str, bool]:
    """A run under `models.offload: cpu` whose models are taken to be on a GPU; by backbone, whether its shares rest in host
    memory."""
    found: dict[str, bool] = {}
    keep, keep3, deepspeed = FullyShardedDataParallel.keep, Zero3.keep, import_deepspeed(torch.device("cpu"))
    owners: dict[Tensor, str] = {}

    def kept(self: FullyShardedDataParallel, weights: BackboneWeights) -> WeightKeeper:
        keeper, backbone = keep(self, weights), cast(Any, weights.module)
        states = [module._get_fsdp_state() for module in backbone.modules() if isinstance(module, FSDPModule)]
        groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
        (found[backbone.spec.name],) = {parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params}
        return keeper

    def kept3(self: Zero3, weights: BackboneWeights) -> WeightKeeper:
        name = cast(Any, weights.module).spec.name
        owners.update(dict.fromkeys(weights.module.parameters(), name))
        return keep3(self, weights)

    class Cut(deepspeed.zero.Init):  # type: ignore[misc, name-defined]
        """What lays the shares out."""

        def __init__(self, *, module: Any, **options: Any) -> None:
            super().__init__(module=module, **options)
            for weight in owners.keys() & set(module._weights):
                # A place of DeepSpeed's own, where it is not the device.
                found[owners[weight]] = self.remote_device == "cpu"

    FullyShardedDataParallel.keep, Zero3.keep, deepspeed.zero.Init = kept, kept3, Cut  # type: ignore[method-assign]
    cuda = torch.device("cuda")
    setup.refuse_unmovable = lambda models, plan, _, cut: refuse_unmovable(models, plan, cuda, cut=cut)  # type: ignore[assignment]
    train(values)
    return found
