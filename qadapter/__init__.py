"""Customise a language model to new preferences without forgetting: the method, as a library.

The public names are those that `__init__.pyi` imports. Each is loaded when it is first used, so `import qadapter`
costs nothing. The list is not in this file on purpose. A stage's key counts the `__init__` of every package that its
code lies in: one more name here would compute all stages again, and import statements would tie all modules together.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def _public() -> dict[str, str]:
    """Public name → module that defines it, as the stub's import lines say."""
    import ast
    import pkgutil

    stub = pkgutil.get_data(__name__, "__init__.pyi")
    assert stub is not None, "__init__.pyi lies beside this file"
    return {
        alias.name: node.module
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{__name__}.")
        for alias in node.names
    }


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("qadapter-pipeline")
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name.startswith("__") and name != "__all__":  # what import machinery asks for
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = _public()
    if name == "__all__":
        return sorted([*public, "__version__"])
    if name not in public:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(public[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_public(), "__version__"})
