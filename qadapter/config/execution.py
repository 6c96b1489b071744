"""The config sections that set where an experiment runs, not what it computes.

They have a module of their own because a stage's cache key covers the code of every module that the stage imports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from qadapter.config.base import Count, Settings
from qadapter.config.folder import CONFIGS
from qadapter.config.reading import read_file
from qadapter.config.training import OptimizerSettings
from qadapter.errors import QAdapterError

CONFIG_FOLDER = CONFIGS / "accelerate"
_KINDS = ("MULTI_GPU", "FSDP", "DEEPSPEED")
# Keys that this project sets itself, or that do not change the numerics.
_REPLACED = ("num_processes", "num_machines", "machine_rank", "main_process_port", "debug")


class LaunchSettings(Settings):
    """How a training stage runs.

    Attributes:
        engine: `in-process`, or `accelerate`: several processes on this machine, through `accelerate launch`.
        config: for accelerate: a file of `configs/accelerate/` by name (`ddp.yaml`, `fsdp.yaml`, `zero2.yaml`,
            `zero3.yaml`), or the path of your own.
        processes: number of processes, usually one per GPU. They share `batch_size`: each takes `micro_batch_size`
            examples at a time (None: its whole share). The split changes rounding, so it is part of a stage's key.
    """

    engine: Literal["in-process", "accelerate"] = "in-process"
    config: str = "ddp.yaml"
    processes: Count = 1

    @model_validator(mode="after")
    def _check(self) -> LaunchSettings:
        if self.engine == "in-process" and (self.config, self.processes) != ("ddp.yaml", 1):
            raise ValueError("config and processes belong to engine accelerate; set launch.engine to accelerate")
        return self

    @property
    def file(self) -> Path:
        """Accelerate's config file: one of the project's by its name, or a path."""
        ours = CONFIG_FOLDER / self.config
        return ours if ours.is_file() and Path(self.config).name == self.config else Path(self.config).expanduser()

    def accelerate_config(self) -> dict[str, Any]:
        """The content of accelerate's config file, without the keys that this project sets itself.

        Raises:
            QAdapterError: the file is missing, or is not for several processes on one machine.
        """
        ours = ", ".join(sorted(file.name for file in CONFIG_FOLDER.glob("*.yaml")))
        if not self.file.is_file():
            raise QAdapterError(f"launch.config: there is no file {self.config!r}; known are {ours}, or give a path")
        found = read_file(self.file, "launch.config: ")
        kind = found.get("distributed_type")
        if kind not in _KINDS:
            raise QAdapterError(
                f"launch.config: distributed_type of {self.file} is {kind!r}; expected one of {', '.join(_KINDS)}"
            )
        if found.get("num_machines", 1) != 1:
            raise QAdapterError(f"launch.config: {self.file} is for {found['num_machines']} machines; expected 1")
        if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
            raise QAdapterError(f"launch.config: {self.file} needs DeepSpeed, which is missing: pip install deepspeed")
        return {name: value for name, value in found.items() if name not in _REPLACED}

    def contradictions(self, sections: Mapping[str, OptimizerSettings | None]) -> Iterator[str]:
        """Yield one sentence per training whose batch the processes cannot share evenly; `sections` by their keys."""
        if self.engine == "in-process":
            return
        for name, settings in sections.items():
            if settings is None:
                continue
            micro = settings.micro_batch_size
            if settings.batch_size % ((micro or 1) * self.processes):
                shares = f"{name}.micro_batch_size {micro} × " if micro else ""
                yield (
                    f"{name}.batch_size {settings.batch_size} is not a multiple of {shares}"
                    f"launch.processes {self.processes}"
                )

    def check(self, quantization: str) -> None:
        """Check the config file and its requirements before anything runs.

        Args:
            quantization: `model.quantization`.

        Raises:
            QAdapterError: as `accelerate_config`; or the config shards the base, and its weights cannot be sharded.
        """
        if self.engine == "in-process":
            return
        found = self.accelerate_config()
        sharded = found["distributed_type"] == "FSDP" or found.get("deepspeed_config", {}).get("zero_stage") == 3
        if sharded and quantization != "none":
            raise QAdapterError(
                f"launch.config {self.config} splits the base's weights over the processes, which 8-bit and 4-bit "
                f"weights do not allow (model.quantization is {quantization}); use ddp.yaml, or quantization none"
            )


class RunnerSettings(Settings):
    """How independent stages run side by side.

    Attributes:
        engine: `local`: `parallel` processes on this machine. `dask`, `ray`: Prefect's task runner of that name, on a
            cluster whose machines share `QADAPTER_HOME` (docs/scaling.md).
        address: the address of the cluster's scheduler (`tcp://host:8786`, `ray://host:10001`); None: a temporary
            cluster of `parallel` workers on this machine.
    """

    engine: Literal["local", "dask", "ray"] = "local"
    address: str | None = None

    @model_validator(mode="after")
    def _check(self) -> RunnerSettings:
        if self.engine == "local" and self.address:
            raise ValueError("address belongs to runner.engine dask or ray")
        return self

    def check(self) -> None:
        """Raise QAdapterError if the engine is not installed."""
        package = f"prefect_{self.engine}"
        if self.engine != "local" and find_spec(package) is None:
            raise QAdapterError(
                f"runner.engine is {self.engine}, which needs {package.replace('_', '-')}; install it "
                f'(pip install -c constraints.txt -e ".[{self.engine}]") or set runner.engine to local'
            )
