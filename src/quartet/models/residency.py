"""Which weights are where they can be computed with."""

from __future__ import annotations

from quartet.models.plan import Role


class Residency:
    """Decides which weights are on the device. This one keeps all of them there."""

    def use(self, *roles: Role) -> None:
        """Make the weights of these roles usable; those of others may leave the device."""
