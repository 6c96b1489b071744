"""What mkdocs does beside rendering: pages of the config schema and the commands, and links out of `docs/`.

Both reference pages are made from the code at each build, so that they cannot fall behind it.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typing_extensions import TypeAliasType

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/config.md", content=config_page()))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A link to a file of the repository outside `docs/` becomes its path, which a reader of the site can look up."""
    depth = page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        steps = target.count("../")
        if steps <= depth:
            return match[0]  # inside docs/
        path = target.rpartition("../")[2].rstrip("/")
        if not (ROOT / path).exists():
            raise SystemExit(f"docs/{page.file.src_uri}: the link {target} leads to no file of the repository")
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)


def config_page() -> str:
    """The schema of a profile, a sweep, a sequence and a customisation: a table for each section."""
    from qadapter.config.continual import Continual
    from qadapter.config.customization import Customization
    from qadapter.config.experiment import Experiment
    from qadapter.config.sweep import Sweep

    parts = [
        "# Config schema",
        "Generated from the code. Profiles are the files `configs/*.yaml`, sweeps `configs/sweep/*.yaml`, sequences "
        "`configs/continual/*.yaml`, customisations `configs/customize/*.yaml`. Keys that are not listed here are "
        "errors, except in `lora`, `model` and `trainer`, which take further fields of the libraries (command.md).",
    ]
    seen: dict[type[BaseModel], None] = {}
    sections = (("Profile", Experiment), ("Sweep", Sweep), ("Sequence", Continual), ("Customisation", Customization))
    for title, model in sections:
        parts += [f"## {title}", *(_section(one) for one in _models(model, seen))]
    return "\n\n".join(parts) + "\n"


def _models(model: type[BaseModel], seen: dict[type[BaseModel], None]) -> Iterator[type[BaseModel]]:
    """A model and those of its fields, each once."""
    if model in seen:
        return
    seen[model] = None
    yield model
    for field in model.model_fields.values():
        for inner in _classes(field.annotation):
            yield from _models(inner, seen)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _classes(argument)


def _section(model: type[BaseModel]) -> str:
    doc = inspect.getdoc(model) or ""
    about, _, attributes = doc.partition("Attributes:")
    described = _attributes(attributes)
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        rows.append(
            f"| `{field.alias or name}` | {_cell(_type(field.annotation, field.metadata))} | {_default(field)} "
            f"| {_cell(described.get(name, field.description or ''))} |"
        )
    return "\n\n".join([f"### {model.__name__}", about.strip(), "\n".join(rows)])


def _attributes(text: str) -> dict[str, str]:
    """The `Attributes:` section of a docstring: name → text; `a, b: text` is of both."""
    found: dict[str, str] = {}
    for match in re.finditer(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", text, flags=re.M):
        for name in match[1].split(","):
            found[name.strip()] = " ".join(match[2].split())
    return found


def _type(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """A type as a reader of YAML would say it, with its limits; sections are links."""
    if isinstance(annotation, TypeAliasType):
        return _type(annotation.__value__, limits)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner, *more = arguments
        own = [limit for each in more for limit in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return _type(inner, [*limits, *own])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [_type(one, limits) for one in arguments if one is not type(None)]
        return " or ".join([*kinds, *(["nothing"] if len(kinds) < len(arguments) else [])])
    if origin is dict:
        return f"names → {_type(arguments[1])}"
    if origin in (tuple, list):
        of = dict.fromkeys(_type(one) for one in arguments if one is not Ellipsis)
        return f"list of {', '.join(of)}{_limits(limits)}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return words.get(annotation, f"`{getattr(annotation, '__name__', annotation)}`") + _limits(limits)


def _limits(limits: Sequence[Any]) -> str:
    """` ≥ 1`, of pydantic's and annotated_types' metadata; patterns and functions are left to the error message."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    found = [f"{sign} {getattr(limit, name)}" for limit in limits for name, sign in signs.items() if _has(limit, name)]
    return f", {', '.join(found)}" if found else ""


def _has(limit: Any, name: str) -> bool:
    return not inspect.isclass(limit) and getattr(limit, name, None) is not None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        return "its defaults"
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return f"`{_cell(json.dumps(plain, ensure_ascii=False))}`"


def _cell(text: str) -> str:
    """Text in a table: no bars, no line ends, no HTML outside code."""
    pieces = text.replace("|", "\\|").replace("\n", " ").split("`")
    return "`".join(piece if i % 2 else piece.replace("<", "&lt;") for i, piece in enumerate(pieces))


def commands_page() -> str:
    """`--help` of `qadapter` and of each of its commands."""
    overview = _help()
    names = re.findall(r"^[│|]?\s{1,4}([a-z][a-z-]+)\s{2,}\S", overview, flags=re.M)
    parts = [
        "# Commands",
        "Generated from the code: the output of `qadapter --help` and of each command's `--help`.",
        _block(overview),
    ]
    for name in dict.fromkeys(names):
        parts += [f"## qadapter {name}", _block(_help(name))]
    return "\n\n".join(parts) + "\n"


def _help(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qadapter", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
    )
    if done.returncode:
        raise SystemExit(f"qadapter {' '.join(command)} --help failed: {done.stderr}")
    return done.stdout


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
