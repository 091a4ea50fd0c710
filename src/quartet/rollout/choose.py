"""Which engine generates."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from quartet.config import RolloutConfig
from quartet.errors import ConfigError
from quartet.models.roles import LanguageView
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.engine import RolloutEngine, SamplingSettings
from quartet.rollout.static import StaticEngine
from quartet.rollout.static_cache import NotDrivable
from quartet.rollout.steps import CudaRecorder
from quartet.rollout.vllm import VllmEngine, VllmRunner
from quartet.rollout.vllm_colocate import Colocated
from quartet.rollout.vllm_server import Served


def make_engine(
    name: str,
    policy: LanguageView,
    settings: SamplingSettings,
    say: Callable[[str], None],
    *,
    cuda_graphs: bool = False,
    merged: bool = False,
) -> RolloutEngine:
    """The engine of `rollout.engine`; `auto` takes the static one wherever the model can be driven by it.

    Args:
        name: auto, static or dynamic.
        say: told in one line when `auto` has to take the dynamic engine, or when steps cannot be recorded.
        cuda_graphs: on a GPU, record decoding steps.
        merged: the static engine generates with copies of the weights to which the policy's adapter is added.

    Raises:
        ConfigError: `static` asked for with a model that it cannot drive.
    """
    if name == "dynamic":
        return DynamicEngine(policy, settings)
    try:
        engine = StaticEngine(policy, settings, merged=merged)
    except NotDrivable as reason:
        model = type(policy.backbone.model).__name__
        if name == "static":
            raise ConfigError(
                f"rollout.engine=static cannot drive {model}: {reason}; use rollout.engine=auto or dynamic"
            ) from reason
        unmerged = "; it does not merge adapters" if merged else ""
        say(f"rollout.engine=auto takes the dynamic engine for {model}: {reason}{unmerged}")
        return DynamicEngine(policy, settings)
    if cuda_graphs and policy.backbone.device.type == "cuda":
        try:
            engine.record_with(CudaRecorder, say)
        except NotDrivable as reason:
            say(f"rollout.cuda_graphs is off for {type(policy.backbone.model).__name__}: {reason}")
    return engine


def make_vllm_engine(
    policy: LanguageView,
    settings: SamplingSettings,
    config: RolloutConfig,
    say: Callable[[str], None],
    *,
    longest_prompt: int,
    names: Sequence[str],
    trust_remote_code: bool,
) -> VllmEngine:
    """The engine of `rollout.engine=vllm`.

    Args:
        say: told in one line where `rollout.correct_rollout` is advised.
        longest_prompt: most tokens of a prompt.
        names: what a server may call the full weights below the SFT checkpoint; the first is what messages call them.

    Raises:
        RolloutError: vLLM is not installed, cannot be started or reached, or serves another model.
    """
    options = config.vllm
    if not config.correct_rollout:
        say("rollout.engine=vllm computes log-probabilities by other kernels; rollout.correct_rollout=true is advised")
    if options.mode == "server":
        assert options.url is not None
        runner: VllmRunner = Served(policy, settings, options.url, timeout=options.timeout, names=names)
    else:
        tokens = longest_prompt + settings.response_length
        share = options.gpu_memory_utilization
        runner = Colocated(policy, settings, share=share, tokens=tokens, trust_remote_code=trust_remote_code)
    return VllmEngine(policy, settings, runner, folder=options.folder and os.path.expanduser(options.folder))
