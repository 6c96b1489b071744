"""A base with its adapter as an MLflow model that `mlflow models serve` can serve, and the way back to its files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tasks.tracking  # first: it switches MLflow's telemetry off before MLflow is imported

import mlflow  # isort: skip
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

import qadapter
from qadapter.artifacts import storage_errors
from qadapter.errors import QAdapterError
from tasks.context import workspace

_GLOBALS = threading.Lock()
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
    """

    name: str
    base: str
    adapter: Path


def log_served_model(
    run_id: str,
    *,
    base: Path | str,
    adapter: Path,
    name: str = "policy",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Log a base and its adapter to a run as a model that can be registered and served without this project.

    The model's folder holds copies of the adapter, of the base if that is a folder, and of `qadapter`'s source, and
    names the versions of the packages it needs. It holds no pickle.

    Args:
        run_id: the run of the store in `workspace()` or `MLFLOW_TRACKING_URI`.
        base: folder, or hub id, which is then only named.
        adapter: what a training wrote.
        name: of the logged model, and of the customised policy in its answers.
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
    config = {"name": name} if local else {"name": name, "base": str(base)}
    package = Path(str(qadapter.__file__)).parent
    with _store(), storage_errors(workspace()):
        logged = Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            name=name,
            run_id=run_id,
            python_model=str(_CODE),
            artifacts=artifacts,
            code_paths=[str(package)],
            signature=SIGNATURE,
            pip_requirements=[f"{one}=={version(one).partition('+')[0]}" for one in _PACKAGES],
            model_config=config,
            metadata={**(metadata or {}), "qadapter.base": "artifact" if local else str(base)},
        )
        # A client of a database looks `models:/…` up in MLflow's global store, which need not be this one.
        return str(logged.model_uri if mlflow.get_tracking_uri().startswith("http") else logged.artifact_path)


def find_served_model(model: str) -> ServedFiles:
    """The files behind a registered version, downloaded if the store is not on this machine.

    Args:
        model: `NAME@ALIAS` or `NAME/VERSION`.

    Raises:
        QAdapterError: there is no such version, or it was not logged by `log_served_model`.
    """
    name = model.partition("@")[0].partition("/")[0]
    if not name or name == model:
        raise QAdapterError(f"{model!r} names no version. Give NAME@ALIAS or NAME/VERSION, such as policy@champion.")
    with _store():
        try:
            folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model}"))
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            raise QAdapterError(
                f"MLflow at {mlflow.get_tracking_uri()} has no model {model!r} ({reason}). "
                "`mlflow ui` lists the registered models; QADAPTER_HOME or MLFLOW_TRACKING_URI say which store is read."
            ) from error
    described = Model.load(str(folder))
    parts = (described.flavors.get("python_function") or {}).get("artifacts", {})
    base = (described.metadata or {}).get("qadapter.base")
    if base is None or "adapter" not in parts:
        raise QAdapterError(f"The model {model!r} is no base with an adapter. Register what log_served_model logged.")
    if base == "artifact":
        base = folder / parts["base"]["path"]
    return ServedFiles(name, str(base), folder / parts["adapter"]["path"])


@contextmanager
def _store() -> Iterator[None]:
    """MLflow's fluent calls read the store from globals: the project's within the block, what was there behind it."""
    with _GLOBALS:
        variable = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(tasks.tracking.tracking_uri(workspace()))
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # unsets it, and the variable too
            if variable is not None:
                os.environ["MLFLOW_TRACKING_URI"] = variable
