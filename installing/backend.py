"""setuptools' build backend, which tells `setup.py` a checkout (`pip install -e`) from a wheel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


@contextmanager
def _checkout() -> Iterator[None]:
    os.environ["QADAPTER_CHECKOUT"] = "1"
    try:
        yield
    finally:
        del os.environ["QADAPTER_CHECKOUT"]


def build_editable(*arguments: Any, **options: Any) -> str:
    """The hook behind `pip install -e`."""
    with _checkout():
        return build_meta.build_editable(*arguments, **options)


def prepare_metadata_for_build_editable(*arguments: Any, **options: Any) -> str:
    """The hook before it, whose entry points and requirements pip takes."""
    with _checkout():
        return build_meta.prepare_metadata_for_build_editable(*arguments, **options)
