"""The code that a task's functions are in: the module that each of them names, and what that module imports.

Nothing is imported: source files are parsed. The standard library and installed packages are left out, because the
versions of the libraries that matter are part of every stage's key.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from qadapter.errors import QAdapterError

_OURS = "qadapter"
_INSTALLED = {"site-packages", "dist-packages"}


def code_of(functions: Iterable[str], place: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The modules and files behind some functions, each once.

    Args:
        functions: dotted names as in YAML's `!function`.
        place: folder of the definition; a module beside it is preferred, as lm-eval does.

    Returns:
        Dotted names of this project's modules, which are not followed further (a digest of one covers its imports),
        and the files of the others with the files that they import in turn.

    Raises:
        QAdapterError: one of the files is no Python source.
    """
    modules: dict[str, None] = {}
    files: dict[Path, None] = {}
    waiting = []
    for function in functions:
        name = function.rpartition(".")[0]
        beside = place / f"{name.replace('.', '/')}.py"
        if beside.is_file():
            waiting.append(beside)
        elif name.partition(".")[0] == _OURS:
            modules[name] = None
        elif (file := _importable(name)) is not None:
            waiting.append(file)
    while waiting:
        file = waiting.pop(0)
        if file in files:
            continue
        files[file] = None
        if _installed(file) or file.suffix != ".py":
            continue  # a task may name a function of a package: its file is named, its imports are not followed
        for name, folder in _imports(file):
            parts = name.split(".")
            above = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]  # a.b.c, a.b, a
            if folder is None and parts[0] == _OURS:  # the last part may be something within a module
                modules |= dict.fromkeys([next(one for one in above if _importable(one) is not None)])
                continue
            for one in above:
                found = _below(folder or file.parent, one) or (_importable(one) if folder is None else None)
                if found is not None and not _installed(found):
                    waiting.append(found)
    return tuple(modules), tuple(files)


def _imports(file: Path) -> Iterator[tuple[str, Path | None]]:
    """What a source file imports: dotted name, and for a relative import the folder that it counts from.

    `from a.b import c` is `a.b.c`, which may be a module or something within `a.b`.
    """
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise QAdapterError(f"{file}, line {error.lineno}: {error.msg}; a task's functions need this file") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else None
            yield from ((".".join(filter(None, [node.module, alias.name])), folder) for alias in node.names)


def _below(folder: Path, module: str) -> Path | None:
    """The source file of a module whose name counts from a folder."""
    path = folder.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _importable(module: str) -> Path | None:
    """The file of a module on Python's path; only its top-level name is asked for, which imports nothing."""
    top, _, rest = module.partition(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if rest:
        roots = spec.submodule_search_locations or ()
        return next((file for root in roots if (file := _below(Path(root), rest)) is not None), None)
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def _installed(file: Path) -> bool:
    return bool(_INSTALLED & set(file.parts)) or file.is_relative_to(sysconfig.get_path("stdlib"))
