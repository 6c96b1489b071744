"""MLflow's system metrics (`system/cpu_utilization_percentage` …): its own monitors measure, our tracker sends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow.environment_variables import (
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING,
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
)
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from qadapter.progress.reports import Row

_SECONDS = 10.0  # MLflow's own default
_PREFIX = "system/"
_steps: dict[str, int] = {}  # run id → the next step: a run is continued by the evaluation
_LOGGER = logging.getLogger(__name__)


def wanted_by_environment() -> bool:
    """Whether system metrics are asked for as MLflow itself is asked, by `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`."""
    return bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())


@contextmanager
def system_metrics(run_id: str, log_rows: Callable[[Sequence[Row]], None]) -> Iterator[None]:
    """Measure the machine during the block, from a thread of its own.

    Args:
        run_id: the MLflow run that the rows go to.
        log_rows: sends them.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_measure, args=(run_id, log_rows, stop), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(2.0)


def _monitors() -> list[Any]:
    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        found.append(GPUMonitor())
    except Exception:  # MLflow's: no pynvml, or no GPU
        _LOGGER.debug("no metrics of GPUs", exc_info=True)
    return found


def _measure(run_id: str, log_rows: Callable[[Sequence[Row]], None], stop: threading.Event) -> None:
    monitors = _monitors()
    interval = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or _SECONDS)
    while True:
        row: dict[str, float] = {"step": _steps.setdefault(run_id, 0), "timestamp": int(time.time() * 1000)}
        for monitor in monitors:
            monitor.collect_metrics()
            row |= {f"{_PREFIX}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        _steps[run_id] += 1
        try:
            log_rows([row])
        except Exception as error:  # any error: a stage must not fail because of system metrics
            _LOGGER.warning("system metrics are not logged any more: %s", error)
            return
        if stop.wait(interval):
            return
