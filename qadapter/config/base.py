"""The base of every config section: the strict base class and the common types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qadapter.files.url_secrets import secrets_in

_inside: ContextVar[bool] = ContextVar("inside a config that is being validated", default=False)


class Settings(BaseModel):
    """A config section. It refuses unknown keys and secrets, and is immutable after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _no_secrets(cls, given: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Check every string of a config, at any depth, once: in the outermost section under validation."""
        if _inside.get() or not isinstance(given, Mapping):
            return handler(given)
        if problems := list(secrets_in(given)):
            raise ValueError("\n".join(problems))
        token = _inside.set(True)
        try:
            return handler(given)
        finally:
            _inside.reset(token)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false (in YAML yes, on, no, off too) where a number belongs: they would be 1 and 0."""
        if _holds_truth(value) and _only_numbers(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("expected a number, not true or false")
        return value


def _holds_truth(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds_truth, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _only_numbers(annotation: Any) -> bool:
    """Whether a field takes numbers, by themselves or in lists and mappings, and nothing that can be true or false."""
    kinds = list(_kinds(annotation))
    return any(kind is int or kind is float for kind in kinds) and not any(
        kind is bool or kind is Any or (isinstance(kind, type) and issubclass(kind, BaseModel)) for kind in kinds
    )


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type and the types that it is put together from, at any depth."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


Positive = Annotated[float, Field(gt=0)]


NonNegative = Annotated[float, Field(ge=0)]


Count = Annotated[int, Field(ge=1)]


Epochs = Annotated[float, Field(gt=0, le=1e6)]


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy takes; torch would take more."""


LARGEST_ALPHA, SMALLEST_ALPHA_TILDE = 1e9, 1e-6
"""Beyond them float32 logits overflow or lose all precision."""

Alpha0 = Annotated[float, Field(ge=0, le=LARGEST_ALPHA)]


AlphaTilde = Annotated[float, Field(ge=SMALLEST_ALPHA_TILDE, le=LARGEST_ALPHA)]


SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-3, 1e3


def refuse_temperature(value: float) -> float:
    """Refuse a temperature that is neither 0 (greedy) nor a usable divisor of logits.

    Raises:
        ValueError: the temperature is out of range; the message names the range.
    """
    if value != 0 and not SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:  # NaN is in no range
        raise ValueError(f"expected 0 (greedy), or from {SMALLEST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}")
    return value


Temperature = Annotated[float, AfterValidator(refuse_temperature)]


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]


def refuse_repeats(key: str, values: Sequence[Any]) -> None:
    """Raise ValueError if a list contains a value twice."""
    repeated = sorted({value for value in values if list(values).count(value) > 1})
    if repeated:
        raise ValueError(f"{key} names {repeated} more than once")
