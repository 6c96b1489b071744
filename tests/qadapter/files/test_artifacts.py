"""Folders are whole or absent, digests depend on content alone, and damage is seen."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import (
    MANIFEST,
    Manifest,
    atomic_folder,
    digest_file,
    digest_tree,
    read_json,
    read_json_lines,
    remove_leftovers,
    storage_errors,
    write_json,
)
from tests.support.paths import PROJECT_ROOT


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def fail_half_way(final: Path, error: Exception) -> None:
    with atomic_folder(final) as out:
        (out / "a").write_text("1")
        raise error


def make_manifest(folder: Path) -> Manifest:
    return Manifest("train", "k" * 64, {"lr": 0.1}, {"data": "d"}, "c", {"torch": "1"}, seconds=1.5).write(folder)


def test_digest_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert digest_tree(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_digest_tree_sees_names_and_content_but_not_place_or_date(tmp_path: Path) -> None:
    first = fill(tmp_path / "one", a="1", sub__b="2")
    second = fill(tmp_path / "two", sub__b="2", a="1")
    os.utime(second / "a", (0, 0))
    same = digest_tree(first)
    assert digest_tree(second) == same
    (second / "a").write_text("x")
    assert digest_tree(second) != same
    assert digest_tree(fill(tmp_path / "three", a="1", sub__c="2")) != same
    # The boundary between a name and the next one's content cannot move.
    assert digest_tree(fill(tmp_path / "four", ab="1")) != digest_tree(fill(tmp_path / "five", a="b1"))


def test_digest_tree_follows_links_and_survives_a_loop(tmp_path: Path) -> None:
    target = fill(tmp_path / "target", x="1")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "data").symlink_to(target)
    (linked / "loop").symlink_to(linked)
    before = digest_tree(linked)
    (target / "x").write_text("2")
    assert digest_tree(linked) != before


def test_digest_tree_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"gone is missing.*Check the path"):
        digest_tree(tmp_path / "gone")


def test_json_round_trip_and_no_leftovers(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"α": [1, 2.5, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"α": [1, 2.5, None]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "is not JSON")])
def test_read_json_explains(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(QAdapterError, match=message):
        read_json(tmp_path / "a.json")


def test_json_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """Three characters that `str.splitlines` also takes for the end of a line, as they are."""
    (tmp_path / "a.jsonl").write_bytes('{"text": "a\u2028b\u2029c\x85d"}\r\n\n[1]\n2'.encode())
    assert read_json_lines(tmp_path / "a.jsonl") == [{"text": "a\u2028b\u2029c\x85d"}, [1], 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b'{}\n\n{"a": \n', r"is not JSON lines \(line 3: Expecting value.*Restore it"),
        ('"où"'.encode("latin-1"), r"is not JSON lines \(line 1: 'utf-8' codec.*Restore it"),
    ],
)
def test_read_json_lines_explains(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(QAdapterError, match=message):
        read_json_lines(tmp_path / "a.jsonl")


def test_no_module_splits_a_files_text_with_splitlines() -> None:
    """`splitlines` also splits inside JSON strings; `read_json_lines` does not."""
    files = [file for floor in ("qadapter", "tasks", "flows") for file in (PROJECT_ROOT / floor).rglob("*.py")]
    cutting = re.compile(r"read_text\([^()]*\)\.splitlines\(")
    assert [file.name for file in files if cutting.search(file.read_text(encoding="utf-8"))] == []


def test_atomic_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "final") as out:
        (out / "a").write_text("1")
        assert not (tmp_path / "deep" / "final").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["final"]
    assert (tmp_path / "deep" / "final" / "a").read_text() == "1"


def test_atomic_folder_leaves_nothing_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way(tmp_path / "final", RuntimeError("boom"))
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_refuses_or_replaces_an_existing_one(tmp_path: Path) -> None:
    final = fill(tmp_path / "final", old="1")
    with pytest.raises(QAdapterError, match="already exists"), atomic_folder(final):
        pass
    assert (final / "old").exists()
    with pytest.raises(RuntimeError), atomic_folder(final, replace=True):
        raise RuntimeError
    assert (final / "old").exists()
    with atomic_folder(final, replace=True) as out:
        (out / "new").write_text("2")
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_kill_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from qadapter.files.artifacts import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as out:\n"
        "    (out / 'a').write_text('1'); print('written', flush=True); time.sleep(60)\n"
    )
    final = tmp_path / "final"
    child = subprocess.Popen(
        [sys.executable, "-c", program, final], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not final.exists()
    assert all(path.name.startswith(".final.") and path.name.endswith(".tmp") for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(final)
    assert list(tmp_path.iterdir()) == []


def test_sweep_spares_neighbours(tmp_path: Path) -> None:
    (tmp_path / ".final2.abc.tmp").mkdir()
    (tmp_path / ".final.abc.tmp").mkdir()
    remove_leftovers(tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == [".final2.abc.tmp"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; |free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission was denied"),
        (RuntimeError("safetensors: I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_disk_trouble_says_what_and_what_to_do(tmp_path: Path, error: Exception, says: str) -> None:
    with pytest.raises(QAdapterError, match=says) as caught:
        fail_half_way(tmp_path / "final", error)
    assert str(tmp_path / "final") in str(caught.value)
    assert caught.value.__cause__ is error
    assert list(tmp_path.iterdir()) == []


def test_trouble_elsewhere_is_not_the_targets(tmp_path: Path) -> None:
    """A full temporary folder or a cache without permission: the error names the file, and so does the message."""
    final, other = tmp_path / "store" / "train" / "key", tmp_path / "tmp" / "part.bin"

    def message(error: OSError) -> str:
        with pytest.raises(QAdapterError) as caught, storage_errors(final):
            raise error
        return str(caught.value)

    for code in (errno.ENOSPC, errno.EACCES):
        elsewhere = message(OSError(code, os.strerror(code), str(other)))
        assert elsewhere.startswith(f"{other} cannot be used, so {final} was not written: "), elsewhere
    copied = OSError(errno.ENOSPC, "full", str(final.parent / "source"), None, str(other))
    assert message(copied).startswith(f"{other} cannot be used"), "of a copy, what could not be written"
    for own in (final, final / "weights", final.parent / ".key.abc.tmp" / "weights", tmp_path / "store", 7, None):
        error = OSError(errno.ENOSPC, "full", own if own is None or isinstance(own, int) else str(own))
        assert message(error).startswith(f"Cannot write {final}: the disk is full"), own


def test_a_wrapped_disk_error_is_found(tmp_path: Path) -> None:
    error = ValueError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(QAdapterError, match="disk is full"), storage_errors(tmp_path):
        raise error


def test_a_real_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full, the device that is always full, exists on Linux only")
    with (
        pytest.raises(QAdapterError, match="disk is full"),
        storage_errors(tmp_path),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x" * 100_000)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "nothing").read_text()


def test_manifest_describes_the_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", a="abc", sub__b="")
    before = time.time()
    written = make_manifest(folder)
    read = Manifest.read(folder)
    assert read == written
    assert read.files == {
        "a": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3},
        "sub/b": {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0},
    }
    assert (read.stage, read.config, read.inputs, read.seconds) == ("train", {"lr": 0.1}, {"data": "d"}, 1.5)
    assert read.created >= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(before))
    assert read.digest == digest_tree(folder, exclude={MANIFEST})
    assert read.verify(folder) == []


def test_verify_names_each_damage(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", gone="1", cut="123", flipped="123", fine="1")
    manifest = make_manifest(folder)
    (folder / "gone").unlink()
    (folder / "cut").write_text("12")
    (folder / "flipped").write_text("124")
    (folder / "extra").write_text("a stranger is not damage")
    assert manifest.verify(folder) == [
        "cut has 2 bytes, not 3",
        "flipped has changed since it was written",
        "gone is missing",
    ]
    assert [problem.split()[0] for problem in manifest.verify(folder, hashes=False)] == ["cut", "gone"]


@pytest.mark.parametrize("content", ["{}", "[]", '{"stage": "x"}', "not json"])
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(QAdapterError, match="manifest"):
        Manifest.read(tmp_path)
