"""The sharing plan: which role is which view of which backbone. Pure data, decided before a weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from quartet.errors import ConfigError

Role = Literal["policy", "reference", "value", "reward"]
ROLES: tuple[Role, ...] = ("policy", "reference", "value", "reward")
PlanName = Literal["separate", "paired", "single"]
Task = Literal["language_model", "classifier"]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A LoRA adapter on a backbone."""

    name: str
    trainable: bool
    source: str | None
    """Adapter checkpoint it is read from (frozen) or starts from (trainable); None starts as the identity."""


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """One set of transformer weights in memory."""

    name: str
    checkpoint: str
    """Folder or Hub id of the full weights."""
    task: Task
    """Class it is loaded with: AutoModelForCausalLM or AutoModelForSequenceClassification."""
    trainable: bool
    """Whether the backbone's own weights are trained (full fine-tuning)."""
    adapters: tuple[AdapterSpec, ...] = ()
    merged_adapter: str | None = None
    """Adapter checkpoint that is added into the weights at loading (full fine-tuning from an adapter)."""
    frozen_layers: int = 0
    """Layers at the bottom that are frozen and shared with the backbone whose `top_of` names this one."""
    top_of: str | None = None
    """Backbone whose frozen bottom this one shares; only the layers above are its own."""

    @property
    def learns(self) -> bool:
        """Whether anything in it is trained: its own weights, or an adapter on them."""
        return self.trainable or any(adapter.trainable for adapter in self.adapters)


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """A role: a backbone, an adapter state and a head."""

    role: Role
    backbone: str
    adapter: str | None
    """Adapter that is on; None runs the backbone bare."""
    head: Literal["lm", "score", "value"]
    trainable: bool


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """The whole decision."""

    name: PlanName
    backbones: tuple[BackboneSpec, ...]
    views: tuple[ViewSpec, ...]

    def view(self, role: Role) -> ViewSpec:
        """The view of a role."""
        return next(view for view in self.views if view.role == role)

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Source:
    """What the plan needs to know of a checkpoint: full weights, and an adapter on them or None."""

    base: str
    adapter: str | None


def make_plan(
    sharing: str,
    *,
    lora: bool,
    sft: Source,
    reward: Source,
    bases_equal: bool,
    freeze_layers: int = 0,
    value_on_policy: bool = False,
) -> SharingPlan:
    """Choose and lay out the sharing plan.

    Args:
        sharing: auto, separate, paired or single.
        lora: whether policy and value are trained as LoRA adapters.
        bases_equal: whether both checkpoints rest on the same full weights.
        freeze_layers: layers at the bottom that policy and reference share frozen, value and reward model likewise
            (full fine-tuning only).
        value_on_policy: the value is a head on the policy's own states, without a backbone or adapter for itself.

    Raises:
        ConfigError: `single` asked for where the reward checkpoint is no adapter over the SFT checkpoint's base.
    """
    single_possible = reward.adapter is not None and bases_equal
    if sharing == "auto":
        sharing = "separate" if not lora else "single" if single_possible else "paired"
    if sharing == "single":
        if not single_possible:
            why = (
                "is a full checkpoint"
                if reward.adapter is None
                else "is an adapter over other weights or another configuration of them"
            )
            raise ConfigError(
                f"models.sharing=single needs a reward checkpoint that is a LoRA adapter over the SFT checkpoint's base, "
                f"and {reward.adapter or reward.base!r} {why}; use models.sharing=paired"
            )
        plan = _single(sft, reward)
        return _with_value_on_policy(plan) if value_on_policy else plan
    plan = _paired(sft, reward) if sharing == "paired" else _separate(sft, reward, lora, freeze_layers)
    return _with_value_on_policy(plan) if value_on_policy else plan


def _single(sft: Source, reward: Source) -> SharingPlan:
    adapters = [AdapterSpec("reward", False, reward.adapter)]
    if sft.adapter:
        adapters.insert(0, AdapterSpec("sft", False, sft.adapter))
    adapters += [AdapterSpec("policy", True, sft.adapter), AdapterSpec("value", True, reward.adapter)]
    return SharingPlan(
        "single",
        (BackboneSpec("base", sft.base, "language_model", False, tuple(adapters)),),
        (
            ViewSpec("policy", "base", "policy", "lm", True),
            ViewSpec("reference", "base", "sft" if sft.adapter else None, "lm", False),
            ViewSpec("value", "base", "value", "value", True),
            ViewSpec("reward", "base", "reward", "score", False),
        ),
    )


def _paired(sft: Source, reward: Source) -> SharingPlan:
    def adapters(start: str | None, frozen: str, trained: str) -> tuple[AdapterSpec, ...]:
        own = AdapterSpec(trained, True, start)
        return (AdapterSpec(frozen, False, start), own) if start else (own,)

    return SharingPlan(
        "paired",
        (
            BackboneSpec("sft", sft.base, "language_model", False, adapters(sft.adapter, "sft", "policy")),
            BackboneSpec("reward", reward.base, "classifier", False, adapters(reward.adapter, "reward", "value")),
        ),
        (
            ViewSpec("policy", "sft", "policy", "lm", True),
            ViewSpec("reference", "sft", "sft" if sft.adapter else None, "lm", False),
            ViewSpec("value", "reward", "value", "value", True),
            ViewSpec("reward", "reward", "reward" if reward.adapter else None, "score", False),
        ),
    )


def _with_value_on_policy(plan: SharingPlan) -> SharingPlan:
    """The same plan without the value's backbone or adapter."""
    policy, old = plan.view("policy"), plan.view("value")
    value = ViewSpec("value", policy.backbone, policy.adapter, "value", True)
    backbones = []
    for spec in plan.backbones:
        if spec.name == "value":
            continue
        kept = tuple(adapter for adapter in spec.adapters if adapter.name != "value" or old.adapter != "value")
        if spec.top_of == "value":  # with a bottom of its own it is a frozen backbone as any other
            on = (AdapterSpec("reward", False, spec.merged_adapter),) if spec.merged_adapter else ()
            spec, kept = replace(spec, top_of=None, merged_adapter=None), on
        backbones.append(replace(spec, adapters=kept))
    own = {adapter.name for spec in backbones for adapter in spec.adapters}
    views = [
        replace(v, adapter=v.role) if v.role == v.backbone == "reward" and "reward" in own else v for v in plan.views
    ]
    return SharingPlan(plan.name, tuple(backbones), tuple(value if view.role == "value" else view for view in views))


def _separate(sft: Source, reward: Source, lora: bool, freeze_layers: int) -> SharingPlan:
    def trained(role: Role, source: Source, task: Task) -> BackboneSpec:
        if lora:
            return BackboneSpec(role, source.base, task, False, (AdapterSpec(role, True, source.adapter),))
        return BackboneSpec(role, source.base, task, True, (), source.adapter, freeze_layers)

    def frozen(role: Role, source: Source, task: Task, twin: Role) -> BackboneSpec:
        if freeze_layers:
            return BackboneSpec(role, source.base, task, False, (), source.adapter, top_of=twin)
        on = (AdapterSpec(role, False, source.adapter),) if source.adapter else ()
        return BackboneSpec(role, source.base, task, False, on)

    def view(role: Role, source: Source, head: Literal["lm", "score"]) -> ViewSpec:
        # Twins of trained backbones copy weights that the adapter was added into already.
        return ViewSpec(role, role, role if source.adapter and not freeze_layers else None, head, False)

    return SharingPlan(
        "separate",
        (
            trained("policy", sft, "language_model"),
            frozen("reference", sft, "language_model", "policy"),
            trained("value", reward, "classifier"),
            frozen("reward", reward, "classifier", "value"),
        ),
        (
            ViewSpec("policy", "policy", "policy" if lora else None, "lm", True),
            view("reference", sft, "lm"),
            ViewSpec("value", "value", "value" if lora else None, "value", True),
            view("reward", reward, "score"),
        ),
    )
