"""Whether a policy is one model's own distribution, so that ordinary weights can say it."""

from __future__ import annotations

from dataclasses import dataclass

from qadapter.policy.dial import combined
from qadapter.policy.model import QAdapterForCausalLM

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Shares:
    """A policy as weights: W + Σ shares[i] · ΔW_i.

    Attributes:
        shares: adapter → how much of what it adds; without those that are switched off.
        why_inexact: why these weights are not the policy, as the end of a sentence; None where they are.
    """

    shares: dict[str, float]
    why_inexact: str | None = None

    def times(self, scale: float) -> dict[str, float]:
        """The same weights with every adapter multiplied once more."""
        return {name: scale * share for name, share in self.shares.items()}


def shares_of(policy: QAdapterForCausalLM) -> Shares:
    """The weights nearest to a policy in form, and whether they are it exactly.

    Exact are the base (dial 0), and one adapter alone whose row is the policy: the residual form with α0 = α̃ and a
    weight of α̃ (so α0 = α̃ = 1 for weight 1), a plain adapter, and each of them at any scale.
    """
    weights = {name: weight for name, weight in policy.adapter_weights.items() if weight}
    dial = policy.dial
    if not dial.value:
        return Shares({})
    alpha_0, alpha_tilde = policy.config.alpha_0, policy.config.alpha_tilde
    residual = policy.objective.parametrization == "residual"
    parts = combined(weights, alpha_0, alpha_tilde, residual=residual, dial=dial)
    scale = dial.value if dial.kind == "scale" else 1.0
    if len(weights) == 1 and abs(parts.base) < _TOLERANCE:
        ((name, coefficient),) = parts.adapters.items()
        if abs(coefficient - 1) < _TOLERANCE:
            return Shares({name: scale})
    factor = 1.0 if dial.kind == "scale" else dial.value
    shares = {name: scale * factor * weight / alpha_tilde for name, weight in weights.items()}
    if len(weights) > 1:
        why = f"it is made of {len(weights)} adapters by weight, whose logits add up and not their weights"
    elif not weights:
        why = "all its adapters are switched off, and its base is tempered"
    elif dial.kind == "q-weight" and not dial.as_trained:
        why = f"its dial is {dial}, so that each token is chosen from the logits of both base and adapter"
    else:
        form = policy.objective.parametrization
        why = f"with α0 {alpha_0:g} and α̃ {alpha_tilde:g} ({form}) the base's own logits are part of it"
    return Shares(shares, why)
