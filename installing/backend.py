"""setuptools' build backend, which tells `setup.py` a checkout (`pip install -e`) from a wheel."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta

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
def _building(*, checkout: bool) -> Iterator[None]:
    """Run one hook of setuptools, and remove the `.egg-info` folder that the hook writes next to the sources.

    Python started in the project folder would find that folder before the installed metadata. A wheel's has no entry
    points of the pipeline, so Prefect would not find the project's plugin.
    """
    if checkout:
        os.environ["QADAPTER_CHECKOUT"] = "1"
    try:
        yield
    finally:
        os.environ.pop("QADAPTER_CHECKOUT", None)
        for folder in Path().glob("*.egg-info"):
            shutil.rmtree(folder, ignore_errors=True)


def get_requires_for_build_editable(*arguments: Any, **options: Any) -> list[str]:
    """What the next two hooks need; pip calls it first."""
    with _building(checkout=True):
        return list(build_meta.get_requires_for_build_editable(*arguments, **options))


def prepare_metadata_for_build_editable(*arguments: Any, **options: Any) -> str:
    """The hook whose entry points and requirements pip takes for `pip install -e`."""
    with _building(checkout=True):
        return str(build_meta.prepare_metadata_for_build_editable(*arguments, **options))


def build_editable(*arguments: Any, **options: Any) -> str:
    """The hook behind `pip install -e`."""
    with _building(checkout=True):
        return str(build_meta.build_editable(*arguments, **options))


def get_requires_for_build_wheel(*arguments: Any, **options: Any) -> list[str]:
    """What the next two hooks need."""
    with _building(checkout=False):
        return list(build_meta.get_requires_for_build_wheel(*arguments, **options))


def prepare_metadata_for_build_wheel(*arguments: Any, **options: Any) -> str:
    """The hook whose entry points and requirements pip takes for a wheel."""
    with _building(checkout=False):
        return str(build_meta.prepare_metadata_for_build_wheel(*arguments, **options))


def build_wheel(*arguments: Any, **options: Any) -> str:
    """The hook behind `pip wheel` and `pip install .`."""
    with _building(checkout=False):
        return str(build_meta.build_wheel(*arguments, **options))


def get_requires_for_build_sdist(*arguments: Any, **options: Any) -> list[str]:
    """What the next hook needs."""
    with _building(checkout=False):
        return list(build_meta.get_requires_for_build_sdist(*arguments, **options))


def build_sdist(*arguments: Any, **options: Any) -> str:
    """The hook behind `python -m build --sdist`."""
    with _building(checkout=False):
        return str(build_meta.build_sdist(*arguments, **options))
