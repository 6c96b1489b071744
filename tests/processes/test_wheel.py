"""The wheel is the library alone, whole, and works in an empty folder; an editable checkout is the pipeline too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.paths import PROJECT_ROOT
from tests.support.quiet import noise
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

NEEDED = ("qadapter", "tasks", "flows", "configs", "installing", "setup.py", "pyproject.toml", "README.md", "LICENSE")
HOOK = """
import sys
sys.path.insert(0, "installing")
import backend
getattr(backend, sys.argv[1])(*sys.argv[2:])
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from: building writes into its folder, and stale files there would reach the wheel."""
    folder = tmp_path_factory.mktemp("sources")
    for name in NEEDED:
        origin = PROJECT_ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by pip from the sources, without a network."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    pip(["wheel", *options, str(sources)])
    (file,) = out.glob("*.whl")
    return file


def pip(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment with the wheel, which sees the packages that are installed here, but no checkout."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    pip(["--python", str(home / "bin" / "python"), "install", "--no-deps", "--no-index", "--quiet", str(wheel)])
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "base.pth").write_text("\n".join(seen) + "\n")  # a .pth's own lines add no .pth of theirs
    return home / "bin"


def run(program: Path, *arguments: str, folder: Path) -> tuple[str, str]:
    """What a program prints in a folder, and its errors, without anything of this process's Python paths."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(program), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_the_wheel_holds_the_library_whole_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"qadapter", f"qadapter_pipeline-{version()}.dist-info"}
    expected = {
        file.relative_to(PROJECT_ROOT).as_posix()
        for file in (PROJECT_ROOT / "qadapter").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    expected |= {
        f"qadapter/{file.relative_to(PROJECT_ROOT).as_posix()}"
        for file in (PROJECT_ROOT / "configs").rglob("*")
        if file.is_file()
    }
    assert {name for name in names if name.startswith("qadapter/")} == expected
    assert {"qadapter/py.typed", "qadapter/__init__.pyi", "qadapter/configs/smoke.yaml"} <= expected


def test_the_wheel_needs_the_pipelines_packages_only_for_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        required = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        points = archive.read(name).decode()
    assert points.split() == ["[console_scripts]", "qadapter", "=", "qadapter.command.parser:main"]
    extras: dict[str, set[str]] = {}
    for line in required:
        package = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower()
        extra = re.search(r'extra == "([a-z]+)"', line)
        extras.setdefault(extra[1] if extra else "", set()).add(package)
    assert extras["pipeline"] == {"prefect", "mlflow", "tenacity", "fastapi", "sqlalchemy"}
    assert not {"prefect", "mlflow", "sqlalchemy", "bitsandbytes"} & extras[""]
    assert extras["quantized"] == {"bitsandbytes"}
    assert not [line for line in required if "extra" not in line and "==" in line]  # exact pins are the pipeline's


def test_every_import_of_the_library_is_a_requirement() -> None:
    """What a wheel needs is written down; the rest is optional and imported where it is used."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in (PROJECT_ROOT / "qadapter").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) ([A-Za-z_]+)", text, flags=re.M))
    providers = metadata.packages_distributions()
    project = (PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    base = project.partition("\ndependencies = [")[2].partition("\n]\n")[0]
    declared = {normal(re.split(r"[\[<>=~ ]", name)[0]) for name in re.findall(r'^    "([^"]+)"', base, flags=re.M)}
    needed = {
        name: {normal(each) for each in providers[name]}
        for name in imported & set(providers) - {"qadapter", "tasks", "flows"}
    }
    assert {"torch", "yaml", "typer", "peft"} <= set(needed)
    missing = {name for name, given in needed.items() if not given & declared}
    assert missing <= {"bitsandbytes"}, "add it to pyproject.toml's dependencies"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def version() -> str:
    found = re.search(r'^version = "(.*)"$', (PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    assert found is not None
    return found[1]


def test_a_checkout_installs_the_pipeline_too(sources: Path, tmp_path: Path) -> None:
    """As pip does it: each hook in a process of its own."""
    for hook in (["get_requires_for_build_editable"], ["prepare_metadata_for_build_editable", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-c", HOOK, *hook], cwd=sources, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.glob("*.dist-info")
    found = {(point.group, point.name, point.value) for point in metadata.Distribution.at(folder).entry_points}
    assert found == {
        ("console_scripts", "qadapter", "qadapter.command.parser:main"),
        ("prefect.plugins", "qadapter-deployments", "flows.prefect_host.deployment_names"),
        ("mlflow.app", "qadapter", "flows.commands.mlflow_app:create_app"),
    }
    assert set((folder / "top_level.txt").read_text().split()) == {"qadapter", "tasks", "flows"}
    # Python started in the checkout would find these first, without the pipeline's entry points.
    assert not list(sources.glob("*.egg-info"))


@pytest.mark.slow
def test_the_installed_command_trains_and_evaluates(installed: Path, tmp_path: Path) -> None:
    """`qadapter --help`, `train` and `eval` in a folder that has a model and pairs and nothing else."""
    shown, _ = run(installed / "qadapter", "--help", folder=tmp_path)
    listed = re.findall(r"^  ([a-z][a-z-]*)  ", shown, flags=re.M)
    assert listed[:9] == ["train", "generate", "score", "data", "chat", "export", "dial", "serve", "eval"]
    assert not {"run", "sweep", "customize", "up"} & set(listed)
    program = (
        "import importlib.util as u, qadapter, qadapter.config.experiment as e; "
        "print(qadapter.__version__, qadapter.__file__, u.find_spec('tasks'), u.find_spec('flows'), *e.profiles()); "
        "e.load_experiment('smoke')"
    )
    found, where, *others = run(installed / "python", "-c", program, folder=tmp_path)[0].split()
    assert found == version()
    assert Path(where).is_relative_to(installed.parent)
    assert others == ["None", "None", "arena", "arena-small", "mini", "paper", "small", "smoke"]

    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    pairs = [{"prompt": f"Thing {i}?", "chosen": "Look and see.", "rejected": "Green."} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sizes = ["--max-steps", "1", "--batch-size", "2", "--max-length", "64", "--lora-rank", "2"]
    printed, errors = run(
        installed / "qadapter",
        *("train", "--base", "base", "--data", "pairs.jsonl", "--output", "out", *sizes),
        folder=tmp_path,
    )
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train/steps"] == 1
    assert "100%" in errors  # the progress bar
    assert noise(printed + errors) == []
    (tmp_path / "benchmarks").mkdir()
    rows = [{"text": "a few words"}, {"text": "and a few more"}]
    (tmp_path / "benchmarks" / "some_text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--tasks", "some_bits_per_byte", "--data", ".", "--batch_size", "2"]
    printed, _ = run(
        installed / "qadapter",
        *("eval", "run", "--model", "qadapter", "--model_args", "pretrained=out", *task),
        folder=tmp_path,
    )
    assert re.search(r"some_bits_per_byte\|.*bits_per_byte\|[^|]*\|\s*[\d.]+", printed)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and what it looks at."""
    (tmp_path / "installing").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "installing/backend.py", "constraints.txt"):
        shutil.copy(PROJECT_ROOT / name, tmp_path / name)
    return tmp_path


def test_make_installs_into_its_own_environment_only(clone: Path) -> None:
    """One that is a link belongs to another clone, even if it is older than this clone's files."""

    def planned() -> str:
        command = ["make", "--dry-run", "--no-print-directory", "check"]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout

    assert 'pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[pipeline,dev,docs]"' in planned()
    (clone / "elsewhere").mkdir()
    (clone / ".venv").symlink_to("elsewhere")
    assert planned().split() == [*".venv/bin/python -m qadapter check --config".split(), '"smoke"']
