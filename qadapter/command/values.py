"""What a flag's text means: lists, mappings, paths and numbers, as a config file would give them.

Each function takes the text of a flag, or the value of a YAML file, which it returns as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator

from qadapter.files.yaml_text import read_yaml


def listed(value: Any) -> Any:
    """`a,b` as a list, so that a flag can say what a YAML list says."""
    return value.split(",") if isinstance(value, str) else value


def repeated(value: Any) -> Any:
    """One value as a list of one."""
    return [value] if isinstance(value, str) else value


def json_value(value: Any) -> Any:
    """A JSON text as what it says, so that a flag can say what a YAML mapping says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error


def _modules(value: Any) -> Any:
    return value if value == "all-linear" else listed(value)


def _absolute(place: str) -> str:
    """A path that exists, absolute: it is written down, and read from other folders. Hub ids and URLs as they are."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


def exactly_one(values: tuple[str, ...]) -> tuple[str, ...]:
    """Raise ValueError unless there is one adapter."""
    if len(values) != 1:
        raise ValueError(f"expected one adapter, {len(values)} were given")
    return values


def from_here(path: str) -> str:
    """A path that need not exist, absolute."""
    return str(Path(path).expanduser().absolute())


def _named_folder(value: Any) -> Any:
    """`FOLDER`, or `NAME=FOLDER`, as name and folder; without a name it is the folder's own."""
    if not isinstance(value, str):
        return value
    name, equals, folder = value.partition("=")
    if not equals:
        name, folder = Path(value).resolve().name, value
    if not name or not folder:
        raise ValueError("expected FOLDER or NAME=FOLDER")
    return name, Path(folder).expanduser()


def _mapping(value: Any) -> Any:
    """A mapping as YAML text, or the name of a YAML file that holds it."""
    if not isinstance(value, str):
        return value
    file = Path(value).expanduser()
    try:
        text = file.read_text(encoding="utf-8") if "{" not in value and file.is_file() else value
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())[:200]}") from error
    found = _yaml(text)
    if not isinstance(found, dict):
        raise ValueError("a mapping such as '{prompt: question, chosen: a, rejected: b}' or a YAML file was expected")
    return found


def _yaml(text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())[:200]}") from error


def assigned(value: Any) -> Any:
    """Fields and values as a YAML mapping, the name of a YAML file, or `name=value,other=value`."""
    if not isinstance(value, str) or "=" not in value or "{" in value:
        return _mapping(value)
    found: dict[str, Any] = {}
    for item in value.split(","):
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"expected name=value,other=value or a mapping such as '{{name: value}}', not {item!r}")
        found[name.strip()] = _yaml(text)
    return found


Assigned = Annotated[dict[str, Any], BeforeValidator(assigned)]
Mapped = Annotated[dict[str, Any] | None, BeforeValidator(_mapping)]
Place = Annotated[str, AfterValidator(_absolute)]
Places = Annotated[tuple[Place, ...], BeforeValidator(repeated)]
ServedAdapter = Annotated[tuple[str, Path], BeforeValidator(_named_folder)]
Strings = Annotated[tuple[str, ...], BeforeValidator(repeated)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(listed)]
Modules = Annotated[str | tuple[str, ...], BeforeValidator(_modules)]
