"""A stage is computed once for its code, settings, inputs and versions, by any caller and after any kill."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import MANIFEST, read_json, write_json
from tasks.stages import store as stage
from tasks.stages.store import StageOutput, StageStore
from tests.support.paths import PROJECT_ROOT

MODULE = "qadapter.errors"


class Work:
    """A stand-in for a stage's work that counts how often it was done."""

    def __init__(self, text: str = "result") -> None:
        self.text, self.calls = text, 0

    def __call__(self, out: Path, scratch: Path) -> None:
        self.calls += 1
        assert out.is_dir()
        assert not list(out.iterdir())
        assert scratch.is_dir()
        (out / "result.txt").write_text(self.text)
        write_json(out / "metrics.json", {"adaptation/accuracy": 0.5, "cost/steps": 3})
        (out / "history.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.5}\n')


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "store")


def run(store: StageStore, work: Callable[[Path, Path], None], **changes: Any) -> StageOutput:
    arguments: dict[str, Any] = {"module": MODULE, "config": {"lr": 0.1}, "inputs": {}} | changes
    return store.run(arguments.pop("name", "train"), compute=work, **arguments)


def test_computed_once(store: StageStore) -> None:
    work = Work()
    first, second = run(store, work), run(store, work)
    assert work.calls == 1
    assert (first.cached, second.cached) == (False, True)
    assert first.path == store.root / "stages" / "train" / first.key[:20]
    assert (second.path, second.digest, second.key, second.seconds) == (
        first.path,
        first.digest,
        first.key,
        first.seconds,
    )
    assert second.metrics() == {"adaptation/accuracy": 0.5, "cost/steps": 3.0}
    assert second.history() == [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.5}]
    assert not (store.root / "scratch" / "train" / first.key[:20]).exists()


def test_an_output_without_measurements(store: StageStore) -> None:
    output = run(store, lambda out, scratch: (out / "a").write_text("1") and None)
    assert output.metrics() == {}
    assert output.history() == []


def test_every_part_of_the_key_counts(store: StageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text("1")
    keys = [
        run(store, Work()).key,
        run(store, Work(), name="evaluate").key,
        run(store, Work(), config={"lr": 0.2}).key,
        run(store, Work(), config={"lr": 0.1, "seed": 0}).key,
        run(store, Work(), module="qadapter.preferences.pair").key,
        run(store, Work(), inputs={"data": source}).key,
        run(store, Work(), inputs={"other": source}).key,
    ]
    source.write_text("2")
    keys.append(run(store, Work(), inputs={"data": source}).key)
    monkeypatch.setattr(stage, "library_versions", lambda: {"torch": "9.9"})
    keys.append(run(store, Work()).key)
    assert len(set(keys)) == len(keys)


def test_paths_and_order_do_not_enter_the_key(store: StageStore, tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place}.jsonl").write_text("same")
    work = Work()
    first = run(store, work, config={"a": 1, "b": (1, 2)}, inputs={"data": tmp_path / "here" / "here.jsonl"})
    second = run(store, work, config={"b": [1, 2], "a": 1}, inputs={"data": tmp_path / "there" / "there.jsonl"})
    moved = StageStore(tmp_path / "moved")
    shutil.move(store.root, moved.root)
    third = run(moved, work, config={"a": 1, "b": [1, 2]}, inputs={"data": tmp_path / "here" / "here.jsonl"})
    assert first.key == second.key == third.key
    assert work.calls == 1


def test_a_stage_depends_on_the_content_of_the_one_before(store: StageStore) -> None:
    """Equal content upstream, under another key, is the same input; other content is another one."""
    a = run(store, Work("same"), name="prepare", config={"threads": 1})
    b = run(store, Work("same"), name="prepare", config={"threads": 2})
    c = run(store, Work("other"), name="prepare", config={"threads": 3})
    assert a.key != b.key
    work = Work()
    keys = [run(store, work, inputs={"data": upstream}).key for upstream in (a, b, c)]
    assert keys[0] == keys[1] != keys[2]
    assert work.calls == 2


@pytest.mark.parametrize(
    ("config", "error"), [({"file": Path("x")}, TypeError), ({"x": float("nan")}, ValueError), ({"x": {1}}, TypeError)]
)
def test_settings_that_are_not_json_are_refused(store: StageStore, config: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        run(store, Work(), config=config)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden"])
def test_a_name_cannot_leave_the_store(store: StageStore, name: str) -> None:
    with pytest.raises(ValueError, match="Stage name"):
        run(store, Work(), name=name)


def test_a_missing_input_is_named(store: StageStore, tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"gone\.jsonl is missing"):
        run(store, Work(), inputs={"data": tmp_path / "gone.jsonl"})


@pytest.mark.parametrize("place", ["model", "model/weights"])
def test_an_input_that_changes_is_refused(place: str, store: StageStore, tmp_path: Path) -> None:
    """Else what was made of the new content would be found under the key of the old one."""
    source, weights = tmp_path / place, tmp_path / "model" / "weights"
    weights.parent.mkdir()
    weights.write_text("old")

    def saved_over(out: Path, scratch: Path) -> None:
        (scratch / "checkpoint").write_text("of both")
        weights.write_text("new")
        (out / "result").write_text(weights.read_text())

    with pytest.raises(QAdapterError, match=f"{source} changed while stage train"):
        run(store, saved_over, inputs={"base": source})
    assert not list(store.root.glob("scratch/*/*"))
    weights.write_text("old")
    assert not run(store, Work(), inputs={"base": source}).cached


def test_an_input_that_is_only_touched_is_the_same(store: StageStore, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text("1")

    def touched(out: Path, scratch: Path) -> None:
        os.utime(source, (1, 1))
        (out / "result").write_text(source.read_text())

    assert not run(store, touched, inputs={"data": source}).cached
    assert run(store, touched, inputs={"data": source}).cached


def test_an_input_that_changes_during_the_wait_is_refused_before_the_work(
    store: StageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = tmp_path / "pairs.jsonl", Work()
    source.write_text("1")

    @contextlib.contextmanager
    def waited(*_: object) -> Iterator[None]:
        source.write_text("another run's holder of the lock took hours")
        yield

    monkeypatch.setattr(stage, "_locked", waited)
    with pytest.raises(QAdapterError, match="changed while stage train waited for it"):
        run(store, work, inputs={"data": source})
    assert work.calls == 0


def test_code_that_was_edited_during_the_run_is_refused(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is the new code's; what is already there under it was made by that, and is found."""
    work = Work()
    run(store, work)
    monkeypatch.setattr(stage, "edited_modules", lambda *_: ["qadapter.errors"])
    assert run(store, work).cached
    with pytest.raises(QAdapterError, match=r"stage train was edited during this run.*\(qadapter.errors\)"):
        run(store, work, config={"lr": 0.2})
    assert work.calls == 1


def test_a_stage_that_writes_nothing_is_an_error(store: StageStore) -> None:
    with pytest.raises(ValueError, match="wrote no file"):
        run(store, lambda out, scratch: None)
    assert store.entries() == []


def test_a_failed_stage_keeps_its_scratch_and_nothing_else(store: StageStore) -> None:
    seen: list[list[str]] = []

    def flaky(out: Path, scratch: Path) -> None:
        seen.append(sorted(path.name for path in scratch.iterdir()))
        (scratch / "checkpoint-1").write_text("half")
        (out / "part").write_text("x")
        if len(seen) == 1:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run(store, flaky)
    assert store.entries() == []
    assert list((store.root / "stages" / "train").iterdir()) == []
    output = run(store, flaky)
    assert seen == [[], ["checkpoint-1"]]
    assert not list((store.root / "scratch" / "train").iterdir())
    assert [path.name for path in output.path.iterdir() if path.name != MANIFEST] == ["part"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "lost file": lambda folder: (folder / "result.txt").unlink(),
    "cut file": lambda folder: (folder / "result.txt").write_text("resu"),
    "lost manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "another key": lambda folder: write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "key": "0" * 64}),
}


def note_of(store: StageStore) -> Path:
    (note,) = store.root.glob("locks/train/*.sitting")
    return note


def test_the_time_of_a_killed_attempt_counts_up_to_what_it_kept(store: StageStore) -> None:
    """100 s to a checkpoint, and again 30 s to another; what came after each was lost."""
    scratches: list[Path] = []

    def work(out: Path, scratch: Path) -> None:
        scratches.append(scratch)
        if len(scratches) < 3:
            (scratch / "checkpoint").write_text("kept")
            raise RuntimeError("killed")
        (out / "result.txt").write_text("done")

    for kept in (100, 30):
        with pytest.raises(RuntimeError, match="killed"):
            run(store, work)
        note = note_of(store)
        began = read_json(note)["began"] - 1000  # all of it a while ago: nothing is kept in the future
        os.utime(scratches[-1] / "checkpoint", (began + kept, began + kept))
        write_json(note, read_json(note) | {"began": began})
    found = run(store, work)
    assert 130 <= found.seconds < 140
    assert run(store, work).seconds == found.seconds
    assert not list(store.root.glob("locks/*/*.sitting"))
    fresh = run(store, Work(), config={"lr": 0.2})
    assert fresh.seconds < 10


@pytest.mark.parametrize("text", ["", "[]", '{"began": 1}', '{"began": "x", "before": 1}'])
def test_a_damaged_note_of_an_attempt_is_no_time(text: str, store: StageStore) -> None:
    calls: list[Path] = []

    def fails(out: Path, scratch: Path) -> None:
        calls.append(scratch)
        if len(calls) == 1:
            (scratch / "checkpoint").write_text("kept")
            note_of(store).write_text(text)
            raise ValueError("boom")
        (out / "result.txt").write_text("done")

    with pytest.raises(ValueError, match="boom"):
        run(store, fails)
    assert run(store, fails).seconds < 10


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_set_aside_and_computed_again(
    store: StageStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work()
    first = run(store, work)
    DAMAGES[damage](first.path)
    with caplog.at_level(logging.WARNING):
        second = run(store, work)
    assert (work.calls, second.cached) == (2, False)
    assert (second.path / "result.txt").read_text() == "result"
    assert "computed again" in caplog.text
    assert len(list((store.root / "damaged" / "train").iterdir())) == 1
    assert run(store, work).cached


def test_a_flipped_bit_is_seen_when_hashes_are_asked_for(store: StageStore) -> None:
    work = Work()
    (run(store, work).path / "result.txt").write_text("resulT")
    assert run(store, work).cached
    assert not run(StageStore(store.root, verify_hashes=True), work).cached
    assert work.calls == 2


def test_leftovers_of_a_kill_are_removed(store: StageStore) -> None:
    first = run(store, Work())
    orphan = first.path.with_name(f".{first.path.name}.0123.tmp")
    orphan.mkdir()
    scratch = store.root / "scratch" / "train" / first.path.name
    scratch.mkdir()
    assert run(store, Work()).cached
    assert not scratch.exists()
    shutil.rmtree(first.path)
    run(store, Work())
    assert not orphan.exists()


def test_a_read_only_store_still_serves(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root ignores permissions, so the refusal is played: any write would raise."""
    run(store, Work())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert run(store, Work()).cached
    with pytest.raises(QAdapterError, match="read-only"):
        run(store, Work(), config={"lr": 0.3})


def test_threads_compute_once(store: StageStore) -> None:
    calls: list[int] = []

    def slow(out: Path, scratch: Path) -> None:
        calls.append(1)
        time.sleep(0.4)
        (out / "a").write_text("1")

    outputs: list[StageOutput] = []
    threads = [threading.Thread(target=lambda: outputs.append(run(store, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({output.digest for output in outputs}) == 1
    assert sorted(output.cached for output in outputs) == [False, True, True, True]


PROGRAM = """
import os, sys, time
from pathlib import Path
from tasks.stages.store import StageStore
root, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def compute(out, scratch):
    with log.open("a") as stream: stream.write(f"{os.getpid()} {sorted(p.name for p in scratch.iterdir())}\\n")
    (scratch / "checkpoint").write_text("1")
    (out / "a").write_text("1")
    time.sleep(seconds)
print(StageStore(root).run("train", module="qadapter.errors", config={}, inputs={}, compute=compute).cached)
"""


def start(store: StageStore, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(store.root), str(log), str(seconds)]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_compute_once(store: StageStore, tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = [start(store, log, 1.0) for _ in range(3)]
    answers = sorted(child.communicate(timeout=60)[0].strip() for child in children)
    assert answers == ["False", "True", "True"]
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_process_frees_the_lock_for_the_next(store: StageStore, tmp_path: Path) -> None:
    log = tmp_path / "log"
    victim = start(store, log, 60.0)
    try:
        deadline = time.monotonic() + 60
        while not list(store.root.glob("scratch/train/*/checkpoint")):
            assert time.monotonic() < deadline, "the child never started computing"
            time.sleep(0.05)
        time.sleep(0.1)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert store.entries() == []
    heir = start(store, log, 0.0)
    assert heir.communicate(timeout=60)[0].strip() == "False"
    assert [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()] == ["[]", "['checkpoint']"]
    assert len(store.entries()) == 1
    assert not list(store.root.glob("scratch/train/*"))
    assert not list(store.root.glob("stages/train/.*"))


def test_prune_goes_by_the_last_use(store: StageStore) -> None:
    old, new = run(store, Work(), name="old"), run(store, Work(), name="new")
    used = run(store, Work(), name="used")
    long_ago = time.time() - 10 * 86_400
    for output in (old, used):
        os.utime(output.path / MANIFEST, (long_ago, long_ago))
    run(store, Work(), name="used")
    assert store.prune(unused_days=5) == [old.path]
    assert set(store.entries()) == {new.path, used.path}


def test_prune_leaves_a_stage_in_progress_alone(store: StageStore) -> None:
    def compute(out: Path, scratch: Path) -> None:
        (out / "a").write_text("1")
        (scratch / "checkpoint").write_text("1")
        assert store.prune(unused_days=-1) == []
        assert (scratch / "checkpoint").exists()

    run(store, compute)
    assert len(store.prune(unused_days=-1)) == 1


def test_output_survives_prefects_json_results(store: StageStore) -> None:
    from prefect.serializers import JSONSerializer

    output = run(store, Work())
    serializer: JSONSerializer[Any] = JSONSerializer()
    assert serializer.loads(serializer.dumps({"stages": [output]})) == {"stages": [output]}


HOLDING = """
import platform, psutil
from tasks.stages.memory import give_back_memory
def held(): return psutil.Process().memory_info().rss / 2**20
blocks = [b"x" * 3_000_000, *(b"x" * 100_000 for _ in range(3000))]  # glibc takes the first from the system, and learns
del blocks[0]
more = [b"x" * 100_000 for _ in range(1000)]
last = more[-1]  # at the heap's end, so that it cannot shrink
del blocks, more
before = held()
give_back_memory()
print(platform.libc_ver()[0], before - held())
"""


def test_freed_memory_is_returned_to_the_system() -> None:
    """400 MB of blocks of 100 kB are freed, all but the last."""
    result = subprocess.run(
        [sys.executable, "-c", HOLDING], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    library, returned = result.stdout.split()
    if library != "glibc":
        pytest.skip("another C library keeps its heap its own way")
    assert float(returned) > 300


def test_no_heavy_library_is_imported() -> None:
    program = (
        "import sys, tempfile, pathlib; from tasks.stages.store import StageStore, code_digest\n"
        "store = StageStore(pathlib.Path(tempfile.mkdtemp()))\n"
        "store.run('a', module='qadapter.preferences.pair', config={}, inputs={}, "
        "compute=lambda out, scratch: (out / 'x').touch())\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas', 'prefect', 'mlflow'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
