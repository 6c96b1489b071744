"""The version of the code that a stage runs: a digest that depends on the code, not on comments or docstrings."""

from __future__ import annotations

import ast
import contextlib
import dis
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json

_LIBRARY = "qadapter"
_OURS = (_LIBRARY, "tasks", "flows")


def code_digest(module: str, function: Callable[..., Any] | None = None) -> str:
    """sha256 of a module, a function, and all code of this project that they can reach.

    Modules are parsed, not imported, so torch is not loaded. The closure contains the module, every module of this
    project that it imports (including lazy imports inside functions, excluding those for type checkers only), their
    imports in turn, their packages, and the data files (YAML, templates) beside them. Python code enters as its syntax
    tree without docstrings, so comments and formatting do not matter. Modules are identified by dotted name, not path.

    Args:
        module: dotted name of the module that does a stage's work, for example `qadapter.training.pretraining`.
        function: the function that calls it. The digest covers its own instructions, those of functions of its module
            that it calls, and the modules of `qadapter` that it uses, but not the rest of its module.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digests = _closure(module, function)
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def edited_modules(module: str, function: Callable[..., Any] | None = None) -> list[str]:
    """Modules of a stage's code whose files were edited after this process had loaded them.

    What it computes now would be the old code's, while `code_digest` reads the files. A process that is forked has what
    its parent had loaded.
    """
    digests = _closure(module, function)
    return sorted(name for name, digest in digests.items() if name in sys.modules and _FIRST.get(name) != digest)


_BEGUN = time.time()
_FIRST: dict[str, str] = {}
"""The code of each module when it was first looked at; nothing of one that had been edited before, but was loaded."""


def _closure(module: str, function: Callable[..., Any] | None) -> dict[str, str]:
    """The digests of all code and data files that a module and a function reach (`code_digest`)."""
    if _file_of(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r} in {', '.join(_OURS)}", name=module)
    waiting: list[str] = [module]
    digests: dict[str, str] = {}
    if function is not None:
        waiting += _follow_function(function, digests)
    seen: set[str] = set()
    packages: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        file = _file_of(name)
        if file is None:
            continue
        status = file.stat()
        digest, imported = _read(name, file, status.st_mtime_ns, status.st_size)
        digests[name] = digest
        # A date in the future is no edit: some archives unpack with one.
        edited = _BEGUN < status.st_mtime <= time.time()
        _FIRST.setdefault(name, "" if name in sys.modules and edited else digest)
        packages.add(name if file.name == "__init__.py" else name.rpartition(".")[0])
        waiting += [*imported, *_parents(name)]
    _Parsed.keep()
    for package in packages:
        digests |= {f"{package}:{name}": digest for name, digest in _data_files(package)}
    return digests


def _follow_function(function: Callable[..., Any], digests: dict[str, str]) -> list[str]:
    """Add a function, and our functions that it calls, to `digests`; return the `qadapter` modules that it uses."""
    while isinstance(function, partial):
        function = function.func
    if not isinstance(function, FunctionType):
        function = getattr(type(function), "__call__", None)  # type: ignore[assignment]  # noqa: B004
        if not isinstance(function, FunctionType):
            return []
    label = f"function:{function.__module__}.{function.__qualname__}"
    if label in digests:
        return []
    names: set[str] = set()
    modules: list[str] = []
    parts: list[list[Any]] = []
    for code in _code_objects(function.__code__):
        plain = [repr(constant) for constant in code.co_consts if not isinstance(constant, CodeType | frozenset)]
        sets = [repr(sorted(map(repr, constant))) for constant in code.co_consts if isinstance(constant, frozenset)]
        parts.append([code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, plain, sets])
        names.update(code.co_names)
        package = ""
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME":
                package = str(step.argval)
                modules.append(package)
            elif step.opname == "IMPORT_FROM":
                modules.append(f"{package}.{step.argval}")
    digests[label] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    reached = [function.__globals__[name] for name in sorted(names & function.__globals__.keys())]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            reached.append(cell.cell_contents)
    for value in reached:
        if not isinstance(value, ModuleType | FunctionType | type):
            continue  # data: the stage's config covers what matters of it
        home = value.__name__ if isinstance(value, ModuleType) else value.__module__
        if home.partition(".")[0] == _LIBRARY:
            modules.append(home)
        elif isinstance(value, FunctionType) and home.partition(".")[0] in _OURS:
            modules += _follow_function(value, digests)
    return modules


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of everything defined inside it (comprehensions, lambdas)."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_objects(constant)


def _file_of(module: str) -> Path | None:
    """The source file of one of our modules, found without importing any package; None if it is not ours."""
    top, *rest = module.split(".")
    if top not in _OURS:
        return None
    spec = find_spec(top)  # a top-level name: nothing is imported
    for root in (spec.submodule_search_locations or ()) if spec else ():
        base = os.path.join(root, *rest)  # noqa: PTH118 - every stage asks for thousands of names
        for file in (f"{base}{os.sep}__init__.py", f"{base}.py"):
            if os.path.isfile(file):  # noqa: PTH113
                return Path(file)
    return None


def _parents(module: str) -> list[str]:
    """Importing a.b.c runs a and a.b as well."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


@lru_cache(maxsize=1024)
def _read(module: str, file: Path, _mtime: int, _size: int) -> tuple[str, tuple[str, ...]]:
    """Digest of one file's code and the modules of ours that it names; re-read when the file changes."""
    return _Parsed.of(module, file.read_bytes(), is_package=file.name == "__init__.py")


def _parse(module: str, content: bytes, is_package: bool) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(content, filename=module)
    imported = tuple(sorted(set(_imports(tree, module, is_package))))
    _drop_docstrings(tree)
    dump = ast.dump(tree, annotate_fields=False, include_attributes=False)
    return hashlib.sha256(dump.encode()).hexdigest(), imported


class _Parsed:
    """What `_parse` gave, by content, also in earlier processes; it lies beside what Python compiled of this module.

    To parse 400 modules takes a second and a half, to read them and this file 50 ms.
    """

    FILE = Path(__file__).parent / "__pycache__" / f"parsed.{sys.implementation.cache_tag}.json"
    MOST = 4096
    """Of more, those are kept that this process asked for: most others are of code that is no more."""
    _known: ClassVar[dict[str, tuple[str, tuple[str, ...]]] | None] = None
    _asked: ClassVar[set[str]] = set()
    _new: ClassVar[bool] = False

    @classmethod
    def of(cls, module: str, content: bytes, *, is_package: bool) -> tuple[str, tuple[str, ...]]:
        """What `_parse` gives."""
        known = cls._read()
        key = hashlib.sha256(json.dumps([module, is_package]).encode() + content).hexdigest()
        if key not in known:
            known[key] = _parse(module, content, is_package)
            cls._new = True
        cls._asked.add(key)
        return known[key]

    @classmethod
    def _read(cls) -> dict[str, tuple[str, tuple[str, ...]]]:
        if cls._known is None:
            cls._known = {}
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or damaged
                kept = json.loads(cls.FILE.read_bytes())
                if kept["by"] == cls._by():
                    cls._known = {str(key): (str(digest), tuple(names)) for key, (digest, names) in kept["of"].items()}
        return cls._known

    @classmethod
    def keep(cls) -> None:
        """Write what is new; where nothing can be written, each process parses for itself."""
        if not cls._new or cls._known is None:
            return
        cls._new = False
        known = {key: cls._known[key] for key in cls._asked} if len(cls._known) > cls.MOST else cls._known
        with contextlib.suppress(OSError, QAdapterError):
            write_json(cls.FILE, {"by": cls._by(), "of": known})

    @staticmethod
    def _by() -> str:
        """Which code parsed."""
        return hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that the imports of a module can load. Names that are not modules are ignored later."""
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*kept, *filter(None, [base])])
            yield base
            # `from package import name`: the name may be a module of the package or something defined in it.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node except those below `if TYPE_CHECKING:`, which only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]


def _data_files(package: str) -> Iterator[tuple[str, str]]:
    """Name and digest of a package's data files, including those in folders without code."""
    file = _file_of(package)
    if file is None:
        return
    waiting = [file.parent]
    while waiting:
        folder = waiting.pop()
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                if path.name != "__pycache__" and not (path / "__init__.py").exists():
                    waiting.append(path)
            elif path.suffix not in {".py", ".pyc", ".pyi", ".md"} and not path.name.startswith("."):
                status = path.stat()
                yield path.relative_to(file.parent).as_posix(), _data_digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _data_digest(path: Path, _mtime: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
