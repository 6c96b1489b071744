"""How far a policy has moved from its base, and from where on that is a warning."""

from __future__ import annotations

LARGE_KL = 0.5
"""Nats per token, KL(base ‖ policy). Trainings that keep what the base could do lie below 0.2 (docs/findings.md)."""


def far_from_base(kl: float | None) -> str:
    """A sentence where the divergence per token is large; nothing where it is not, or was not measured."""
    if kl is None or not kl > LARGE_KL:  # never where it is NaN
        return ""
    return (
        f"far from its base (KL {kl:.2f} per token; trainings that keep the base's abilities lie below 0.2): it may "
        "have lost what the base could do"
    )
