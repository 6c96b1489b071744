"""Run one stage through the store, and log it to MLflow and Prefect, whether computed or found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from prefect.states import Completed

from qadapter.errors import QAdapterError
from qadapter.files.shown import shown
from tasks.stages.context import LARGEST_LOGGED_FILE, RunContext
from tasks.stages.live import LiveStage, shown_live
from tasks.stages.memory import WORTH_IT, give_back_memory
from tasks.stages.store import StageOutput
from tasks.tracking.system_metrics import system_metrics, wanted_by_environment
from tasks.tracking.tracker import flatten
from tasks.tracking.view import FRESH_TAG


@dataclass(frozen=True)
class StageResult:
    """The result of a task: a finished stage and its MLflow run."""

    output: StageOutput
    run_id: str

    @property
    def path(self) -> Path:
        """The stage's folder."""
        return self.output.path


def run_stage(
    context: RunContext,
    name: str,
    *,
    module: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, StageOutput | Path],
    compute: Callable[[Path, Path], None],
    label: str | None = None,
    run_id: str | None = None,
    run_name: str | None = None,
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    log: Callable[[str, StageOutput], None] | None = None,
    model_data: tuple[str | None, str | None] | None = None,
) -> StageResult:
    """Run a stage through the store and log its metrics, curves, parameters and files, whether computed or found.

    Args:
        context: the flow run's context.
        name, module, config, inputs, compute: arguments of `StageStore.run`.
        label: the stage's subject (a source, a domain); part of the MLflow run's name.
        run_id: an MLflow run to continue; None starts a child of the flow run's MLflow run.
        run_name: name of the child; by default name and label.
        tags, params: added to the run.
        log: logs further content, given the run's id and the finished stage.
        model_data: of a measurement of the run's logged model: name and digest of the data set; None and None if it is
            none that MLflow knows.

    Returns:
        The finished stage and its MLflow run.
    """
    tracker = context.tracker
    settings = flatten(params or {} if run_id else _given({**config, **(params or {})}))
    title = run_name or (f"{name} · {label}" if label else name)
    if run_id is None:
        run_id = tracker.start_child(
            context.parent_run_id,
            title,
            tags={"stage": name, "mlflow.source.name": f"{module.replace('.', '/')}.py", **(tags or {})},
        )
    live = LiveStage(
        name,
        title,
        log_rows=partial(tracker.log_history, run_id),
        logger=get_run_logger(),
        folder=context.live,
    )
    with tracker.ending(run_id):
        with shown_live(live), _system_metrics(context, run_id), _masked_errors():
            output = context.store.run(
                name,
                module=module,
                config=config,
                inputs=inputs,
                compute=compute,
                before=partial(tracker.log_params, run_id, settings),
            )
        live.end(seconds=output.seconds, cached=output.cached)
        if not output.cached and output.seconds > WORTH_IT:
            give_back_memory()
        measured = {**output.metrics(), f"cost/{name}_stage_seconds": output.seconds}
        fresh = {} if output.cached else {FRESH_TAG: True}
        tracker.log(
            run_id,
            params={**(settings if output.cached else {}), **flatten(output.params())},  # those of a found one at once
            tags={f"cached.{name}": output.cached, f"digest.{name}": output.digest[:16], **fresh},
            history=[{"step": 0, **measured}, *live.unsent(output.history())],
            model_data=model_data,
        )
        tracker.log_folder(run_id, output.path, name, max_bytes_per_file=LARGEST_LOGGED_FILE)
        if log:
            log(run_id, output)
    how = f"found ({output.key[:12]}), it took" if output.cached else "done in"
    get_run_logger().info("%s: %s %.1f s", title, how, output.seconds)
    return StageResult(output, run_id)


def _system_metrics(context: RunContext, run_id: str) -> AbstractContextManager[None]:
    """What measures the machine while a stage runs, if that is asked for."""
    if not (context.experiment.system_metrics or wanted_by_environment()):
        return nullcontext()
    return system_metrics(partial(context.tracker.log_history, run_id), context.live / f"{run_id}.system-steps")


@contextmanager
def _masked_errors() -> Iterator[None]:
    """Mask secrets in errors of libraries: Prefect stores their text and traceback."""
    try:
        yield
    except QAdapterError:
        raise
    except Exception as error:
        if shown(str(error)) == str(error):
            raise
        raise QAdapterError(f"{type(error).__name__}: {error}") from None


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not None. None means a default, which the stage's `params.json` fills in."""
    return {
        name: _given(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if value is not None
    }


def task_result(value: Any, *stages: StageResult) -> Any:
    """Wrap a task's return value in a state that Prefect shows as `Cached`, if every stage was found."""
    return Completed(name="Cached", data=value) if all(stage.output.cached for stage in stages) else value
