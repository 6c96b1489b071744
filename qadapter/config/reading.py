"""How a config file is read: found by its name, parsed, changed by overrides, and checked against its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from qadapter.config.base import Settings
from qadapter.errors import QAdapterError, did_you_mean, nearest
from qadapter.files.shown import shown
from qadapter.files.yaml_text import read_yaml

S = TypeVar("S", bound=Settings)


def names_in(folder: Path) -> list[str]:
    """Names of the config files in a folder, sorted."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_named(
    schema: type[S], kind: str, name: str, folder: Path, overrides: Mapping[str, Any] | Sequence[str] | None = None
) -> S:
    """Read a config by its name or path, apply overrides, validate.

    Args:
        schema: what the file must be.
        kind: what a user calls it: `profile`, `sweep`.
        name: of a file in the folder, without its ending, or the path of a YAML file.
        folder: of the project's own files of this kind.
        overrides: see `parse_overrides`; None where this kind takes none.

    Raises:
        QAdapterError: no such file, or its content is invalid. The message lists every problem with its path.
    """
    file = _find(kind, name, folder)
    content = read_file(file)
    for path, value in parse_overrides(overrides or {}).items():
        _set(content, path, deepcopy(value))  # a later override may change it, and the caller keeps the original
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        where = file.name if overrides is None else f"{file.name} and its overrides"
        raise QAdapterError(explain_problems(error, where, schema)) from error


def _find(kind: str, name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise QAdapterError(f"there is no file {name!r}; give the path of a {kind}, or one of these names: "
                                f"{', '.join(names_in(folder))}")  # fmt: skip
        return Path(name)
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = names_in(folder)
        near = nearest(name, known)
        raise QAdapterError(
            f"there is no {kind} {name!r}{f', did you mean {near[0]!r}?' if near else '.'} Known are "
            f"{', '.join(known)}; the path of a .yaml file is accepted too."
        )
    return file


def read_file(file: Path, option: str = "") -> dict[str, Any]:
    """The settings in a YAML file.

    Args:
        file: to read.
        option: what named the file, if a message should begin with it: `--config `.

    Raises:
        QAdapterError: the file cannot be read, is not YAML, or does not contain a mapping.
    """
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise QAdapterError(f"{option}{file} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QAdapterError(shown(f"{option}{file} is not YAML: {' '.join(str(error).split())}")) from error
    if not isinstance(content, dict):
        raise QAdapterError(f"{option}{file} contains {type(content).__name__}; expected a mapping of keys")
    return content


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Parse `["training.max_steps=5"]` into `{"training.max_steps": 5}`; a mapping is returned unchanged.

    Raises:
        QAdapterError: an override has no `=`, or its value is not YAML.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed: dict[str, Any] = {}
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise QAdapterError(
                f"override {item!r} is not of the form key.path=value, for example training.max_steps=5"
            )
        try:
            parsed[path.strip()] = read_yaml(text)
        except yaml.YAMLError as error:
            raise QAdapterError(shown(f"the value of override {item!r} is not YAML: {error}")) from error
    return parsed


def refuse_without_effect(where: str, changes: Mapping[str, Any], decided: Mapping[str, str]) -> None:
    """Refuse changes of settings that something else decides.

    Args:
        where: what decides: `sweep smoke`.
        changes: dotted keys to values.
        decided: dotted key → what decides it instead.

    Raises:
        QAdapterError: naming each one.
    """
    found = [f"{path} has no effect, because {why}; remove it" for path, why in decided.items() if _sets(changes, path)]
    if found:
        raise QAdapterError(f"{where}: {'; '.join(found)}")


def _sets(changes: Mapping[str, Any], path: str) -> bool:
    """Whether changes set a dotted key, by itself or as a part of a section."""
    if path in changes:
        return True
    section, _, last = path.rpartition(".")
    return bool(section) and isinstance(changes.get(section), Mapping) and last in changes[section]


def _set(settings: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = settings
    for i, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise QAdapterError(f"override {path}: {'.'.join(parents[: i + 1])} is a value and has no key {last!r}")
    node[last] = value


def explain_problems(error: ValidationError, where: str, schema: type[Settings]) -> str:
    """Describe the problems of a config, one per line: the key's path and what was expected. Secrets are masked.

    Args:
        error: the error that pydantic raised.
        where: what was read: `smoke.yaml and its overrides`.
        schema: the expected schema.
    """
    problems = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            message = f"unknown key{did_you_mean(str(problem['loc'][-1]), _keys_at(problem['loc'][:-1], schema))}"
        elif problem["type"] == "missing":
            message = "is required"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if isinstance(problem["input"], str | int | float | bool | None):
                message += f" (given: {problem['input']!r})"
        problems += [f"  {path}: {line}" if path else f"  {line}" for line in message.splitlines()]
    plural = "problem" if len(problems) == 1 else "problems"
    return shown(f"{len(problems)} {plural} in {where}:\n" + "\n".join(problems))


def _keys_at(location: Sequence[int | str], settings: type[Settings]) -> list[str]:
    """Known keys of the section at a location of the schema."""
    schema: Any = settings.model_json_schema()
    definitions = schema.get("$defs", {})

    def sections(node: Any) -> list[Any]:
        """The object schemas of a node, after resolving references and unions."""
        if "$ref" in node:
            return sections(definitions[node["$ref"].rsplit("/", 1)[1]])
        if "anyOf" in node:
            return [section for branch in node["anyOf"] for section in sections(branch)]
        return [node]

    nodes = [schema]
    for part in location:
        following = []
        for node in nodes:
            if str(part) in node.get("properties", {}):
                following += sections(node["properties"][str(part)])
            else:  # a mapping of names to sections
                named = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
                following += [section for entry in named if isinstance(entry, dict) for section in sections(entry)]
        nodes = following
    return [key for node in nodes for key in node.get("properties", {})]
