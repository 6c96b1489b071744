"""A dial as a value of configs, flags and requests."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from qadapter.errors import QAdapterError
from qadapter.policy.dial import Dial


def _dial(given: Any) -> Dial:
    try:
        dial = Dial.of(given)
    except QAdapterError as error:
        raise ValueError(str(error)) from error
    if dial is None:
        raise ValueError("expected a dial, such as scale=0.5")
    return dial


DialValue = Annotated[
    Dial,
    PlainValidator(_dial),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "description": "scale=VALUE or q-weight=VALUE; or {kind, value}"}),
]
"""`scale=0.5`, or `{kind: scale, value: 0.5}`."""
