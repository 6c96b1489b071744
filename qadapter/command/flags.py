"""From a class of options to flags, and from flags and a config file to its values."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qadapter.config.base import Settings
from qadapter.errors import QAdapterError, did_you_mean

Options = TypeVar("Options", bound=Settings)


class Parser(argparse.ArgumentParser):
    """argparse's, that raises what the user did wrong instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """argparse's hook for everything it cannot parse."""
        raise QAdapterError(f"{message}; see {self.prog} --help")


def flag(name: str) -> str:
    """`alpha_0` as `--alpha-0`."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, options: type[Settings]) -> None:
    """One flag a field, in the sections of the classes that declare them. What is not given is not in the result."""
    for section in options.__mro__:
        names = [name for name in options.model_fields if _section(options, name) is section]
        if names:
            title = parser.prog.split()[-1] if section is options else (section.__doc__ or "").splitlines()[0]
            group = parser.add_argument_group(title.rstrip("."))
            for name in names:
                _add_flag(group, name, options.model_fields[name])


def _section(options: type[Settings], name: str) -> type:
    """The class nearest to `options` that declares a field."""
    return next(parent for parent in options.__mro__ if name in inspect.get_annotations(parent))


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    text = field.description or ""
    if field.is_required():
        text += " (required)"
    elif field.default is not None and field.default is not False and field.default != ():
        text += f" (default: {field.default})"
    kinds = list(_leaves(field.annotation))
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if bool in kinds:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **settings)
    elif name in ("adapter", "prompt"):
        group.add_argument(flag(name), action="append", metavar="TEXT" if name == "prompt" else "FOLDER", **settings)
    else:
        choices = "|".join(kind for kind in kinds if isinstance(kind, str))
        group.add_argument(
            flag(name), metavar=choices or ("N" if int in kinds else "X" if float in kinds else "TEXT"), **settings
        )


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types, and the values of Literals, that an annotation is made of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


def read_options(options: type[Options], given: Mapping[str, Any], config: str | None) -> Options:
    """Values of flags over those of a config file over the defaults.

    Args:
        options: the class.
        given: flags, by field.
        config: YAML file with the same keys, dashes or underscores.

    Raises:
        QAdapterError: a file that cannot be read, and every unknown key and every value that is none, at once.
    """
    try:
        return options.model_validate({**(_config(Path(config)) if config else {}), **given})
    except ValidationError as error:
        problems = [_explain(problem, options, given, config) for problem in error.errors()]
        raise QAdapterError("; ".join(dict.fromkeys(problems))) from error


def _config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise QAdapterError(f"--config {file} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QAdapterError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise QAdapterError(f"--config {file} holds {type(content).__name__}; a mapping of keys was expected")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _explain(problem: Any, options: type[Settings], given: Mapping[str, Any], config: str | None) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r} in {config}{did_you_mean(name, options.model_fields)}"
    if problem["type"] == "missing":
        return f"{flag(name)} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    shown = f" (given: {problem['input']!r})" if isinstance(problem["input"], str | int | float) else ""
    return f"{flag(name) if name in given or config is None else f'{name} in {config}'}: {message}{shown}"


def refuse_unknown(unknown: Iterable[str], options: type[Settings], others: Iterable[str]) -> None:
    """Raise QAdapterError if arguments are left that no flag took, with the nearest flag's name.

    Args:
        unknown: what argparse left.
        options: the subcommand's.
        others: further flags it knows.
    """
    left = list(unknown)
    if not left:
        return
    first = left[0].split("=")[0]
    if first.startswith("-"):
        known = [*map(flag, options.model_fields), *others]
        raise QAdapterError(f"unknown flag {first}{did_you_mean(first, known)}")
    raise QAdapterError(f"unexpected argument {first!r}; values belong behind a flag")
