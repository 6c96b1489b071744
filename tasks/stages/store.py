"""The stage store: every expensive step is computed once for its inputs, settings, code and library versions."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import Timeout

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import (
    MANIFEST,
    Manifest,
    atomic_folder,
    digest_tree,
    list_files,
    read_json,
    read_json_lines,
    remove_leftovers,
    storage_errors,
)
from qadapter.files.locks import holder, private_lock
from tasks.stages.code_version import code_digest, edited_modules
from tasks.stages.remote import RemoteStore
from tasks.stages.sittings import begin_sitting

__all__ = ["StageOutput", "StageStore", "code_digest", "library_versions"]

_LOGGER = logging.getLogger(__name__)
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval", "tokenizers", "numpy")
_SHORT = 20  # hex digits of the key in a folder's name: 80 bits


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a result can depend on, read without importing them."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass(frozen=True)
class StageOutput:
    """A finished stage, small enough to pass between tasks and to store as a Prefect result (JSON).

    Attributes:
        stage: the stage's name.
        key: its full cache key, 64 hex digits.
        path: the folder of its files.
        digest: content digest of those files, on which the keys of later stages depend.
        cached: True if it was found, False if this call computed it.
        seconds: duration of the computation, also when it was found; with that of killed attempts whose work it used.
    """

    stage: str
    key: str
    path: Path
    digest: str
    cached: bool
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The stage's `metrics.json`, name to value; empty if it wrote none."""
        file = self.path / "metrics.json"
        return {name: float(value) for name, value in read_json(file).items()} if file.exists() else {}

    def params(self) -> dict[str, Any]:
        """The stage's `params.json`: its settings with defaults filled in; empty if it wrote none."""
        file = self.path / "params.json"
        return dict(read_json(file)) if file.exists() else {}

    def history(self) -> list[dict[str, float]]:
        """The rows of the stage's `history.jsonl`, each {"step": n, name: value, ...}; empty if it wrote none."""
        file = self.path / "history.jsonl"
        return read_json_lines(file) if file.exists() else []


@dataclass(frozen=True)
class StageStore:
    """A content-addressed store of finished stages on disk, safe to share between threads, processes and flow runs.

    Layout below `root`: `stages/<name>/<key>/` holds finished stages; `scratch/<name>/<key>/` holds files of a stage in
    progress that survive a kill; `locks/`; `damaged/` holds folders that no longer match their manifest.

    Attributes:
        root: folder of the store.
        verify_hashes: on each hit, read every byte of the found stage. Without it, only names and sizes are checked,
            which detects a missing or truncated file but not a flipped bit.
        remote: shared store of other machines, searched before a stage is computed (`QADAPTER_STORE`).
    """

    root: Path
    verify_hashes: bool = field(default=False, compare=False)
    remote: RemoteStore | None = field(default_factory=RemoteStore.from_environment, compare=False)

    def run(
        self,
        name: str,
        *,
        module: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, StageOutput | Path],
        compute: Callable[[Path, Path], None],
        before: Callable[[], None] = lambda: None,
    ) -> StageOutput:
        """Find a stage's output, or compute it.

        Args:
            name: the stage's name (letters, digits, dashes, dots); part of the key.
            module: the module that does the work. The key covers its code, that of `compute`, and all code of this
                project that they import or call (`code_digest`).
            config: every setting that the result depends on, as JSON values. No paths: they differ between machines.
            inputs: name → earlier stage, or file or folder, which is digested.
            compute: called as `compute(out, scratch)`. It writes the result into `out`, an empty folder, and may keep
                checkpoints in `scratch`, which is the same folder if the stage is killed and run again.
            before: called if the stage is not found, before it is computed; no part of its key.

        Returns:
            The finished stage. If another process is computing the same key, this call waits for it.

        Raises:
            QAdapterError: an input is missing or changed before the stage was finished, the stage's code was edited
                since this process loaded it, or the disk is full or read-only.
            TypeError, ValueError: `config` is not plain JSON, or `compute` wrote no file.
        """
        code = code_digest(module, compute)
        states = {label: _state(source) for label, source in inputs.items() if isinstance(source, Path)}
        digests = {label: _input_digest(source) for label, source in inputs.items()}
        key = _key(name, code, config, digests)
        folder, scratch, lock = (
            self.root.absolute() / kind / name / key[:_SHORT] for kind in ("stages", "scratch", "locks")
        )

        def refuse_changed() -> None:
            for label, state in states.items():
                source = Path(inputs[label])  # type: ignore[arg-type]
                if _state(source) != state and _input_digest(source) != digests[label]:
                    raise QAdapterError(
                        f"{source} changed while stage {name} waited for it or read it, so nothing was made of it. Run "
                        "again once it stays as it is; write a new version beside it, under another name."
                    )

        def checked(out: Path, scratch: Path) -> None:
            compute(out, scratch)
            try:
                refuse_changed()
            except QAdapterError:
                shutil.rmtree(scratch, ignore_errors=True)  # checkpoints of other inputs than the key's
                raise

        found = self._found(folder, key)
        if found is None:
            with _locked(lock, name):
                found = self._found(folder, key) or self._fetched(name, folder, key)
                if found is None:
                    refuse_changed()  # another run may have held the lock for hours
                    _refuse_edited(name, edited_modules(module, compute))
                    before()
                    manifest = Manifest(name, key, config, digests, code, library_versions(), seconds=0.0)
                    found = self._compute(manifest, folder, scratch, checked)
        if scratch.exists():  # the computing run was killed after the rename, before it deleted its scratch folder
            shutil.rmtree(scratch, ignore_errors=True)
        if self.remote:
            self.remote.push(Manifest.read(folder), folder)
        return found

    def _fetched(self, name: str, folder: Path, key: str) -> StageOutput | None:
        """The finished stage from the remote store; None if it is not available. The caller holds the stage's lock."""
        if self.remote is None:
            return None
        self._make_way(name, folder)
        return self._found(folder, key) if self.remote.fetch(name, key, folder) else None

    def _found(self, folder: Path, key: str) -> StageOutput | None:
        """The finished stage in this folder; None if there is none or it is damaged."""
        if not folder.is_dir():
            return None
        try:
            manifest = Manifest.read(folder)
        except QAdapterError as error:
            _LOGGER.warning("Stage %s will be computed again: %s", folder, error)
            return None
        problems = manifest.verify(folder, hashes=self.verify_hashes)
        if manifest.key != key:
            problems.append("it belongs to another key")
        if problems:
            _LOGGER.warning("Stage %s is damaged and will be computed again: %s", folder, "; ".join(problems[:5]))
            return None
        with contextlib.suppress(OSError):  # `prune` uses the time of the last use; a read-only store is never pruned
            os.utime(folder / MANIFEST)
        return StageOutput(manifest.stage, key, folder, manifest.digest, cached=True, seconds=manifest.seconds)

    def _compute(
        self, manifest: Manifest, folder: Path, scratch: Path, compute: Callable[[Path, Path], None]
    ) -> StageOutput:
        """Compute a stage. The caller holds its lock, so existing files here belong to processes that have ended."""
        self._make_way(manifest.stage, folder)
        note = self.root.absolute() / "locks" / manifest.stage / f"{manifest.key[:_SHORT]}.sitting"
        before = begin_sitting(note, scratch)
        with storage_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as out:
            start = time.perf_counter() - before
            compute(out, scratch)
            if not list_files(out):
                raise ValueError(f"Stage {manifest.stage} wrote no file into its output folder.")
            manifest = dataclasses.replace(manifest, seconds=round(time.perf_counter() - start, 3)).write(out)
        shutil.rmtree(scratch, ignore_errors=True)
        note.unlink(missing_ok=True)
        return StageOutput(
            manifest.stage, manifest.key, folder, manifest.digest, cached=False, seconds=manifest.seconds
        )

    def _make_way(self, name: str, folder: Path) -> None:
        """Move a damaged stage aside and delete incomplete files of killed runs."""
        with storage_errors(folder):
            if folder.exists():
                aside = self.root.absolute() / "damaged" / name / f"{folder.name}-{time.time_ns()}"
                aside.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(aside)
                _LOGGER.warning("The damaged stage was moved to %s", aside)
            remove_leftovers(folder)

    def entries(self) -> list[Path]:
        """The folders of all finished stages, most recently used first."""
        found = [file.parent for file in self.root.absolute().glob(f"stages/*/[!.]*/{MANIFEST}")]
        return sorted(found, key=_last_use, reverse=True)

    def prune(self, *, unused_days: float) -> list[Path]:
        """Delete stages unused for `unused_days`, and damaged folders and abandoned checkpoints of that age.

        Stages that are being computed are kept.

        Returns:
            The deleted folders.
        """
        root, limit, removed = self.root.absolute(), time.time() - unused_days * 86_400, []
        for kind in ("stages", "scratch", "damaged"):
            for folder in root.glob(f"{kind}/*/*"):
                key = folder.name.lstrip(".").split(".")[0]  # an unfinished one is called `.<key>.<random>.tmp`
                lock = root / "locks" / folder.parent.name / key
                try:
                    with contextlib.nullcontext() if kind == "damaged" else private_lock(_lock_file(lock), timeout=0):
                        if _last_use(folder) < limit:
                            shutil.rmtree(folder)
                            removed.append(folder)
                except Timeout:
                    continue
        return removed


def _last_use(folder: Path) -> float:
    """When a folder was last used, seconds since the epoch: its manifest's date, else the newest file's."""
    manifest = folder / MANIFEST
    newest = [manifest] if manifest.exists() else [folder, *list_files(folder).values()]
    return max(path.stat().st_mtime for path in newest)


def _input_digest(source: StageOutput | Path) -> str:
    return source.digest if isinstance(source, StageOutput) else digest_tree(source)


def _refuse_edited(name: str, edited: list[str]) -> None:
    if edited:
        more = f" and {len(edited) - 3} more" if len(edited) > 3 else ""
        raise QAdapterError(
            f"The code of stage {name} was edited during this run, which still has the old code loaded "
            f"({', '.join(edited[:3])}{more}), so its result would be stored as the new code's. Start the run again: "
            "finished stages are kept."
        )


def _state(source: Path) -> dict[str, tuple[int, int]]:
    """Size and date of a file, or of each file of a folder: while they stay, the content need not be read again."""
    files = {"": source} if source.is_file() else list_files(source)
    found = {}
    for name, path in files.items():
        with contextlib.suppress(OSError):  # gone meanwhile, or a link to nothing: reading it says so
            status = path.stat()
            found[name] = (status.st_size, status.st_mtime_ns)
    return found


def _key(name: str, code: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 of everything that determines a stage's result, as canonical JSON.

    Raises:
        ValueError: the name is not a valid folder name, or the settings contain NaN.
        TypeError: the settings contain a value that is not JSON, such as a path.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"Stage name {name!r}: expected letters, digits, dots, dashes and underscores.")
    everything = {"stage": name, "code": code, "config": config, "inputs": inputs, "versions": library_versions()}
    try:
        text = json.dumps(everything, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise TypeError(
            f"Settings of stage {name}: {error}; expected plain JSON values. Pass files as `inputs`."
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()


def _lock_file(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.lock")


@contextlib.contextmanager
def _locked(lock: Path, name: str) -> Iterator[None]:
    """Hold a stage's lock, across threads and processes. The system frees it when its holder ends or is killed."""
    with storage_errors(lock):
        held = private_lock(_lock_file(lock), poll_interval=0.2)
        try:
            held.acquire(timeout=0)
        except Timeout:
            _LOGGER.info("Stage %s is being computed by another run; waiting for it.", name)
            _LOGGER.debug("%s is held by %s", lock, holder(_lock_file(lock)))
            held.acquire()
    try:
        yield
    finally:
        held.release()
