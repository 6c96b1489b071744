"""What mkdocs does beside rendering: pages of the config schema and the commands, and links out of `docs/`.

Both reference pages are made from the code at each build, so that they cannot fall behind it.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

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
    """The schema of a profile, a sweep and a customisation: a table for each section."""
    from qadapter.config.customization import Customization
    from qadapter.config.experiment import Experiment
    from qadapter.config.sweep import Sweep

    parts = [
        "# Config schema",
        "Made from the code. Every file in `configs/` is one of these; a key that is not listed here is refused.",
    ]
    seen: dict[type[BaseModel], None] = {}
    for title, model in (("Profile", Experiment), ("Sweep", Sweep), ("Customisation", Customization)):
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
    told = _attributes(attributes)
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        rows.append(
            f"| `{field.alias or name}` | {_type(field)} | {_default(field)} "
            f"| {_cell(told.get(name, field.description or ''))} |"
        )
    return "\n\n".join([f"### {model.__name__}", about.strip(), "\n".join(rows)])


def _attributes(text: str) -> dict[str, str]:
    """The `Attributes:` section of a docstring: name → text; `a, b: text` is of both."""
    found: dict[str, str] = {}
    for match in re.finditer(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", text, flags=re.M):
        for name in match[1].split(","):
            found[name.strip()] = " ".join(match[2].split())
    return found


def _type(field: FieldInfo) -> str:
    text = getattr(field.annotation, "__name__", "") if inspect.isclass(field.annotation) else str(field.annotation)
    text = re.sub(r"typing\.|qadapter\.[\w.]+\.|<class '([^']+)'>", r"\1", text)
    return f"`{_cell(text)}`"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    return "see its section" if isinstance(value, BaseModel) else f"`{_cell(repr(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("{", "&#123;").replace("<", "&lt;")


def commands_page() -> str:
    """`--help` of `qadapter` and of each of its commands."""
    overview = _help()
    names = re.findall(r"^[│|]?\s{1,4}([a-z][a-z-]+)\s{2,}\S", overview, flags=re.M)
    parts = [
        "# Commands",
        "Made from the code: what `qadapter --help` and each command's own `--help` print.",
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
