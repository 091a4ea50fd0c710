"""LoRA adapters on a backbone: attach, switch, freeze, copy. The only module that touches PEFT's private attributes."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from quartet.config import LoraConfig
from quartet.errors import CheckpointError, ConfigError, brief, shown
from quartet.models.checkpoint_info import PEFT_PREFIX, CheckpointInfo, read_tensor

HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
"""Values of PEFT's `init_lora_weights` that leave the base alone; others (pissa, olora, corda, loftq) rewrite it."""


class AdapterSwitch:
    """Turns the adapters of one model on and off.

    PEFT's own `set_adapter` also toggles `requires_grad`, which silently drops the gradients of an adapter that was used
    earlier in the same forward pass; here only the choice of adapter changes, and each adapter keeps its
    `requires_grad`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.active: str | None = None
        self._set(None)

    @contextmanager
    def on(self, adapter: str | None) -> Iterator[None]:
        """Run with one adapter on (None: all off); restores the previous state, after an exception too."""
        before = self.active
        self._set(adapter)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, adapter: str | None) -> None:
        if adapter is not None and not any(adapter in layer.lora_A for layer in self._layers):
            raise AssertionError(f"no adapter {adapter!r} on this backbone")
        self.active = adapter
        for layer in self._layers:
            # Plain attributes, set for every layer at every pass; a module's own way looks among its parameters first.
            vars(layer).update(_disable_adapters=adapter is None, _active_adapter=[] if adapter is None else [adapter])


def attach_fresh(model: nn.Module, name: str, lora: LoraConfig, *, seed: int) -> None:
    """Inject a new adapter that starts as the identity (B = 0; A Kaiming-uniform from `seed`), in float32.

    Raises:
        ConfigError: `models.lora.target_modules` names no module of this model.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": targets}
    config = PeftLoraConfig(**options, lora_dropout=lora.dropout, bias="none")
    try:
        _inject(model, name, config, seed)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"models.lora.target_modules={lora.target_modules!r} cannot be applied: {brief(error, 300)}"
        ) from error
    body = getattr(model, "base_model_prefix", "")
    outside = [path for path, layer in lora_layers(model) if name in layer.lora_A and not path.startswith(f"{body}.")]
    heads = outside if body else []
    if heads:
        raise ConfigError(
            f"models.lora.target_modules={lora.target_modules!r} takes in the head {heads[0]}; "
            "adapters are trained on the transformer's linear layers, leave it out"
        )
    embeddings = [path for path, layer in lora_layers(model) if name in layer.lora_embedding_A]
    if embeddings:
        raise ConfigError(
            f"models.lora.target_modules={lora.target_modules!r} takes in the embedding {embeddings[0]}; "
            "adapters are trained on linear layers only, leave it out"
        )


def refuse_unmatched(lora: LoraConfig, adapted: Sequence[tuple[nn.Module, str]]) -> None:
    """Check that each entry of a list of targets is a layer of one model at least; models of two families have other names.

    Args:
        adapted: the models, with the names of the adapters that were attached afresh.

    Raises:
        ConfigError: an entry names nothing.
    """
    if isinstance(lora.target_modules, str):
        return
    paths = [path for model, name in adapted for path, layer in lora_layers(model) if name in layer.lora_A]
    for entry in lora.target_modules:
        if not any(f".{path}".endswith(f".{entry}") for path in paths):
            known = {path.rpartition(".")[2] for model, _ in adapted for path, _ in model.named_modules()}
            near = difflib.get_close_matches(entry, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else "correct it or leave it out"
            raise ConfigError(f"models.lora.target_modules has {shown(entry)}, and no layer has that name; {hint}")


def attach_checkpoint(model: nn.Module, name: str, info: CheckpointInfo) -> None:
    """Inject the adapter of a checkpoint exactly as PEFT would load it, in float32.

    Raises:
        CheckpointError: weights of the adapter that this model has no place for, or places that stay empty.
    """
    _refuse_lost_weights(model, info)
    content = {k: v for k, v in info.adapter_config.items() if v is not None}
    start = content.pop("init_lora_weights", True)
    if not isinstance(start, bool) and start not in HARMLESS_STARTS:
        raise CheckpointError(
            f"{info.key}={info.adapter!r} was made with init_lora_weights={start!r}, which changes the base's own weights; "
            "convert it to a plain LoRA adapter (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if content.get("layer_replication"):
        raise CheckpointError(
            f"{info.key}={info.adapter!r} repeats layers of its base (layer_replication), which other roles would have to "
            "share; merge it into its base and give the result"
        )
    content["inference_mode"] = False
    content["lora_dropout"] = 0.0
    content.pop("modules_to_save", None)  # the head is ours, not PEFT's
    known = PeftLoraConfig.__dataclass_fields__
    stored = {k: read_tensor(t, k) for k, t in info.adapter_tensors.items() if ".lora_" in k}
    try:
        config = PeftLoraConfig(**{k: v for k, v in content.items() if k in known and k != "auto_mapping"})
        _inject(model, name, config, seed=0)
        result: Any = set_peft_model_state_dict(
            model, {k.removeprefix(PEFT_PREFIX): v for k, v in stored.items()}, adapter_name=name
        )
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, re.error) as error:
        raise _misfit(info, brief(error, 300)) from error
    empty = [k for k in result.missing_keys if f".{name}." in k]
    if result.unexpected_keys or empty:
        raise _misfit(info, ", ".join((list(result.unexpected_keys) + empty)[:3]))


def _misfit(info: CheckpointInfo, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{info.key}={info.adapter!r} does not fit its base {info.base!r}: {reason}; "
        "give the base that the adapter was trained on"
    )


def _refuse_lost_weights(model: nn.Module, info: CheckpointInfo) -> None:
    """Modules that PEFT saved whole and trained biases belong to the checkpoint, and LoRA layers have no place for them.

    A reward checkpoint's head is such a module; it is read, and checked, by itself.
    """
    trunk = f"{model.base_model_prefix}."
    others = (k.removeprefix(PEFT_PREFIX) for k in info.adapter_tensors if ".lora_" not in k)
    lost = [k for k in others if info.kind == "sft" or k.startswith(trunk)]
    if lost:
        raise CheckpointError(
            f"{info.key}={info.adapter!r} holds {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''} beside its LoRA "
            "matrices, which would be lost; merge it into its base (PeftModel.merge_and_unload) and give the result"
        )


def merge(model: nn.Module, info: CheckpointInfo) -> None:
    """Add the checkpoint's adapter into the weights and leave a plain model behind.

    Raises:
        CheckpointError: an adapter on one of two modules that share a weight, or as `attach_checkpoint`.
    """
    attach_checkpoint(model, "merged", info)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, layer in lora_layers(model):
        weight: Any = layer.get_base_layer().weight
        if owners[id(weight)] > 1:
            raise CheckpointError(
                f"{info.key}={info.adapter!r} adapts {path}, whose weight another module shares (tied embeddings), and would "
                "change both when merged; train with models.lora, or merge it into an untied copy of its base"
            )
        layer.merge(adapter_names=["merged"])
    strip(model)


def strip(model: nn.Module) -> None:
    """Put the wrapped modules back in place of PEFT's layers."""
    for path, layer in lora_layers(model):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)


def detach(model: nn.Module, name: str) -> None:
    """Remove one adapter; its memory is freed."""
    for _, layer in lora_layers(model):
        layer._active_adapter = []  # deleting an active adapter would choose another one, and warn about it
        layer.delete_adapter(name)
    getattr(model, "peft_config", {}).pop(name, None)


def adapter_parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """Named parameters of one adapter."""
    mine = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    return [(key, parameter) for key, parameter in model.named_parameters() if mine.search(key)]


def _inject(model: nn.Module, name: str, config: PeftLoraConfig, seed: int) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed % 2**64)  # torch takes no larger ones
        # GPT-2's Conv1D makes PEFT correct fan_in_fan_out by itself and warn about it.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        # Several adapters on one backbone are what the sharing plans are about.
        warnings.filterwarnings("ignore", message=".*Already found a `peft_config` attribute.*")
        # Nothing is merged into a weight that another module shares (`merge`).
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*")
        # Nothing is merged into the weights of a layer that lacks the bias.
        warnings.filterwarnings("ignore", message=".*lora_bias.*")
        inject_adapter_in_model(config, model, adapter_name=name)
    for _, parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.float()
    for _, layer in lora_layers(model):
        # Under autocast the cast to the adapter's float32 would be undone at once by its matrix product.
        layer.cast_input_dtype_enabled = False


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Path and module of every layer with adapters."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
