"""From two checkpoints and a sharing plan to the four roles."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from quartet.config import ModelsConfig
from quartet.errors import CheckpointError, brief
from quartet.models import adapters
from quartet.models.attention import use_own_attention
from quartet.models.backbone import Backbone
from quartet.models.base_comparison import same_base
from quartet.models.branch import copy_top, freeze_trunk
from quartet.models.cache import mappable
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.continuation import attach_continuation, refuse_adapted_embeddings
from quartet.models.fused import use_fused_layers
from quartet.models.heads import LogitHead, ScalarHead, head_shapes, read_score_head
from quartet.models.linears import use_fast_linears
from quartet.models.offload import make_residency
from quartet.models.plan import BackboneSpec, SharingPlan, Source, make_plan
from quartet.models.precision import resolve_device, resolve_dtype
from quartet.models.quantize import quantization_config, seal
from quartet.models.residency import Residency
from quartet.models.roles import LanguageView, Roles, ScalarView, TrainedPair


def plan_for(models: ModelsConfig, sft: CheckpointInfo, reward: CheckpointInfo) -> SharingPlan:
    """The sharing plan of a configuration; reads headers at most.

    Raises:
        ConfigError: `single` where the checkpoints do not allow it.
        CheckpointError: damaged headers, or an adapter that cannot be continued.
    """
    if models.lora is not None:
        refuse_adapted_embeddings(sft, *([reward] if models.value_model == "own" else []))
    wanted = models.sharing in ("auto", "single") and models.lora is not None and reward.adapter is not None
    return make_plan(
        models.sharing,
        lora=models.lora is not None,
        sft=Source(sft.base, sft.adapter),
        reward=Source(reward.base, reward.adapter),
        bases_equal=wanted and same_base(sft, reward),
        freeze_layers=models.freeze_layers,
        value_on_policy=models.value_model == "trunk",
    )


def convert_weights(
    models: ModelsConfig, plan: SharingPlan, sft: CheckpointInfo, reward: CheckpointInfo, *, mapped: bool
) -> None:
    """Write the converted copies that `load_roles` will map, where they are not in the cache yet.

    Raises:
        CheckpointError: a copy cannot be written.
    """
    device = resolve_device(models.device)
    dtype = resolve_dtype(models.dtype, device)
    for spec in plan.backbones:
        frozen = not spec.trainable
        if mapped or (frozen and device.type == "cpu" and models.quantization is None):
            info = sft if spec.task == "language_model" else reward
            mappable(info, dtype if frozen else torch.float32)


def load_roles(
    models: ModelsConfig,
    plan: SharingPlan,
    sft: CheckpointInfo,
    reward: CheckpointInfo,
    *,
    seed: int,
    mapped: bool = False,
) -> Roles:
    """Load every backbone of the plan once, attach adapters and heads, and set what is trained.

    Args:
        seed: of freshly drawn adapters.
        mapped: leave all backbones on the host, mapped from their files, to be cut into shares.

    Raises:
        CheckpointError: a checkpoint that does not fit its role.
        ConfigError: adapters that cannot be laid out as configured.
    """
    device = resolve_device(models.device)
    dtype = resolve_dtype(models.dtype, device)
    score = read_score_head(reward).to(device)
    score.requires_grad_(False)
    value = _value_head(models, score, sft)
    by_source = {"policy": sft, "reference": sft, "sft": sft, "value": reward, "reward": reward}
    backbones: dict[str, Backbone] = {}
    for spec in plan.backbones:
        info = sft if spec.task == "language_model" else reward
        if spec.top_of is not None:
            backbones[spec.name] = _upper(spec, backbones[spec.top_of])
            continue
        quantization = None if spec.trainable else models.quantization
        place = torch.device("cpu") if mapped else device
        weights = torch.float32 if spec.trainable else dtype
        model = _load_weights(spec, info, weights, place, quantization, mapped or not spec.trainable)
        _attach(spec, model, models, by_source, seed)
        backbones[spec.name] = finished(spec, model, dtype, models.gradient_checkpointing)
    if models.lora is not None:
        learn = [(backbones[spec.name].model, a.name) for spec in plan.backbones for a in spec.adapters if a.trainable]
        adapters.refuse_unmatched(models.lora, learn)
    where = make_residency(models.offload, plan, backbones, device, cut=mapped)
    return views_of(plan, backbones, score, value, where)


def _value_head(models: ModelsConfig, score: ScalarHead, sft: CheckpointInfo) -> ScalarHead:
    if models.value_model == "trunk":
        (name, shape), *_ = head_shapes(sft.config, sft.trust_remote_code)[0].items()
        return ScalarHead(torch.zeros(shape, device=score.weight.device), name)
    start = score.weight if models.value_head_init == "reward" else torch.zeros_like(score.weight)
    return ScalarHead(start, score.name)


def views_of(
    plan: SharingPlan, backbones: dict[str, Backbone], score: ScalarHead, value: ScalarHead, residency: Residency
) -> Roles:
    """The roles as a plan's views of its backbones."""
    logits = {n: LogitHead(b.model) for n, b in backbones.items() if b.spec.task == "language_model"}

    def language(role: Any) -> LanguageView:
        view = plan.view(role)
        return LanguageView(backbones[view.backbone], view.adapter, logits[view.backbone])

    def scalar(role: Any, head: ScalarHead) -> ScalarView:
        view = plan.view(role)
        return ScalarView(backbones[view.backbone], view.adapter, head)

    policy, critic = language("policy"), scalar("value", value)
    return Roles(
        plan=plan,
        backbones=backbones,
        policy=policy,
        reference=language("reference"),
        value=critic,
        reward=scalar("reward", score),
        trained=TrainedPair(policy, critic),
        residency=residency,
    )


def _load_weights(
    spec: BackboneSpec,
    info: CheckpointInfo,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    mapped: bool,
) -> PreTrainedModel:
    config = without_dropout(info.config)
    config.use_cache = False
    loader: Any = AutoModelForCausalLM
    if spec.task == "classifier":
        loader, config.num_labels = AutoModelForSequenceClassification, 1
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
        if device.type == "cuda":
            options["device_map"] = {"": device}  # bitsandbytes quantizes on the way to the GPU
    mapped = mapped and device.type == "cpu" and quantization is None
    place = mappable(info, dtype) if mapped else spec.checkpoint
    try:
        with _quiet():
            model, report = loader.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                trust_remote_code=info.trust_remote_code,
                use_safetensors=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{info.key}={spec.checkpoint!r} cannot be loaded: {brief(error, 300)}") from error
    _refuse_gaps(spec, info, model, report)
    if spec.task == "classifier":
        for name in [n for n, _ in model.named_children() if n != model.base_model_prefix]:
            delattr(model, name)  # the heads of value and reward model are held by their roles
    if quantization is not None:
        seal(model, quantization)
    result: PreTrainedModel = model if quantization is not None else model.to(device)
    return result


def _refuse_gaps(spec: BackboneSpec, info: CheckpointInfo, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Missing or unused tensors are errors; heads of the other task aside, which no role of this backbone uses."""
    prefix = model.base_model_prefix + "."
    missing = sorted(str(k) for k in report["missing_keys"])
    unused = sorted(str(k) for k in report["unexpected_keys"])
    wrong = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report.get("mismatched_keys", ()))
    if spec.task == "classifier":
        missing = [k for k in missing if k.startswith(prefix)]
        wrong = [k for k in wrong if k.startswith(prefix)]
    if spec.task == "classifier" or info.adapter is not None:
        unused = [k for k in unused if k.startswith(prefix)]
    if missing or unused or wrong:
        parts = [
            f"{word} {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}"
            for word, keys in (("lacks", missing), ("holds the unused", unused), ("has another shape for", wrong))
            if keys
        ]
        raise CheckpointError(
            f"{info.key}={spec.checkpoint!r} does not fit {type(model).__name__}: it {'; it '.join(parts)}; "
            "these weights would be random or dropped, give a complete checkpoint"
        )


def _attach(
    spec: BackboneSpec, model: PreTrainedModel, models: ModelsConfig, source: dict[str, CheckpointInfo], seed: int
) -> None:
    if spec.merged_adapter is not None:
        adapters.merge(model, source[spec.name])
    for adapter in spec.adapters:
        info = source[adapter.name]
        if not adapter.trainable:
            adapters.attach_checkpoint(model, adapter.name, info)
            continue
        assert models.lora is not None
        role_seed = seed * 2 + (adapter.name == "value")
        if adapter.source is None:
            adapters.attach_fresh(model, adapter.name, models.lora, seed=role_seed)
        else:
            attach_continuation(model, adapter.name, models.lora, info, seed=role_seed)


def finished(spec: BackboneSpec, model: PreTrainedModel, dtype: torch.dtype, checkpointing: bool) -> Backbone:
    """A backbone of a model that has its weights and adapters, ready to compute."""
    model.eval()
    use_own_attention(model)
    use_fast_linears(model)
    use_fused_layers(model)
    model.requires_grad_(spec.trainable)
    if spec.frozen_layers:
        freeze_trunk(model, spec.frozen_layers, dtype)
    for adapter in spec.adapters:
        for _, parameter in adapters.adapter_parameters(model, adapter.name):
            parameter.requires_grad_(adapter.trainable)
    backbone = Backbone(spec, model, dtype=dtype)
    if checkpointing and spec.learns:
        backbone.enable_checkpointing()
    return backbone


def _upper(spec: BackboneSpec, below: Backbone) -> Backbone:
    """The frozen twin of a backbone that trains its top: copied before the first step, sharing all that is frozen."""
    twin = copy_top(below.model)
    return Backbone(spec, twin, dtype=below.dtype, below=below)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with every dropout rate at zero, whatever the family calls it."""
    config = copy.deepcopy(config)
    for name, given in list(vars(config).items()):
        if ("drop" in name) and isinstance(given, float):
            setattr(config, name, 0.0)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading report; what it says is checked by `_refuse_gaps`."""
    before = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bar:
            transformers_logging.enable_progress_bar()
