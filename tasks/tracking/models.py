"""Log a base with its adapter as an MLflow model for `mlflow models serve`, and find the files of a registered one."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import requests
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

import qadapter
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_tree, storage_errors, sync_to_disk, sync_tree
from qadapter.files.shown import shown
from qadapter.serving.registered import DamagedError, digest_code, refuse_damage
from tasks.stages.context import workspace
from tasks.stages.hub import commit_of
from tasks.tracking.store import (
    NOT_FOUND,
    MlflowStore,
    RefusedError,
    away_errors,
    downloaded,
    is_away,
    local_path,
    status_of,
)
from tasks.tracking.tracker import Tracker, tracking_uri

_GLOBALS = threading.Lock()
_PREFIX = "qadapter."  # of metadata keys about base and adapter
_CODE = Path(__file__).with_name("served_policy.py")
_PACKAGES = (
    "mlflow",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
    "jinja2",
)

SIGNATURE = ModelSignature(
    inputs=Schema(
        [ColSpec(Array(Object([Property("role", DataType.string), Property("content", DataType.string)])), "messages")]
    ),
    params=ParamSchema(
        [
            ParamSpec("dial", DataType.string, None),
            ParamSpec("alpha_0", DataType.double, None),
            ParamSpec("alpha_tilde", DataType.double, None),
            ParamSpec("compare_base", DataType.boolean, default=False),
            ParamSpec("max_tokens", DataType.long, None),
            ParamSpec("temperature", DataType.double, 1.0),
            ParamSpec("top_p", DataType.double, 1.0),
            ParamSpec("n", DataType.long, 1),
            ParamSpec("seed", DataType.long, None),
            ParamSpec("stop", DataType.string, [], shape=(-1,)),
        ]
    ),
)
"""Input of the scoring server: `messages`, and these further fields of a chat request."""


@dataclass(frozen=True)
class ServedFiles:
    """The parts of a registered version.

    Attributes:
        name: name of the registered model.
        base: the base's folder or hub id.
        adapter: the adapter's folder.
        numerics: how to load the base: `dtype`, `quantization` and `revision`, as far as they were recorded.
        version: number of the version.
        base_digest: digest of the base, equal for versions on the same base; empty if it was not recorded.
    """

    name: str
    base: str
    adapter: Path
    numerics: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    base_digest: str = ""


def log_served_model(
    run_id: str,
    *,
    base: Path | str,
    adapter: Path,
    name: str = "policy",
    model: ModelSettings | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Log a base and its adapter to a run as a model that can be registered and served without this project.

    The model's folder contains copies of the adapter, of the base if that is a folder, and of `qadapter`'s source,
    their digests, and the versions of the required packages. It contains no pickle. If the store is on this machine,
    the folder is flushed to the disk when this returns.

    Args:
        run_id: a run of the store in `workspace()` or `MLFLOW_TRACKING_URI`.
        base: folder, or hub id. A hub id is not copied but recorded, with its current commit.
        adapter: folder that a training wrote.
        name: name of the logged model, and of the customized policy in its answers.
        model: settings with which the base was loaded in training and measuring, and will be served.
        metadata: further values of the MLmodel file.

    Returns:
        The URI to register: `create_model_version(…, source=…)`.

    Raises:
        QAdapterError: the adapter folder is missing, or the store is full, read-only or unavailable, or refuses a file.
    """
    if not adapter.is_dir():
        raise QAdapterError(f"There is no adapter folder {adapter}. Give the folder that a training wrote.")
    local = Path(base).is_dir()
    artifacts = {"adapter": str(adapter.resolve())} | ({"base": str(Path(base).resolve())} if local else {})
    numerics = _numerics(base, local, model)
    digests = {f"{part}_digest": digest_tree(Path(folder)) for part, folder in artifacts.items()}
    package = Path(str(qadapter.__file__)).parent
    digests |= {"code_digest": digest_code(package), "loader_digest": digest_tree(_CODE)}
    described = {**numerics, **digests}
    config = {"name": name, **described} if local else {"name": name, "base": str(base), **described}
    packages = (*_PACKAGES, "bitsandbytes") if numerics.get("quantization", "none") != "none" else _PACKAGES
    with _store() as uri, away_errors(uri), storage_errors(workspace()), _without_advice():
        logged = Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            name=name,
            run_id=run_id,
            python_model=str(_CODE),
            artifacts=artifacts,
            code_paths=[str(package)],
            signature=SIGNATURE,
            pip_requirements=[f"{one}=={version(one).partition('+')[0]}" for one in packages],
            model_config=config,
            metadata={
                **(metadata or {}),
                f"{_PREFIX}base": "artifact" if local else str(base),
                **{f"{_PREFIX}{key}": value for key, value in described.items()},
            },
        )
        _push_to_disk(Path(logged.artifact_path))
        # A database client resolves `models:/…` in MLflow's global store, which may be another one.
        return str(logged.model_uri if uri.startswith("http") else logged.artifact_path)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Swallow what MLflow advises on each logged model (type hints, an input example): its signature is given.

    MLflow puts a filter of its own in front of any other while it warns, so what it warns of is caught; the rest is
    passed on.
    """
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        if f"mlflow{os.sep}pyfunc" not in one.filename:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _numerics(base: Path | str, local: bool, model: ModelSettings | None) -> dict[str, str]:
    """How to load the base again: the precision in training and, for a hub id, the commit of its revision."""
    found: dict[str, str] = {} if model is None else {"dtype": model.dtype, "quantization": model.quantization}
    if local:
        return found
    pinned = commit_of(str(base), model.revision if model else None)
    return {**found, "revision": pinned} if pinned else found


def _push_to_disk(folder: Path) -> None:
    """Flush a folder before it is registered: a power cut must not leave a version without its files."""
    if not folder.is_dir():  # it is on a server
        return
    sync_tree(folder)
    for above in folder.parents[:4]:  # the model's folder, `models`, the experiment's, `mlruns`: they may be new
        sync_to_disk(above)


def find_served_model(model: str) -> ServedFiles:
    """Find the files of a registered version; they are downloaded once if the store is on another machine.

    Every byte is verified against the registered digests.

    Args:
        model: `NAME@ALIAS` or `NAME/VERSION`.

    Raises:
        QAdapterError: there is no such version, it was not logged by `log_served_model`, or MLflow is unavailable.
        DamagedError: its files are missing or have changed since registration.
    """
    found = _ModelVersion.find(model)
    found.refuse_other_code()
    return ServedFiles(
        found.name,
        found.base(),
        found.part("adapter"),
        found.numerics(),
        int(found.number),
        found.digest("base") or "",
    )


def version_of(model: str) -> int:
    """The number of the version that `find_served_model` would find now.

    Raises:
        QAdapterError: there is none, or MLflow is unavailable.
    """
    return int(_version_of(model)[1].version)


def find_adapter(model: str) -> Path:
    """As `find_served_model`, but only the adapter's folder: the base, which may be large, is not downloaded."""
    return _ModelVersion.find(model).part("adapter")


def find_base(model: str) -> str:
    """As `find_served_model`, but only the base: its folder or hub id."""
    return _ModelVersion.find(model).base()


def find_numerics(model: str) -> Mapping[str, str]:
    """As `find_served_model`, but only `ServedFiles.numerics`: no file of the policy is downloaded."""
    return _ModelVersion.find(model).numerics()


def check_files(model: str) -> None:
    """Verify a registered version against its digests; the base only if it is on this machine.

    Copies downloaded earlier are ignored: they show nothing about the store's files.

    Raises:
        QAdapterError: as `find_served_model`.
    """
    found = _ModelVersion.find(model)
    found.refuse_other_code()
    if found.here:
        found.part("adapter")
        found.base()
    else:
        with tempfile.TemporaryDirectory(prefix="qadapter-") as folder:
            found.refuse_damage("adapter", found.fetch(found.parts["adapter"]["path"], Path(folder)))


@dataclass(frozen=True)
class _ModelVersion:
    """A registered version, of which only the description was downloaded.

    Attributes:
        name: name of the registered model.
        number: number of the version.
        place: address of its files.
        tags: tags of the version.
        parts: parts of the model by name, each with its `path` in the model's folder.
        metadata: metadata of the MLmodel file.
    """

    name: str
    number: str
    place: str
    tags: Mapping[str, str]
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, model: str) -> _ModelVersion:
        """The version behind `NAME@ALIAS` or `NAME/VERSION`."""
        store, version = _version_of(model)
        name, number = str(version.name), str(version.version)
        place = store.call("get_model_version_download_uri", name, number)
        found = cls(name, number, str(place), dict(version.tags))
        with tempfile.TemporaryDirectory(prefix="qadapter-") as folder:
            file = found.fetch("MLmodel", Path(folder))
            try:
                described = Model.load(str(file))
            except (yaml.YAMLError, TypeError, ValueError, MlflowException):
                raise DamagedError(
                    f"Version {number} of {name!r} in MLflow at {shown(store.uri)} is damaged: {file} does not "
                    "describe a model. Restore it from a backup, or roll back to another version (`make rollback`)."
                ) from None
        parts = (described.flavors.get("python_function") or {}).get("artifacts", {})
        metadata = described.metadata or {}
        if _PREFIX + "base" not in metadata or "adapter" not in parts:
            raise QAdapterError(
                f"The model {model!r} is not a base with an adapter. Register a model that log_served_model logged."
            )
        return replace(found, parts=parts, metadata=metadata)

    @property
    def here(self) -> bool:
        """Whether its files are on this machine; they are then used in place."""
        return local_path(self.place) is not None

    def base(self) -> str:
        """The base's hub id, or its verified folder, downloaded if needed."""
        base = str(self.metadata[_PREFIX + "base"])
        return str(self.part("base")) if base == "artifact" else base

    def numerics(self) -> dict[str, str]:
        """The recorded settings for loading the base."""
        names = ("dtype", "quantization", "revision")
        return {name: str(self.metadata[_PREFIX + name]) for name in names if _PREFIX + name in self.metadata}

    def digest(self, part: str) -> str | None:
        """The expected digest of `adapter` or `base`: the version's tag, which the gate's decision refers to.

        A model registered by hand has no such tag; its own metadata is used.
        """
        key = f"{part}_digest"
        return self.tags.get(key) or self.metadata.get(_PREFIX + key)

    def part(self, name: str) -> Path:
        """The verified folder of `adapter` or `base`, downloaded if needed."""
        path, expected, whole = self.parts[name]["path"], self.digest(name), False
        if self.here:
            folder = self.fetch(path, None)
        else:
            # Versions that share a base share the copy of it.
            key = expected or hashlib.sha256(f"{self.place}/{path}".encode()).hexdigest()
            place = workspace() / ".qadapter" / "downloads" / "models" / key

            def holds(folder: Path) -> bool:
                nonlocal whole
                whole = expected is None or digest_tree(folder) == expected
                return whole

            folder = downloaded(place, path, lambda at: self.fetch(path, at), holds)
        if not whole:  # otherwise it was verified above: a large base is read only once
            self.refuse_damage(name, folder)
        return folder

    def refuse_other_code(self) -> None:
        """Verify the code that `mlflow models serve` would run, if its digests were logged."""
        with tempfile.TemporaryDirectory(prefix="qadapter-") as folder:
            for part, path, digest in (("code", "code/qadapter", digest_code), ("loader", _CODE.name, digest_tree)):
                if self.digest(part) is not None:
                    self.refuse_damage(part, self.fetch(path, Path(folder)), digest)

    def refuse_damage(self, part: str, folder: Path, digest: Callable[[Path], str] = digest_tree) -> None:
        """Verify a folder against the registered digest."""
        uri = shown(tracking_uri(workspace()))
        what = f"{part} of version {self.number} of {self.name!r} in MLflow at {uri}"
        refuse_damage(folder, self.digest(part), what, digest)

    def fetch(self, path: str, to: Path | None) -> Path:
        """Locate one of its files or folders; it is downloaded below `to` if needed."""
        at = None if self.here or to is None else str(to)
        with _store() as uri, away_errors(uri):
            try:
                with storage_errors(to or workspace()):
                    return Path(
                        mlflow.artifacts.download_artifacts(f"models:/{self.name}/{self.number}/{path}", dst_path=at)
                    )
            except QAdapterError as error:
                raise QAdapterError(str(error)) from None  # the cause may contain the store's unmasked address
            except (MlflowException, FileNotFoundError, requests.HTTPError) as error:
                status = status_of(error)
                # A server answers 500 for a missing file, while it answers other requests.
                if (is_away(error) and status != 500) or status in (401, 403):
                    raise
                raise DamagedError(
                    f"MLflow at {shown(uri)} has version {self.number} of {self.name!r}, but its {path} cannot be "
                    f"read ({shown(str(error)).splitlines()[0]}). Restore the artifacts of that version, or register "
                    "it again."
                ) from None


def _version_of(model: str) -> tuple[MlflowStore, Any]:
    """The store, and MLflow's own description of the version behind `NAME@ALIAS` or `NAME/VERSION`."""
    name, at, alias = model.partition("@")
    if not at:
        name, _, number = model.partition("/")
    if not name or name == model:
        raise QAdapterError(f"{model!r} is not a version. Give NAME@ALIAS or NAME/VERSION, such as policy@champion.")
    tracker = Tracker.for_project(workspace())
    store = MlflowStore(tracker.uri, tracker.artifact_root)
    try:
        if at:  # an alias may move between two downloads, a version may not
            return store, store.call("get_model_version_by_alias", name, alias)
        return store, store.call("get_model_version", name, number)
    except RefusedError as error:
        unknown = error.code in (NOT_FOUND, "INVALID_PARAMETER_VALUE")
        what = "has no" if unknown else "does not hand out the"
        raise QAdapterError(
            f"MLflow at {shown(tracker.uri)} {what} model {model!r} ({error.reason}). `mlflow ui` lists the registered "
            "models; QADAPTER_HOME or MLFLOW_TRACKING_URI select the store."
        ) from None


@contextmanager
def _store() -> Iterator[str]:
    """Point MLflow's fluent calls, which read the store from globals, to the project's store within the block.

    Yields:
        The project's tracking URI. It may contain a password: pass it through `shown` in messages.
    """
    with _GLOBALS:
        variable = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tracking_uri(workspace())
        mlflow.set_tracking_uri(uri)
        try:
            yield uri
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # unsets the variable too
            if variable is not None:
                os.environ["MLFLOW_TRACKING_URI"] = variable
