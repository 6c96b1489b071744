"""The dial between a base and its customised policy: one number, set after training, for any adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qadapter.errors import QAdapterError, did_you_mean

DialKind = Literal["scale", "q-weight"]
KINDS: tuple[DialKind, ...] = get_args(DialKind)
LARGEST_DIAL = 100.0
"""Largest value of a dial. Beyond 2, text usually falls apart; there is no use beyond this."""

# What others call a scale: WiSE-FT interpolates by c, ExPO extrapolates by alpha behind the trained model.
_OTHER_NAMES = {"wise-ft": 0.0, "expo": 1.0}


@dataclass(frozen=True, slots=True)
class Dial:
    """How far a policy goes from its base (0, exactly) to what was trained (1, exactly), and beyond.

    With B the base's logits, A_s those of the model whose adapters are multiplied by s, and P those of the policy as
    trained, the logits are, up to a constant at each position (docs/method.md, "The dials"):

    - `q-weight`: B + value · (P − B), the geometric path between the two distributions. Base and adapter are computed.
    - `scale`: the same policy with A_value in place of A. Where the policy is the adapted model itself (SFT, DPO, the
      residual form with α0 = α̃ = 1), this is W + value · ΔW in weights and one pass.

    Attributes:
        kind: what is moved.
        value: from 0 to `LARGEST_DIAL`.
    """

    kind: DialKind = "scale"
    value: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no dial.

        Raises:
            QAdapterError: an unknown kind, or a value that is no number in the range.
        """
        if self.kind not in KINDS:
            raise QAdapterError(
                f"{self.kind!r} is no kind of dial{did_you_mean(str(self.kind), KINDS)}; expected scale=VALUE or "
                "q-weight=VALUE"
            )
        number = self.value
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= LARGEST_DIAL:
            raise QAdapterError(
                f"the dial {self.kind}={number} is out of range; expected a value from 0 (the base) over 1 (the policy "
                f"as trained) to {LARGEST_DIAL:g}"
            )
        object.__setattr__(self, "value", float(number))

    @property
    def as_trained(self) -> bool:
        """Whether it changes nothing."""
        return self.value == 1.0

    @classmethod
    def parse(cls, text: str) -> Dial:
        """`scale=0.5` or `q-weight=0.75`; also `wise-ft=0.5` (scale 0.5) and `expo=0.5` (scale 1.5).

        Raises:
            QAdapterError: it is something else.
        """
        kind, equals, number = (part.strip() for part in str(text).partition("="))
        kind = kind.replace("_", "-")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or value != value:
            raise QAdapterError(f"{text!r} is no dial; expected scale=VALUE or q-weight=VALUE, such as scale=0.5")
        if kind in _OTHER_NAMES:
            return cls("scale", _OTHER_NAMES[kind] + value)
        return cls(kind, value)  # type: ignore[arg-type]

    @classmethod
    def of(cls, given: Dial | str | Mapping[str, Any] | None) -> Dial | None:
        """A dial from its text, from `{"kind": …, "value": …}`, or itself.

        Raises:
            QAdapterError: it is something else.
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            if set(given) != {"kind", "value"}:
                raise QAdapterError(f"a dial has kind and value, {sorted(map(str, given))} were given")
            return cls(given["kind"], given["value"])
        return cls.parse(str(given))

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.kind}={self.value:g}"


AS_TRAINED = Dial()
"""The dial that changes nothing."""


@dataclass(frozen=True, slots=True)
class Combination:
    """Logits as a sum of rows: Σ adapters[i] · A_i + base · B − normalizer · logsumexp(B).

    Attributes:
        adapters: coefficient of each adapter's row, by name.
        base: that of the base's row.
        normalizer: that of the base's normaliser, the same for all tokens of a position.
    """

    adapters: dict[str, float]
    base: float
    normalizer: float


def combined(
    weights: Mapping[str, float], alpha_0: float, alpha_tilde: float, *, residual: bool, dial: Dial = AS_TRAINED
) -> Combination:
    """The policy's coefficients.

    As trained they are those of (Σ w_i · Q_i + α0 · log π1)/α̃. In differences to the base that is
    Σ (w_i/α̃) · (A_i − B) + τ · B, where τ = α0/α̃ in the residual form and (α0 + Σ w_i)/α̃ in the absolute one. A dial
    moves τ on the straight line from 1 to its trained value, so 0 is the base for any α0 and α̃. `q-weight`
    multiplies the differences as well; `scale` multiplies the adapters within the model (`scaling.AdapterScale`).

    Args:
        weights: adapter → weight, for the adapters that are switched on.
        alpha_0, alpha_tilde: α0 and α̃.
        residual: whether each Q_i is a difference to the base.
        dial: its kind and value.
    """
    total = sum(weights.values())
    of_base = (alpha_0 - total if residual else alpha_0) / alpha_tilde
    if dial.as_trained:
        rows = {name: weight / alpha_tilde for name, weight in weights.items()}
        return Combination(rows, of_base, alpha_0 / alpha_tilde)
    exponent = of_base + total / alpha_tilde  # τ
    factor = dial.value if dial.kind == "q-weight" else 1.0
    moved = 1.0 + dial.value * (exponent - 1.0)
    rows = {name: factor * weight / alpha_tilde for name, weight in weights.items()}
    base = moved - factor * total / alpha_tilde
    return Combination(rows, 0.0 if abs(base) < 1e-12 else base, dial.value * alpha_0 / alpha_tilde)
