"""A base with its adapter as an MLflow model that `mlflow models serve` can serve, and the way back to its files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tasks.tracking  # first: it switches MLflow's telemetry off before MLflow is imported

import mlflow  # isort: skip
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

import qadapter
from qadapter.artifacts import digest_tree, storage_errors, sync_to_disk
from qadapter.errors import QAdapterError
from qadapter.serving.registered import DamagedError, refuse_damage
from qadapter.settings import ModelSettings
from qadapter.url_secrets import shown
from tasks.context import workspace
from tasks.hub import commit_of
from tasks.mlflow_store import MlflowStore, away_errors, is_away

_GLOBALS = threading.Lock()
_PREFIX = "qadapter."  # of what the metadata says of base and adapter
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
"""What the scoring server takes: `messages`, and these fields of a chat request beside it."""


@dataclass(frozen=True)
class ServedFiles:
    """What a registered version is made of.

    Attributes:
        name: of the registered model.
        base: folder or hub id.
        adapter: folder.
        numerics: how the base is to be loaded, `dtype`, `quantization` and `revision`, as far as it was recorded.
    """

    name: str
    base: str
    adapter: Path
    numerics: Mapping[str, str] = field(default_factory=dict)


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

    The model's folder holds copies of the adapter, of the base if that is a folder, and of `qadapter`'s source, and
    names the versions of the packages it needs. It holds no pickle. The digests of both stand in it, and where the
    store is on this machine, it has reached the disk when this returns.

    Args:
        run_id: the run of the store in `workspace()` or `MLFLOW_TRACKING_URI`.
        base: folder, or hub id, which is then only named, with the commit that is used here now.
        adapter: what a training wrote.
        name: of the logged model, and of the customised policy in its answers.
        model: how the base was loaded when the policy was trained and measured; it is then served so.
        metadata: further values of its MLmodel file.

    Returns:
        What to register: `create_model_version(…, source=…)`.

    Raises:
        QAdapterError: the adapter folder is missing, or the store is full, read-only or away.
    """
    if not adapter.is_dir():
        raise QAdapterError(f"There is no adapter folder {adapter}. Give the folder that a training wrote.")
    local = Path(base).is_dir()
    artifacts = {"adapter": str(adapter.resolve())} | ({"base": str(Path(base).resolve())} if local else {})
    numerics = _numerics(base, local, model)
    digests = {f"{part}_digest": digest_tree(Path(folder)) for part, folder in artifacts.items()}
    described = {**numerics, **digests}
    config = {"name": name, **described} if local else {"name": name, "base": str(base), **described}
    packages = (*_PACKAGES, "bitsandbytes") if numerics.get("quantization", "none") != "none" else _PACKAGES
    package = Path(str(qadapter.__file__)).parent
    with _store() as uri, storage_errors(workspace()), away_errors(uri):
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
        # A client of a database looks `models:/…` up in MLflow's global store, which need not be this one.
        return str(logged.model_uri if uri.startswith("http") else logged.artifact_path)


def _numerics(base: Path | str, local: bool, model: ModelSettings | None) -> dict[str, str]:
    """How to load the base again: precision as it was trained with, and for a hub id the commit behind its revision."""
    found: dict[str, str] = {} if model is None else {"dtype": model.dtype, "quantization": model.quantization}
    if local:
        return found
    pinned = commit_of(str(base), model.revision if model else None)
    return {**found, "revision": pinned} if pinned else found


def _push_to_disk(folder: Path) -> None:
    """Before anything names it: a power cut must not leave a registered version whose files were never written."""
    if not folder.is_dir():  # a server has it
        return
    for parent, _, files in os.walk(folder):
        for each in (*(Path(parent, name) for name in files), Path(parent)):
            sync_to_disk(each)
    for above in folder.parents[:4]:  # the model's folder, `models`, the experiment's, `mlruns`: they may be new
        sync_to_disk(above)


def find_served_model(model: str) -> ServedFiles:
    """The files behind a registered version, downloaded if the store is not on this machine.

    Every byte is read once: what is not what was registered is refused.

    Args:
        model: `NAME@ALIAS` or `NAME/VERSION`.

    Raises:
        QAdapterError: there is no such version, it was not logged by `log_served_model`, or MLflow is away.
        DamagedError: its files are gone, or others than when it was registered.
    """
    found = _Registered.find(model)
    return ServedFiles(found.name, found.base(), found.part("adapter"), found.numerics())


def find_adapter(model: str) -> Path:
    """As `find_served_model`, the adapter's folder alone: a base can be large, and is not downloaded."""
    return _Registered.find(model).part("adapter")


def find_base(model: str) -> str:
    """As `find_served_model`, the base alone: its folder or hub id."""
    return _Registered.find(model).base()


def find_numerics(model: str) -> Mapping[str, str]:
    """As `find_served_model`, `ServedFiles.numerics` alone: no file of the policy is fetched."""
    return _Registered.find(model).numerics()


def check_files(model: str) -> None:
    """Hold what is registered against its digests; a base only where it lies on this machine, it is not downloaded.

    Raises:
        QAdapterError: as `find_served_model`.
    """
    found = _Registered.find(model)
    found.part("adapter")
    if Path(found.source).is_dir():
        found.base()


@dataclass(frozen=True)
class _Registered:
    """A registered version, of which only the description was fetched.

    Attributes:
        name: of the registered model.
        number: of the version.
        source: where the store keeps it; a folder if that is on this machine.
        tags: of the version.
        parts: of the model, by name, each with its `path` in the model's folder.
        metadata: of the MLmodel file.
    """

    name: str
    number: str
    source: str
    tags: Mapping[str, str]
    parts: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, Any]

    @classmethod
    def find(cls, model: str) -> _Registered:
        """The version behind `NAME@ALIAS` or `NAME/VERSION`."""
        name, at, alias = model.partition("@")
        if not at:
            name, _, number = model.partition("/")
        if not name or name == model:
            raise QAdapterError(
                f"{model!r} names no version. Give NAME@ALIAS or NAME/VERSION, such as policy@champion."
            )
        tracker = tasks.tracking.Tracker.for_project(workspace())
        client = MlflowStore(tracker.uri, tracker.artifact_root)
        try:
            if at:  # an alias can move between two downloads, a version cannot
                version = client.call("get_model_version_by_alias", name, alias)
            else:
                version = client.call("get_model_version", name, number)
        except MlflowException as error:
            reason = shown(str(error)).splitlines()[0]
            unknown = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
            what = "has no" if unknown else "does not hand out the"
            raise QAdapterError(
                f"MLflow at {shown(tracker.uri)} {what} model {model!r} ({reason}). `mlflow ui` lists the registered "
                "models; QADAPTER_HOME or MLFLOW_TRACKING_URI say which store is read."
            ) from None  # the cause may have the store's address as given, password and all
        number = str(version.version)
        file = _fetch(name, number, "MLmodel")
        try:
            described = Model.load(str(file))
        except (yaml.YAMLError, TypeError, ValueError, MlflowException):
            raise DamagedError(
                f"Version {number} of {name!r} in MLflow at {shown(tracker.uri)} is damaged: {file} is no description "
                "of a model. Restore it from a backup, or roll back to another version (`make rollback`)."
            ) from None
        parts = (described.flavors.get("python_function") or {}).get("artifacts", {})
        metadata = described.metadata or {}
        if _PREFIX + "base" not in metadata or "adapter" not in parts:
            raise QAdapterError(
                f"The model {model!r} is no base with an adapter. Register what log_served_model logged."
            )
        return cls(name, number, str(version.source), dict(version.tags), parts, metadata)

    def base(self) -> str:
        """Hub id, or the folder, fetched and whole."""
        base = str(self.metadata[_PREFIX + "base"])
        return str(self.part("base")) if base == "artifact" else base

    def numerics(self) -> dict[str, str]:
        """What was recorded of how the base is to be loaded."""
        names = ("dtype", "quantization", "revision")
        return {name: str(self.metadata[_PREFIX + name]) for name in names if _PREFIX + name in self.metadata}

    def part(self, name: str) -> Path:
        """The folder of `adapter` or `base`, fetched and whole."""
        folder = _fetch(self.name, self.number, self.parts[name]["path"])
        key = f"{name}_digest"
        # The version's tag, which says what was judged; a model that was registered by hand has only its own word.
        expected = self.tags.get(key) or self.metadata.get(_PREFIX + key)
        uri = shown(tasks.tracking.tracking_uri(workspace()))
        refuse_damage(folder, expected, f"{name} of version {self.number} of {self.name!r} in MLflow at {uri}")
        return folder


def _fetch(name: str, number: str, path: str) -> Path:
    with _store() as uri, away_errors(uri), storage_errors(workspace()):
        try:
            return Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{number}/{path}"))
        except (MlflowException, FileNotFoundError) as error:
            if is_away(error):
                raise
            raise DamagedError(
                f"MLflow at {shown(uri)} knows version {number} of {name!r}, but its {path} cannot be read "
                f"({shown(str(error)).splitlines()[0]}). Restore the artifacts of that version, or register it again."
            ) from None  # the cause may have the store's address as given, password and all


@contextmanager
def _store() -> Iterator[str]:
    """MLflow's fluent calls read the store from globals: the project's within the block, what was there behind it.

    Yields:
        The project's tracking URI, which is a secret if it has a password: `shown` makes it fit for a message.
    """
    with _GLOBALS:
        variable = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tasks.tracking.tracking_uri(workspace())
        mlflow.set_tracking_uri(uri)
        try:
            yield uri
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # unsets it, and the variable too
            if variable is not None:
                os.environ["MLFLOW_TRACKING_URI"] = variable
