"""Which engine generates."""

from __future__ import annotations

from collections.abc import Callable

from quartet.errors import ConfigError
from quartet.models.roles import LanguageView
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.engine import RolloutEngine, SamplingSettings
from quartet.rollout.static import StaticEngine
from quartet.rollout.static_cache import NotDrivable


def make_engine(
    name: str, policy: LanguageView, settings: SamplingSettings, say: Callable[[str], None]
) -> RolloutEngine:
    """The engine of `rollout.engine`; `auto` takes the static one wherever the model can be driven by it.

    Args:
        name: auto, static or dynamic.
        say: told in one line when `auto` has to take the dynamic engine.

    Raises:
        ConfigError: `static` asked for with a model that it cannot drive.
    """
    if name == "dynamic":
        return DynamicEngine(policy, settings)
    try:
        return StaticEngine(policy, settings)
    except NotDrivable as reason:
        model = type(policy.backbone.model).__name__
        if name == "static":
            raise ConfigError(
                f"rollout.engine=static cannot drive {model}: {reason}; use rollout.engine=auto or dynamic"
            ) from reason
        say(f"rollout.engine=auto takes the dynamic engine for {model}: {reason}")
        return DynamicEngine(policy, settings)
