"""MLflow's system metrics (`system/cpu_utilization_percentage` …): its own monitors measure, our tracker sends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
_LOGGER = logging.getLogger(__name__)


def wanted_by_environment() -> bool:
    """Whether system metrics are asked for as MLflow itself is asked, by `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`."""
    return bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())


@contextmanager
def system_metrics(log_rows: Callable[[Sequence[Row]], None], counted: Path) -> Iterator[None]:
    """Measure the machine during the block, from a thread of its own.

    Args:
        log_rows: sends rows to the MLflow run.
        counted: file with the run's next step; the evaluation, in another process, goes on where the training ended.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_measure, args=(log_rows, counted, stop), name="system-metrics", daemon=True)
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


def _measure(log_rows: Callable[[Sequence[Row]], None], counted: Path, stop: threading.Event) -> None:
    monitors = _monitors()
    counted.parent.mkdir(parents=True, exist_ok=True)
    step = int(counted.read_text()) if counted.exists() else 0
    interval = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or _SECONDS)
    while True:
        row: dict[str, float] = {"step": step, "timestamp": int(time.time() * 1000)}
        for monitor in monitors:
            monitor.collect_metrics()
            row |= {f"{_PREFIX}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        step += 1
        try:
            counted.write_text(str(step))
            log_rows([row])
        except Exception as error:  # any error: a stage must not fail because of system metrics
            _LOGGER.warning("system metrics are not logged any more: %s", error)
            return
        if stop.wait(interval):
            return
