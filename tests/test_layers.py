"""The house's rules, held by reading every import statement, lazy ones too, and by importing every module once."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tasks.stages.code_version import _imports
from tests.support.paths import PROJECT_ROOT

FLOORS = ("qadapter", "tasks", "flows")  # from the ground up
FILES = sorted(path.relative_to(PROJECT_ROOT) for floor in FLOORS for path in (PROJECT_ROOT / floor).rglob("*.py"))


def parse(file: Path) -> ast.Module:
    return ast.parse((PROJECT_ROOT / file).read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports: `from a.b import c` gives a.b and a.b.c."""
    package = list(file.parent.parts)
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offenders(files: list[Path], *forbidden: str) -> list[str]:
    return [
        f"{file}: {name}"
        for file in files
        for name in imports(file)
        if any(name == entry or name.startswith(f"{entry}.") for entry in forbidden)
    ]


def on_floor(*floors: str) -> list[Path]:
    return [file for file in FILES if file.parts[0] in floors]


def test_the_rules_see_the_files() -> None:
    assert len(FILES) > 20
    assert set(imports(Path("tasks/stages/store.py"))) >= {
        "tasks.stages.code_version",
        "qadapter.files.artifacts.Manifest",
        "filelock",
    }


@pytest.mark.slow
def test_the_library_does_not_know_the_pipeline() -> None:
    assert offenders(on_floor("qadapter"), "prefect", "mlflow") == []


@pytest.mark.slow
@pytest.mark.parametrize(("floor", "above"), [("qadapter", ("tasks", "flows")), ("tasks", ("flows",))])
def test_imports_go_down_only(floor: str, above: tuple[str, ...]) -> None:
    assert offenders(on_floor(floor), *above) == []


@pytest.mark.slow
def test_no_circle_of_imports() -> None:
    """Imports inside functions count, those for type checkers only do not."""
    files = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    graph = {
        name: {found for found in _imports(parse(file), name, file.stem == "__init__") if found in files} - {name}
        for name, file in files.items()
    }
    assert graph["flows.running.plan"] >= {"flows.full_paper_repro", "flows.running.stage_costs"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.slow
def test_six_files_know_mlflow() -> None:
    """Its store, logged models and monitors of a machine; two its format of models; one the server of its pages."""
    names = ("store", "logged_models", "system_metrics", "models", "served_policy")
    knowing = [*(Path(f"tasks/tracking/{name}.py") for name in names), Path("flows/commands/mlflow_app.py")]
    assert offenders([file for file in FILES if file not in knowing], "mlflow") == []
    assert offenders([knowing[-1]], "mlflow") == [
        "flows/commands/mlflow_app.py: mlflow.server.fastapi_app",
        "flows/commands/mlflow_app.py: mlflow.server.fastapi_app.app",
    ]


def test_a_served_model_needs_the_library_only() -> None:
    """MLflow runs a copy of this file where the pipeline is not installed."""
    assert offenders([Path("tasks/tracking/served_policy.py")], "tasks", "flows", "prefect") == []


@pytest.mark.slow
def test_only_trainings_and_the_judge_know_trls_trainers() -> None:
    shared = ("supervised", "regularised", "orthogonal", "pairwise", "own_replies")  # by several methods
    training = [Path("qadapter/judging/reward_training.py"), *(Path(f"qadapter/training/{name}.py") for name in shared)]
    others = [file for file in FILES if file not in training and file.parent != Path("qadapter/methods")]
    found = [name for file in others for name in imports(file) if name.startswith("trl.") and name.endswith("Trainer")]
    assert found == []
    head = Path("qadapter/training/reply_log_probs.py")  # what TRL adds to a model, not a trainer
    assert offenders([file for file in others if file != head], "trl.trainer", "trl.experimental") == []


@pytest.mark.slow
def test_what_reads_the_table_of_methods() -> None:
    """The schema, the report and the pipeline; not the rooms that methods train with, nor a method itself."""
    table, readers = "qadapter.methods.table", ("config", "report")
    library = [file for file in on_floor("qadapter") if file.parts[1] not in readers]
    assert offenders(library, table) == []
    rooms = [file for file in library if file.parts[1] not in ("methods", "command", "serving")]
    assert offenders(rooms, "qadapter.methods") == []
    low = ["base", "model", "training", "sources", "evaluation", "execution"]
    assert offenders([Path(f"qadapter/config/{name}.py") for name in low], "qadapter.methods") == []
    methods = [file for file in library if file.parts[1] == "methods"]
    assert offenders(methods, "qadapter.config.experiment", "qadapter.config.methods") == []


ONCE = {
    "did_you_mean": "qadapter/errors.py",
    "nearest": "qadapter/errors.py",
    "json_line": "qadapter/files/artifacts.py",
    "write_json_lines": "qadapter/files/artifacts.py",
    "read_named": "qadapter/config/reading.py",
    "load_pairs": "qadapter/preferences/pair.py",
    "shared_beginning": "qadapter/preferences/beginnings.py",
    "implied_margin": "qadapter/inference/pair_scores.py",
    "mean_margin": "qadapter/inference/pair_scores.py",
    "won": "qadapter/inference/pair_scores.py",
    "mlflow_name": "tasks/tracking/names.py",
}
"""Function → the one file that defines it."""


def test_what_several_rooms_need_is_defined_once() -> None:
    """By name, and by what a second definition would be made of."""
    texts = {file.as_posix(): (PROJECT_ROOT / file).read_text(encoding="utf-8") for file in FILES}
    defined = [(name, file) for file, text in texts.items() for name in re.findall(r"^def (\w+)\(", text, re.MULTILINE)]
    assert sorted(entry for entry in defined if entry[0] in ONCE) == sorted(ONCE.items())
    assert [file for file, text in texts.items() if "import difflib" in text] == [ONCE["nearest"]]
    assert [file for file, text in texts.items() if "np.sign(" in text] == [ONCE["won"]]
    line = re.compile(r'json\.dumps\((?:[^()]|\([^()]*\))*\)(?:\.encode\(\))?\s*\+\s*b?"\\n"')
    written = {file: [found for found in line.findall(text) if "indent" not in found] for file, text in texts.items()}
    assert [file for file, found in written.items() if found] == [ONCE["json_line"]]


def test_the_ground_stands_on_nothing_of_ours() -> None:
    ground = [Path("qadapter/policy/objective.py"), Path("qadapter/preferences/pair.py"), Path("qadapter/errors.py")]
    ground.append(Path("qadapter/files/shown.py"))
    known = (": qadapter.errors", ": qadapter.files.shown")
    assert [entry for entry in offenders(ground, *FLOORS) if not any(name in entry for name in known)] == []
    assert offenders([Path("qadapter/files/shown.py")], *FLOORS) == []


def test_the_report_reads_measurements_not_models() -> None:
    report = [file for file in FILES if file.parts[:2] == ("qadapter", "report")]
    assert (
        offenders(report, "torch", "transformers", "peft", "trl", "qadapter.policy.model", "qadapter.policy.loading")
        == []
    )


def test_the_stage_store_is_light() -> None:
    light = [Path("tasks/stages/store.py"), Path("tasks/stages/code_version.py"), Path("qadapter/files/artifacts.py")]
    assert offenders(light, "torch", "transformers", "numpy", "pandas", "prefect", "mlflow") == []


def test_every_room_has_a_name_and_configs_hold_no_code() -> None:
    assert [file for file in FILES if file.stem in {"util", "utils", "helpers", "common", "misc"}] == []
    assert sorted((PROJECT_ROOT / "configs").rglob("*.py")) == []


@pytest.mark.slow
def test_no_module_changes_the_environment_when_imported() -> None:
    """Except that MLflow's telemetry must be off before MLflow is imported."""
    found = []
    for file in FILES:
        for node in parse(file).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            text = ast.unparse(node)
            if "environ" in text and ("setdefault" in text or "update" in text or "environ[" in text.split("=")[0]):
                found.append(f"{file}: {text}")
    assert found == ["tasks/tracking/__init__.py: os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')"]


IMPORT_ALL = """
import importlib, json, os, sys, threading
import psutil
sys.path.insert(0, sys.argv[1])
before = os.getcwd()
names = json.loads(sys.argv[2])
for name in names:
    if name.startswith("flows.") and name != "flows.running.of_computing":
        importlib.import_module(name)
heavy = [name for name in ("torch", "transformers", "peft", "trl", "lm_eval") if name in sys.modules]
for name in names:
    importlib.import_module(name)
me = psutil.Process()
sys.stderr.write("RESULT" + json.dumps({
    "heavy": heavy,
    "moved": os.getcwd() != before,
    "files": sorted(os.listdir(before)),
    "children": [child.name() for child in me.children(recursive=True)],
    "listening": [str(c.laddr) for c in me.net_connections() if c.status == psutil.CONN_LISTEN],
    "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon],
}))
"""


@pytest.mark.slow
def test_importing_does_nothing(tmp_path: Path) -> None:
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in FILES]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(PROJECT_ROOT), json.dumps(modules)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == ""
    assert json.loads(result.stderr.rpartition("RESULT")[2]) == {
        "heavy": [],  # a flow that finds every stage computes nothing; `of_computing` is for those that compute
        "moved": False,
        "files": [],
        "children": [],
        "listening": [],
        "threads": [],
    }
