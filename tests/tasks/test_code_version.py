"""A digest of code: comments do not change it; every line that a stage can reach does."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tasks.stages import code_version
from tasks.stages.code_version import code_digest, edited_modules
from tests.support.paths import PROJECT_ROOT


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small project `housing` in place of ours, found through sys.path and never imported."""
    root = tmp_path / "src"
    (root / "housing" / "rooms").mkdir(parents=True)
    files = {
        "housing/__init__.py": "",
        "housing/rooms/__init__.py": "",
        "housing/rooms/main.py": '"""Doc."""\nimport json\nfrom housing.rooms import lazy as _l\n\ndef go():\n'
        '    """Doc."""\n    from ..deep import thing  # why\n    return 1 + 1\n',
        "housing/rooms/lazy.py": "VALUE = 1\n",
        "housing/rooms/stranger.py": "VALUE = 1\n",
        "housing/rooms/template.txt": "hello",
        "housing/deep.py": "from housing import deeper\nthing = 1\n",
        "housing/deeper.py": "import housing.rooms.main\nVALUE = 1\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(code_version, "_OURS", ("housing",))
    forget(monkeypatch, tmp_path / "parsed.json")
    importlib.invalidate_caches()
    yield root / "housing"
    assert "housing" not in sys.modules


def forget(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    """Be a process that has parsed nothing yet, with a file of what others have."""
    code_version._read.cache_clear()
    monkeypatch.setattr(code_version._Parsed, "FILE", kept)
    monkeypatch.setattr(code_version._Parsed, "_known", None)
    monkeypatch.setattr(code_version._Parsed, "_asked", set())
    monkeypatch.setattr(code_version, "_FIRST", {})


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 1_000_000))  # same size and the same tick of a coarse clock


def test_comments_docstrings_and_layout_do_not_change_the_digest(code: Path) -> None:
    before = code_digest("housing.rooms.main")
    rewrite(code / "rooms/main.py", "# why", "# because of the lease, says §4")
    rewrite(code / "rooms/main.py", '"""Doc."""', '"""Much better said."""')
    rewrite(code / "rooms/main.py", "return 1 + 1", "return (\n        1\n        + 1\n    )")
    assert code_digest("housing.rooms.main") == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rooms/main.py", "1 + 1", "1 + 2"),
        ("rooms/lazy.py", "1", "2"),
        ("deep.py", "thing = 1", "thing = 2"),
        ("deeper.py", "VALUE = 1", "VALUE = 2"),
        ("rooms/__init__.py", "", "VALUE = 1"),
        ("rooms/template.txt", "hello", "goodbye"),
    ],
    ids=["itself", "from-import", "lazy relative import", "two steps away", "package", "data file"],
)
def test_changed_code_changes_the_digest(code: Path, file: str, old: str, new: str) -> None:
    before = code_digest("housing.rooms.main")
    rewrite(code / file, old, new) if old else (code / file).write_text(new)
    assert code_digest("housing.rooms.main") != before


@pytest.mark.parametrize("looked_at", [True, False], ids=["looked at before the edit", "first looked at after it"])
def test_code_that_is_edited_after_it_was_loaded_is_named(
    code: Path, looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "housing.deep", ModuleType("housing.deep"))
    monkeypatch.setattr(code_version, "_BEGUN", time.time() - 60)
    for file in code.rglob("*.py"):
        date(file, -120)
    if looked_at:
        assert edited_modules("housing.rooms.main") == []
        rewrite(code / "deep.py", "thing = 1", "thing = 1  # no other code")
        assert edited_modules("housing.rooms.main") == []
    for file in ("deep.py", "deeper.py"):  # the second is not loaded: this process will load what is there then
        rewrite(code / file, " = 1", " = 2")
        date(code / file, -1)
    assert edited_modules("housing.rooms.main") == ["housing.deep"]
    if looked_at:
        rewrite(code / "deep.py", "thing = 2", "thing = 1")
        assert edited_modules("housing.rooms.main") == []


def test_code_with_a_date_in_the_future_was_not_edited(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some archives unpack with one: such a checkout would be refused for hours."""
    monkeypatch.setitem(sys.modules, "housing.deep", ModuleType("housing.deep"))
    for file in code.rglob("*.py"):
        date(file, 7200)
    assert edited_modules("housing.rooms.main") == []


def date(file: Path, seconds: float) -> None:
    """Give a file a date so many seconds from now."""
    os.utime(file, (time.time() + seconds, time.time() + seconds))


def test_what_another_process_parsed_is_not_parsed_again(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content: code that has changed is parsed, also with the file's old date; only that, and it is kept."""
    kept, parse, parsed = tmp_path / "parsed.json", ast.parse, []

    def counted(content: bytes, filename: str) -> Any:
        parsed.append(filename)
        return parse(content, filename=filename)

    monkeypatch.setattr(ast, "parse", counted)
    before = code_digest("housing.rooms.main")
    assert len(parsed) == 6
    forget(monkeypatch, kept)
    assert code_digest("housing.rooms.main") == before
    assert len(parsed) == 6
    times = (code / "deeper.py").stat()
    rewrite(code / "deeper.py", "VALUE = 1", "VALUE = 2")
    os.utime(code / "deeper.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        forget(monkeypatch, kept)
        assert code_digest("housing.rooms.main") != before
        assert parsed[6:] == ["housing.deeper"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept.unlink(),
        lambda kept: kept.write_bytes(kept.read_bytes()[:-9]),
        lambda kept: kept.write_text("[1, 2]"),
        lambda kept: kept.write_text(kept.read_text().replace('"by": "', '"by": "of other code ')),
        lambda kept: (kept.unlink(), kept.mkdir()),
    ],
    ids=["lost", "cut", "no object", "another version", "a folder"],
)
def test_without_it_everything_is_parsed(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    before, kept = code_digest("housing.rooms.main"), tmp_path / "parsed.json"
    damage(kept)
    forget(monkeypatch, kept)
    assert code_digest("housing.rooms.main") == before
    assert not list(tmp_path.glob("*.part"))


def test_what_is_kept_does_not_grow_for_ever(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_version._Parsed, "MOST", 6)
    for number in range(2, 5):
        code_digest("housing.rooms.main")
        forget(monkeypatch, tmp_path / "parsed.json")
        (code / "deeper.py").write_text(f"import housing.rooms.main\nVALUE = {number}\n")
    code_digest("housing.rooms.main")
    assert len(json.loads((tmp_path / "parsed.json").read_text())["of"]) == 6


def test_imports_for_type_checkers_do_not_count(code: Path) -> None:
    main = code / "rooms/main.py"
    main.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from housing.rooms import stranger\n"
        "else:\n    from housing.rooms import lazy\n"
    )
    before = code_digest("housing.rooms.main")
    rewrite(code / "rooms/stranger.py", "1", "2")
    assert code_digest("housing.rooms.main") == before
    rewrite(code / "rooms/lazy.py", "1", "2")
    assert code_digest("housing.rooms.main") != before


def test_a_module_that_is_not_imported_does_not_count(code: Path) -> None:
    before = code_digest("housing.rooms.main")
    rewrite(code / "rooms/stranger.py", "1", "2")
    assert code_digest("housing.rooms.main") == before


FUNCTION = """
def helper(x):
    return x + 1

def stranger(x):
    return x

def make(value):
    def compute(out, scratch):
        from housing.rooms.lazy import VALUE
        {line}
        return [helper(i) for i in range(VALUE)], value
    return compute
"""


def defined(**changes: str) -> Callable[..., Any]:
    """`compute` as a module of this project would define it, with changes to its source."""
    source = FUNCTION.format(line=changes.pop("line", "pass"))
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    space: dict[str, Any] = {"__name__": "housing.tasks"}
    exec(source, space)
    return space["make"](object())  # type: ignore[no-any-return]


def test_the_function_around_the_work_counts(code: Path) -> None:
    def digest(**changes: str) -> str:
        return code_digest("housing.deep", defined(**changes))

    before = digest()
    assert digest(line="pass  # a word more") == before
    assert digest(stranger="other") == before
    assert digest(line="value = 3") != before
    assert digest(**{"x + 1": "x + 2"}) != before, "a function beside it that it calls"
    rewrite(code / "rooms/lazy.py", "1", "2")
    assert digest() != before, "a module that only the function imports"
    assert code_digest("housing.deep") != before


def test_a_function_from_the_library_stands_for_its_module(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_version, "_LIBRARY", "housing")

    def imported() -> None:
        raise AssertionError("never called")

    imported.__module__ = "housing.rooms.stranger"

    class Settings:
        pass

    Settings.__module__ = "housing.deeper"
    settings = Settings()

    def compute(out: Path, scratch: Path) -> None:
        imported()
        print(settings)

    before = code_digest("housing.rooms.lazy", compute)
    rewrite(code / "deeper.py", "VALUE = 1", "VALUE = 2")
    assert code_digest("housing.rooms.lazy", compute) == before, "an object is not code"
    before = code_digest("housing.deep", compute)
    rewrite(code / "rooms/stranger.py", "1", "2")
    assert code_digest("housing.deep", compute) != before
    assert code_digest("housing.deep", functools.partial(compute)) == code_digest("housing.deep", compute)


def test_an_unknown_module_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"qadapter\.nothing"):
        code_digest("qadapter.nothing")


def test_the_digest_of_the_real_project_is_stable_across_processes() -> None:
    program = "from tasks.stages.code_version import code_digest; print(code_digest('qadapter.preferences.pair'))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=PROJECT_ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {code_digest("qadapter.preferences.pair") + "\n"}
