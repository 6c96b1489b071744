"""All methods, in the order in which tables and figures show them. A new method is a file and a line here."""

from __future__ import annotations

from typing import Any

from qadapter.methods import (
    apo_zero,
    cpo,
    dpo,
    dpop,
    grpo,
    ipo,
    kl_sft,
    kto,
    oplora,
    orpo,
    pita,
    q_adapter,
    replay,
    rloo,
    rpo,
    sft,
    shiq,
    simpo,
    spin,
    tmkl,
    vas,
)
from qadapter.methods.method import Knob, Method

METHODS: tuple[Method[Any], ...] = (
    q_adapter.METHOD,
    sft.METHOD,
    dpo.METHOD,
    replay.METHOD,
    orpo.METHOD,
    kto.METHOD,
    ipo.METHOD,
    rpo.METHOD,
    apo_zero.METHOD,
    simpo.METHOD,
    cpo.METHOD,
    dpop.METHOD,
    spin.METHOD,
    rloo.METHOD,
    grpo.METHOD,
    shiq.METHOD,
    kl_sft.METHOD,
    tmkl.METHOD,
    oplora.METHOD,
    vas.METHOD,
    pita.METHOD,
)

SUBJECT = q_adapter.METHOD
"""The method that reports compare all others with."""

NAMES = tuple(method.name for method in METHODS)


def method_named(name: str) -> Method[Any]:
    """One method.

    Raises:
        KeyError: there is none of this name.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise KeyError(name)


def knobs() -> dict[str, Knob]:
    """Every method's knobs by name; where two methods share a name, the first one's."""
    found: dict[str, Knob] = {}
    for method in METHODS:
        for knob in method.knobs:
            found.setdefault(knob.name, knob)
    return found
