"""Machines that share finished stages: whole ones only, after uploads cut short, flipped bytes and missing files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import MANIFEST, Manifest, digest_tree
from tasks.stages import remote as remote_store
from tasks.stages.remote import RemoteStore
from tasks.stages.store import StageOutput, StageStore

Compute = Callable[[Path, Path], None]


class Work:
    """A stage's work that counts how often it was done; two machines never write the very same bytes."""

    def __init__(self, text: str = "weights") -> None:
        self.text, self.calls = text, 0

    def __call__(self, out: Path, scratch: Path) -> None:
        self.calls += 1
        (out / "adapter").mkdir()
        (out / "adapter" / "weights.bin").write_bytes(self.text.encode() * 1000)
        (out / "metrics.json").write_text(json.dumps({"train/final_loss": 0.25, "cost/calls": self.calls}))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote_store, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote_store, "_away_until", {})
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://shared/stages" if request.param == "memory" else f"file://{tmp_path}/shared"


def machine(tmp_path: Path, name: str, url: str) -> StageStore:
    return StageStore(tmp_path / name, remote=RemoteStore(url))


def run(store: StageStore, work: Compute, **changes: Any) -> StageOutput:
    arguments: dict[str, Any] = {"module": "qadapter.errors", "config": {"lr": 0.1}, "inputs": {}} | changes
    return store.run("train", compute=work, **arguments)


def remote_files(url: str) -> list[str]:
    fs, root = fsspec.url_to_fs(url)
    return sorted(str(path) for path in fs.find(root))


def test_two_machines_share_a_stage(tmp_path: Path, url: str) -> None:
    work = Work()
    first = run(machine(tmp_path, "a", url), work)
    second = run(machine(tmp_path, "b", url), work)
    assert work.calls == 1
    assert (first.cached, second.cached) == (False, True)
    assert first.path != second.path
    assert (first.key, first.digest, first.seconds) == (second.key, second.digest, second.seconds)
    assert digest_tree(second.path, exclude={MANIFEST}) == second.digest
    assert (second.path / MANIFEST).read_bytes() == (first.path / MANIFEST).read_bytes()
    assert (second.path / "adapter" / "weights.bin").read_bytes() == b"weights" * 1000
    run(machine(tmp_path, "b", url), work)
    assert work.calls == 1
    assert len(remote_files(url)) == 3  # two files and the pointer: a stage that is there is not pushed again


def test_another_stage_is_not_taken_for_it(tmp_path: Path, url: str) -> None:
    work = Work()
    run(machine(tmp_path, "a", url), work)
    run(machine(tmp_path, "b", url), work, config={"lr": 0.2})
    assert work.calls == 2


def cut_before(patch: pytest.MonkeyPatch, count: int) -> None:
    """The process dies after so many writes to the store."""
    done = 0
    for name in ("_put", "_replace"):
        original = getattr(remote_store, name)

        def counted(*arguments: Any, original: Any = original) -> None:
            nonlocal done
            if done == count:
                raise KeyboardInterrupt  # stands for kill -9: not an `Exception`, nothing cleans up
            done += 1
            original(*arguments)

        patch.setattr(remote_store, name, counted)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_half_uploaded_stage_is_not_seen(
    tmp_path: Path, url: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three writes make a stage (two files, the pointer); after any fewer another machine computes it itself."""
    work = Work()
    with monkeypatch.context() as patch:
        cut_before(patch, writes)
        with pytest.raises(KeyboardInterrupt):
            run(machine(tmp_path, "a", url), work)
    assert len(remote_files(url)) == writes
    assert run(machine(tmp_path, "b", url), work).cached is False
    assert run(machine(tmp_path, "c", url), work).cached is True  # from b
    assert run(machine(tmp_path, "a", url), work).cached is True  # its own, finished before the upload
    assert work.calls == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "missing", "pointer", "foreign", "null files", "listed files", "files without sha256"]
)
def test_a_damaged_stage_is_computed_again_and_mended(
    tmp_path: Path, url: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work()
    run(machine(tmp_path, "a", url), work)
    fs, _ = fsspec.url_to_fs(url)
    (weights,) = (path for path in remote_files(url) if path.endswith("weights.bin"))
    (pointer,) = (path for path in remote_files(url) if path.endswith(".json") and "metrics" not in path)
    if damage == "flipped":
        fs.pipe_file(weights, b"Weights" + b"weights" * 999)
    elif damage == "cut":
        fs.pipe_file(weights, b"weig")
    elif damage == "missing":
        fs.rm_file(weights)
    elif damage == "pointer":
        fs.pipe_file(pointer, fs.cat_file(pointer)[:100])
    else:
        content = json.loads(fs.cat_file(pointer))
        content["manifest"] |= {
            "foreign": {"key": "0" * 64},
            "null files": {"files": None},
            "listed files": {"files": ["metrics.json"]},
            "files without sha256": {"files": {"metrics.json": {"bytes": 1}}},
        }[damage]
        fs.pipe_file(pointer, json.dumps(content).encode())
    with caplog.at_level(logging.WARNING):
        assert run(machine(tmp_path, "b", url), work).cached is False
    assert "damaged and will be computed here" in caplog.text
    assert run(machine(tmp_path, "c", url), work).cached is True
    assert work.calls == 2
    assert (run(machine(tmp_path, "c", url), work).path / "adapter/weights.bin").read_bytes() == b"weights" * 1000


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "..\\outside"])
def test_a_manifest_cannot_leave_the_workspace(tmp_path: Path, url: str, name: str) -> None:
    work = Work()
    first = run(machine(tmp_path, "a", url), work)
    fs, _ = fsspec.url_to_fs(url)
    (pointer,) = (path for path in remote_files(url) if path.endswith(f"{first.key}.json"))
    content = json.loads(fs.cat_file(pointer))
    content["manifest"]["files"][name] = content["manifest"]["files"]["metrics.json"]
    fs.pipe_file(pointer, json.dumps(content).encode())
    before = sorted(str(path) for path in tmp_path.rglob("*outside*"))
    assert run(machine(tmp_path, "b", url), work).cached is False
    assert sorted(str(path) for path in tmp_path.rglob("*outside*")) == before


class Away(MemoryFileSystem):  # type: ignore[misc]
    """A store behind a network that is down."""

    protocol = "away"
    attempts = 0

    def cat_file(self, *_: Any, **__: Any) -> bytes:
        Away.attempts += 1
        raise ConnectionError("no route to host")


def test_an_unavailable_store_gets_the_stage_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("away", Away, clobber=True)
    monkeypatch.setattr(Away, "attempts", 0)
    work = Work()
    with caplog.at_level(logging.WARNING):
        first = run(machine(tmp_path, "a", "away://shared"), work)
        run(machine(tmp_path, "a", "away://shared"), work, config={"lr": 0.2})
    assert first.cached is False
    assert first.metrics()["train/final_loss"] == 0.25
    assert Away.attempts == 3  # tried three times, then left alone for a while: two stages do not wait twice
    assert next(record.message for record in caplog.records if "does not answer" in record.message).startswith(
        "The store away://shared does not answer (ConnectionError: no route to host)"
    )
    assert len([record for record in caplog.records if "does not answer" in record.message]) == 1
    back = machine(tmp_path, "a", "memory://shared")  # the network is up again; the stage is here and not there
    assert run(back, work).cached is True
    assert run(machine(tmp_path, "b", "memory://shared"), work).cached is True
    assert work.calls == 2


def test_a_short_failure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, failures = remote_store._put, [OSError("reset by peer"), TimeoutError("slow")]

    def flaky(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        put(*arguments)

    monkeypatch.setattr(remote_store, "_put", flaky)
    work = Work()
    run(machine(tmp_path, "a", "memory://shared"), work)
    assert run(machine(tmp_path, "b", "memory://shared"), work).cached is True
    assert work.calls == 1


def test_a_failed_download_leaves_no_partial_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    run(machine(tmp_path, "a", "memory://shared"), work)

    def broken(*_: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(remote_store, "_get", broken)
    store = machine(tmp_path, "b", "memory://shared")
    assert run(store, work).cached is False
    assert work.calls == 2
    assert [path.name for path in (store.root / "stages" / "train").iterdir()] == [run(store, work).key[:20]]


def test_two_uploads_at_once_do_not_mix(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both machines missed the stage and computed it, with other bytes; what is found is all of one of them."""
    stores = [machine(tmp_path, name, url) for name in ("a", "b")]
    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "fetch", lambda *_: None)
        patch.setattr(RemoteStore, "_read_pointer", lambda *_: None)
        one, two = (run(store, Work(text)) for store, text in zip(stores, ("first", "second"), strict=True))
    assert one.digest != two.digest
    found = run(machine(tmp_path, "c", url), Work())
    assert found.cached is True
    assert found.digest == two.digest
    assert Manifest.read(found.path).verify(found.path) == []


def test_the_environment_names_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QADAPTER_STORE", raising=False)
    assert StageStore(tmp_path).remote is None
    monkeypatch.setenv("QADAPTER_STORE", "memory://shared/")
    assert StageStore(tmp_path).remote == RemoteStore("memory://shared")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://AKIAX:sEcReT@bucket/folder", "holds credentials"),
        ("https://host/folder?token=sEcReT", "holds credentials"),
        ("nonsense://bucket", "no installed file system serves"),
    ],
)
def test_a_url_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    monkeypatch.setenv("QADAPTER_STORE", url)
    with pytest.raises(QAdapterError, match=message) as refused:
        RemoteStore.from_environment()
    assert "sEcReT" not in str(refused.value)
