"""What `from qadapter import …` gives, that importing the package alone costs nothing, and that no stage counts it."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qadapter
from qadapter.errors import QAdapterError, did_you_mean
from tasks.stages import code_version
from tests.support.paths import PROJECT_ROOT

NAMES = [
    "Dial",
    "Objective",
    "PreferencePair",
    "QAdapterConfig",
    "QAdapterError",
    "QAdapterForCausalLM",
    "QAdapterTrainer",
    "__version__",
    "generate_replies",
    "load_base",
    "load_pairs",
    "load_policy",
    "preference_metrics",
    "score_pairs",
]


def test_the_public_names_are_these() -> None:
    assert qadapter.__all__ == NAMES
    assert set(NAMES) <= set(dir(qadapter))
    for name in NAMES[:-1]:
        assert getattr(qadapter, name) is not None, name
    assert qadapter.QAdapterError is QAdapterError
    everything: dict[str, object] = {}
    exec("from qadapter import *", everything)
    assert set(NAMES) <= set(everything)


def test_public_objects_live_where_the_stub_says() -> None:
    """Each line imports the name from the module that defines it, not from one that happens to import it."""
    stub = ast.parse((PROJECT_ROOT / "qadapter" / "__init__.pyi").read_text(encoding="utf-8"))
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert len(lines) == len(NAMES) - 1
    for node in lines:
        (alias,) = node.names
        assert alias.name == alias.asname  # the form that type checkers take for public
        found = getattr(importlib.import_module(str(node.module)), alias.name)
        assert found.__module__ == node.module


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'QAdaptor'"):
        qadapter.QAdaptor  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="QAdaptor"):
        exec("from qadapter import QAdaptor", {})
    assert not hasattr(qadapter, "__path_hooks__")


def test_importing_the_package_costs_nothing() -> None:
    """Neither torch nor anything else that is not Python's own, and few milliseconds."""
    code = (
        "import sys, time; before = set(sys.modules); start = time.perf_counter(); import qadapter; "
        "seconds = time.perf_counter() - start; dir(qadapter); qadapter.__version__; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(seconds, *sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT_ROOT, check=True)
    seconds, *modules = done.stdout.split()
    assert modules == ["qadapter"]
    assert float(seconds) < 0.2


def test_no_stage_depends_on_the_public_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name more, or another module behind one, computes nothing again."""
    read: list[str] = []
    real = code_version._read

    def noted(module: str, *rest: object) -> tuple[str, tuple[str, ...]]:
        read.append(module)
        return real(module, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(code_version, "_read", noted)
    before = code_version.code_digest("qadapter.preferences.pair")
    assert {"qadapter", "qadapter.preferences.pair"} <= set(read)
    assert not {"qadapter.policy.model", "qadapter.training.trainer", "qadapter.inference.generate"} & set(read)

    shutil.copytree(PROJECT_ROOT / "qadapter", tmp_path / "qadapter", ignore=shutil.ignore_patterns("__pycache__"))
    original = code_version._file_of

    def in_the_copy(module: str) -> Path | None:
        found = original(module)
        return tmp_path / found.relative_to(PROJECT_ROOT) if found else None

    monkeypatch.setattr(code_version, "_file_of", in_the_copy)
    assert code_version.code_digest("qadapter.preferences.pair") == before
    stub = tmp_path / "qadapter" / "__init__.pyi"
    stub.write_text(stub.read_text(encoding="utf-8") + "from qadapter.gate import judge as judge\n", encoding="utf-8")
    assert code_version.code_digest("qadapter.preferences.pair") == before


def test_did_you_mean_names_one_or_lists_all() -> None:
    assert did_you_mean("smok", ["mini", "smoke"]) == ", did you mean 'smoke'?"
    assert did_you_mean("zzz", ["mini", "smoke"]) == "; known: mini, smoke"
    assert did_you_mean("zzz", []) == ""
    start = time.perf_counter()
    did_you_mean("smok", (f"name-{number}" for number in range(5000)))
    assert time.perf_counter() - start < 2
