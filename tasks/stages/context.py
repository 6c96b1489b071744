"""The context that all tasks of a flow run share: the experiment, the stores, and the MLflow parent run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qadapter.config.experiment import Experiment
from qadapter.files.folders import resolve_path
from tasks.stages.store import StageStore
from tasks.stages.workspace import PROJECT_ROOT, workspace
from tasks.tracking.tracker import Tracker

__all__ = ["LARGEST_LOGGED_FILE", "PROJECT_ROOT", "Cell", "RunContext", "workspace"]

LARGEST_LOGGED_FILE = 256 * 2**20  # bytes; a larger file (a whole model) is logged by name, size and digest


@dataclass(frozen=True)
class RunContext:
    """The context of a flow run, passed to every task; small, immutable and picklable.

    Attributes:
        experiment: the validated config.
        store: the store of finished stages.
        tracker: writes to MLflow.
        parent_run_id: id of this flow run's MLflow run.
        data: the user's data folder, if one was given.
        rows_to_judge: number of policies whose answers the flow run judges; None: derived from the experiment.
    """

    experiment: Experiment
    store: StageStore
    tracker: Tracker
    parent_run_id: str
    data: Path | None = None
    rows_to_judge: int | None = None

    @property
    def live(self) -> Path:
        """Folder in which the stages of this flow run write where they are; it is deleted when the flow run ends."""
        return self.store.root / "live" / self.parent_run_id

    def resolve(self, path: str, world: Path | None) -> str:
        """Replace `{data}` by the toy world's folder, or by the user's data folder."""
        return resolve_path(path, world or self.data)


@dataclass(frozen=True)
class Cell:
    """One cell of the comparison: one domain, one method (or the base itself), one seed."""

    domain: str
    method: str
    seed: int | None = None

    @property
    def name(self) -> str:
        """The run's name, by which the UI sorts runs: `academy · dpo · seed 1`."""
        seed = f" · seed {self.seed}" if self.seed is not None else ""
        return f"{self.domain} · {self.method}{seed}"

    def tags(self) -> dict[str, str]:
        """MLflow tags: filter the runs of one domain with `tags.domain = 'academy'`."""
        return {"stage": "customise", "domain": self.domain, "method": self.method, "seed": str(self.seed)}
