"""Adapters as MLflow's logged models: the Models tab and column compare them by their metrics on each data set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

if TYPE_CHECKING:
    from tasks.tracking.store import MlflowStore

_DIGEST_TAG = "adapter_digest"
_TYPE = "adapter"


def log_model(store: MlflowStore, run_id: str, *, name: str, digest: str, params: Mapping[str, str]) -> None:
    """Make an adapter the logged model of a run; safe to repeat.

    An adapter that an earlier run logged under this name is linked, so that the tab shows each adapter once.

    Args:
        store: the MLflow store.
        run_id: the run that trained it, or found it.
        name: of the model.
        digest: of the adapter's stage. Its files are the run's artifacts; the model itself holds none.
        params: its settings.
    """
    run = store.call("get_run", run_id)
    if run.outputs is not None and run.outputs.model_outputs:
        return
    experiment_id = run.info.experiment_id
    condition = f"name = '{name}' AND tags.{_DIGEST_TAG} = '{digest}'"
    found = store.call("search_logged_models", [experiment_id], filter_string=condition, max_results=1)
    if found:
        model_id = found[0].model_id
    else:
        made = store.call(
            "create_logged_model",
            experiment_id,
            name=name,
            source_run_id=run_id,
            tags={_DIGEST_TAG: digest, MLFLOW_MODEL_IS_EXTERNAL: "True"},
            params=dict(params),
            model_type=_TYPE,
        )
        model_id = made.model_id
        store.call("finalize_logged_model", model_id, LoggedModelStatus.READY)
    store.call("log_outputs", run_id, [LoggedModelOutput(model_id, 0)])


def model_of(store: MlflowStore, run_id: str) -> str | None:
    """The id of the model that `log_model` gave to a run; None if it has none."""
    try:
        return _model_of(store, run_id)
    except LookupError:
        return None


@lru_cache(maxsize=256)
def _model_of(store: MlflowStore, run_id: str) -> str:
    """As `model_of`; a run's model never changes once it has one."""
    run = store.call("get_run", run_id)
    if run.outputs is None or not run.outputs.model_outputs:
        raise LookupError(run_id)
    return str(run.outputs.model_outputs[0].model_id)
