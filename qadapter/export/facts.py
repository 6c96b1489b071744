"""What is known of an adapter: its base, data, method and measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qadapter.errors import QAdapterError

FACTS = "facts.json"
"""What a training or a pipeline measured, beside the adapter; `Facts` as JSON."""
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Measurement:
    """A measured number.

    Attributes:
        label: in words.
        value: the number.
        low, high: its interval of 95 %; None where none was computed.
        items: what it rests on.
        of_base: the base's number; None where it has none.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    items: int | None = None
    of_base: float | None = None


@dataclass(frozen=True)
class DataFile:
    """Data that were trained or measured on: what they are, sha256 of the prepared file, and their licence."""

    name: str
    digest: str
    licence: str = NOT_STATED


@dataclass(frozen=True)
class Facts:
    """What a model card says.

    Attributes:
        base: folder's name or hub id.
        base_digest: sha256 of a base's folder; empty for a hub id.
        base_licence: as its own card says.
        method: `q-adapter`, `sft` …; empty where it is not known.
        settings: of the method and the training.
        dial: where the policy's dial stands.
        data: what it was trained and measured on.
        learnt, forgotten: measured numbers.
        split: which part of the held-out items the numbers were measured on, where only a part was.
    """

    base: str
    base_digest: str = ""
    base_licence: str = NOT_STATED
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    dial: str = ""
    data: tuple[DataFile, ...] = ()
    learnt: tuple[Measurement, ...] = ()
    forgotten: tuple[Measurement, ...] = ()
    split: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        """What `to_json` gave.

        Raises:
            QAdapterError: it is something else.
        """
        try:
            lists: dict[str, Any] = {name: tuple(Measurement(**row) for row in content.get(name, ())) for name in _ROWS}
            rest = {name: value for name, value in content.items() if name not in (*_ROWS, "data")}
            return cls(**rest, **lists, data=tuple(DataFile(**row) for row in content.get("data", ())))
        except (TypeError, AttributeError) as error:
            raise QAdapterError(f"{FACTS} cannot be read ({error}). Delete it to write a card without it.") from error


_ROWS = ("learnt", "forgotten")
