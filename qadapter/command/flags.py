"""From a class of options to flags, and from flags and a config file to its values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qadapter.config.base import Settings
from qadapter.config.reading import read_file
from qadapter.errors import QAdapterError, did_you_mean

Options = TypeVar("Options", bound=Settings)

ALIASES = {"lr": "learning_rate"}
"""Short names that other projects use, as flags and as keys of a config file."""
_REPEATED = {"adapter": "FOLDER", "prompt": "TEXT", "retain": "FILE", "report_to": "NAME"}  # may be repeated
_POSITIONAL = {"file": "FILE"}  # positional arguments


def flag(name: str) -> str:
    """`alpha_0` as `--alpha-0`."""
    return "--" + name.replace("_", "-")


def from_flags(options: type[Options], run: Callable[[Options], None]) -> Callable[..., None]:
    """A function whose parameters are one flag per field and `--config`; it validates them and calls `run`.

    Args:
        options: the class. Its own fields and those of each parent class are a section of the help.
        run: called with the values.
    """

    def command(*, config: str | None, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None and value != []}
        run(read_options(options, given, config))

    parameters = []
    declaring = _sections(options)
    for section in options.__mro__:
        title = (section.__doc__ or "").partition("\n")[0].rstrip(".")
        fields = (name for name in options.model_fields if declaring[name] is section)
        parameters += [_parameter(name, options.model_fields[name], title) for name in fields]
    file = typer.Option(
        metavar="FILE",
        help="YAML file with the same keys as the flags (batch_size: 8); flags take precedence",
        show_default=False,
    )
    parameters.append(_keyword("config", Annotated[str | None, file]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _sections(options: type[Settings]) -> dict[str, type]:
    """Field → the class nearest to `options` that declares it."""
    return {name: parent for parent in reversed(options.__mro__) for name in inspect.get_annotations(parent)}


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(name: str, field: FieldInfo, section: str) -> inspect.Parameter:
    """The flag of a field; pydantic parses its text, so that all problems are reported together."""
    text = field.description or ""
    if field.is_required():
        text += " (required)"
    elif field.default is not None and field.default is not False and field.default != ():
        given = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default: {given})"
    kinds = list(_leaves(field.annotation))
    names = [flag(name), *(f"--{short}" for short, long in ALIASES.items() if long == name)]
    settings: dict[str, Any] = {"help": text, "show_default": False, "rich_help_panel": section}
    if bool in kinds:
        return _keyword(name, Annotated[bool | None, typer.Option(f"{names[0]}/--no-{names[0][2:]}", **settings)])
    if name in _POSITIONAL:
        return _keyword(name, Annotated[str | None, typer.Argument(help=text, metavar=_POSITIONAL[name])])
    if shown := _repeated_argument(field):
        return _keyword(name, Annotated[list[str] | None, typer.Argument(help=text, metavar=shown)])
    if name in _REPEATED:
        return _keyword(name, Annotated[list[str] | None, typer.Option(*names, metavar=_REPEATED[name], **settings)])
    choices = [kind for kind in kinds if isinstance(kind, str)]
    settings["metavar"] = "|".join(choices) or ("N" if int in kinds else "X" if float in kinds else "TEXT")
    if choices:
        settings["autocompletion"] = lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]
    return _keyword(name, Annotated[str | None, typer.Option(*names, **settings)])


def _repeated_argument(field: FieldInfo) -> str | None:
    """The metavar of a positional argument that may be repeated; None for a flag."""
    extra = field.json_schema_extra
    return str(extra["positional"]) if isinstance(extra, dict) and "positional" in extra else None


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types, and the values of Literals, in an annotation."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


def read_options(options: type[Options], given: Mapping[str, Any], config: str | None) -> Options:
    """Merge values: flags take precedence over the config file, and that over the defaults.

    Args:
        options: the class.
        given: flags, by field.
        config: YAML file with the same keys, dashes or underscores.

    Raises:
        QAdapterError: the file cannot be read, or has unknown keys or invalid values; the message lists all of them.
    """
    try:
        return options.model_validate({**(_config(Path(config), options) if config else {}), **given})
    except ValidationError as error:
        problems = [_explain(problem, options, given, config) for problem in error.errors()]
        raise QAdapterError("; ".join(dict.fromkeys(problems))) from error


def _config(file: Path, options: type[Settings]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in read_file(file, "--config ").items():
        name = str(key).replace("-", "_")
        if name not in options.model_fields:
            name = ALIASES.get(name, name)
        if name in values:
            raise QAdapterError(f"--config {file} gives {name} twice; remove one of the two")
        values[name] = value
    return values


def _explain(problem: Any, options: type[Settings], given: Mapping[str, Any], config: str | None) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r} in {config}{did_you_mean(name, options.model_fields)}"
    if problem["type"] == "missing":
        shown = _repeated_argument(options.model_fields[name]) or _POSITIONAL.get(name, flag(name))
        return f"{shown} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        choices = [choice for choice in _leaves(options.model_fields[name].annotation) if isinstance(choice, str)]
        near = did_you_mean(str(problem["input"]), choices)
        message += near if near.startswith(", did") else ""
    if not name:
        return str(message)
    shown = f" (given: {problem['input']!r})" if isinstance(problem["input"], str | int | float) else ""
    inner = "".join(f".{part}" for part in problem["loc"][1:]) if problem["type"] == "open_setting" else ""
    where = f"{flag(name)}{inner}" if name in given or config is None else f"{name}{inner} in {config}"
    return f"{where}: {message}{shown}"
