"""The section `methods` of an experiment: which methods run, and one section of settings per method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from qadapter.config.base import Settings, refuse_repeats
from qadapter.errors import QAdapterError
from qadapter.methods.method import Method, MethodSettings
from qadapter.methods.table import METHODS, NAMES, method_named

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[NAMES]


class AnyMethods(Settings):
    """The settings of every method; `run` lists the methods that run."""

    run: tuple[MethodName, ...] = tuple(method.name for method in METHODS if method.by_default)

    @model_validator(mode="after")
    def _check(self) -> AnyMethods:
        refuse_repeats("run", self.run)
        if lacking := [name for name in self.run if getattr(self, method_named(name).attribute) is None]:
            raise ValueError(f"the section {lacking[0]} is required, because run names {lacking[0]}")
        return self

    def of(self, method: str) -> MethodSettings:
        """The settings of one method.

        Raises:
            QAdapterError: the method does not run, its settings have no default, and none are given.
        """
        settings: MethodSettings | None = getattr(self, method_named(method).attribute)
        if settings is None:
            raise QAdapterError(f"methods.{method} is required: its settings have no default")
        return settings

    def changed(self, method: str, settings: MethodSettings) -> AnyMethods:
        """A copy with other settings for one method."""
        return self.model_copy(update={method_named(method).attribute: settings})


def _section(method: Method[Any]) -> tuple[Any, Any]:
    """A method's section as a pydantic field with its name in YAML; None where it is not given and has no default."""
    if any(entry.is_required() for entry in method.settings.model_fields.values()):
        return method.settings | None, Field(None, alias=method.name)
    return method.settings, Field(method.settings(), alias=method.name)


if TYPE_CHECKING:
    Methods = AnyMethods
else:
    Methods = create_model(
        "Methods",
        __base__=AnyMethods,
        __module__=__name__,
        __doc__=AnyMethods.__doc__,
        **{method.attribute: _section(method) for method in METHODS},
    )
