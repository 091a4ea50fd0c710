"""The figures of a prediction: bytes of backbones, of roles and of phases, in one process."""

from __future__ import annotations

from dataclasses import dataclass

from quartet.memory.choices import Choices, Workload
from quartet.models.plan import SharingPlan


@dataclass(frozen=True, slots=True)
class BackboneBytes:
    """One backbone in one process."""

    name: str
    checkpoint: str
    roles: tuple[str, ...]
    """The roles that look at it."""
    parameters: int
    """Of the whole model, LM head included, adapters not."""
    trained: bool
    weights: float
    """LM head and buffers included."""
    mapped: float
    """Part of `weights` that stays in the file's pages (CPU): it is not anonymous memory."""
    adapters: float


@dataclass(frozen=True, slots=True)
class RoleBytes:
    """What a role holds of its own in one process, beside the backbone that it looks at."""

    role: str
    backbone: str
    trained_parameters: int
    """Of the whole role, not of the process's share."""
    adapters: float
    head: float
    """The LM head where it is not tied (part of the backbone's weights), or the scalar head."""
    gradients: float
    optimizer: float
    paged: float
    """Part of `optimizer` that is in managed memory and leaves the GPU under pressure."""


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """One process in one phase, at the phase's peak."""

    phase: str
    weights: float
    """Backbones, adapters and heads that are in the device's memory (on a CPU: anonymous memory)."""
    optimizer: float
    gradients: float
    activations: float
    kv_cache: float
    logits: float
    trunk_states: float
    """States after frozen layers that scoring keeps for the update."""
    gathered: float
    """Several processes: weights that are whole while they run, and buffers in which weights and gradients travel."""
    libraries: float
    """What libraries take for themselves on first use (CPU)."""
    at: str
    """The stretch of code where the peak is."""

    @property
    def peak(self) -> float:
        """All together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """The bytes by name."""
        names = (
            "weights",
            "optimizer",
            "gradients",
            "activations",
            "kv_cache",
            "logits",
            "trunk_states",
            "gathered",
            "libraries",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class PhaseTraffic:
    """Bytes that each process sends to the others in one phase of an iteration; it receives as many."""

    phase: str
    weights: float
    gradients: float
    episodes: float
    """Responses with their scores, which all processes get to know."""

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.episodes


@dataclass(frozen=True)
class Estimate:
    """The whole prediction, per process."""

    plan: SharingPlan
    device: str
    choices: Choices
    workload: Workload
    backbones: tuple[BackboneBytes, ...]
    roles: tuple[RoleBytes, ...]
    phases: tuple[PhaseBytes, ...]
    traffic: tuple[PhaseTraffic, ...]

    @property
    def peak(self) -> PhaseBytes:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    def phase(self, name: str) -> PhaseBytes:
        """A phase by name."""
        return next(phase for phase in self.phases if phase.phase == name)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What is in memory whatever the phase."""

    backbones: tuple[BackboneBytes, ...]
    roles: tuple[RoleBytes, ...]
    heads: float
    """Value and score head."""
    libraries: float
    load: PhaseBytes

    @property
    def weights(self) -> float:
        """Backbones, adapters and heads once training has written to what it trains."""
        return sum(b.weights - b.mapped + b.adapters for b in self.backbones) + self.heads

    def fixed(self, name: str) -> PhaseBytes:
        """A phase that holds nothing of its own: what every phase needs at least."""
        optimizer = sum(role.optimizer - role.paged for role in self.roles)
        gradients = sum(role.gradients for role in self.roles)
        return PhaseBytes(name, self.weights, optimizer, gradients, 0, 0, 0, 0, 0, self.libraries, "weights")
