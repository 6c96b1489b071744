"""What a user asks a flow to run, and every reason to refuse it before there is a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.runtime import deployment

from qadapter.config.experiment import Experiment, load_experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.files.private import close_to_others, keep_private
from qadapter.judging.plan import judged_rows
from qadapter.planning.preflight import check_experiment
from tasks.stages.context import workspace
from tasks.stages.remote import RemoteStore

ALLOW_REMOTE_CODE = "QADAPTER_ALLOW_REMOTE_CODE"
"""Environment variable of a worker: `1` lets its deployments use `model.trust_remote_code`."""


@dataclass(frozen=True)
class RunRequest:
    """What a user asks for.

    Attributes:
        experiment_name: of the MLflow experiment.
        profile: a name in `configs/`, or a YAML file.
        data: the data folder, or None.
        overrides: dotted keys to values.
    """

    experiment_name: str
    profile: str
    data: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_folder(self) -> Path | None:
        """The data folder as an absolute path."""
        return Path(self.data).expanduser().resolve() if self.data else None

    def load(self) -> Experiment:
        """Read the config."""
        return load_experiment(self.profile, self.overrides)

    def rows_to_judge(self, experiment: Experiment) -> int:
        """Policies whose answers are judged; the judge's price is of them, and they share its budget."""
        return judged_rows(experiment)

    def fixed_sources(self, experiment: Experiment) -> dict[str, Source]:
        """The sources whose data have to be there before a run."""
        return dict(experiment.sources)

    def check(self, *, remote: bool = True) -> Experiment:
        """Read the config and look at everything that can be looked at without computing.

        Args:
            remote: ask for sources on the network too; without it only those on this machine are looked at.

        Raises:
            QAdapterError: with all that is needed to put it right.
        """
        experiment = self.load()
        _refuse_remote_code(experiment)
        experiment.launch.check(experiment.model.quantization)
        experiment.runner.check()
        RemoteStore.from_environment()
        folder = self.data_folder
        if folder is not None and not folder.is_dir():
            raise QAdapterError(f"the data folder {self.data!r} does not exist; give an existing folder")
        if experiment.needs_data and folder is None:
            raise QAdapterError(
                f"the profile {self.profile!r} needs a data folder and none was given; name one, for example "
                f"`make repro PROFILE={self.profile} DATA=path/to/folder`, or the deployment parameter "
                "data=path/to/folder"
            )
        check_workspace(workspace())
        check_experiment(
            experiment,
            folder,
            fixed=self.fixed_sources(experiment),
            rows=self.rows_to_judge(experiment),
            downloads=workspace() / ".qadapter" / "downloads",
            remote=remote,
        )
        return experiment


def _refuse_remote_code(experiment: Experiment) -> None:
    """A run of a deployment executes no code of a model repository on the word of its parameters alone.

    Whoever may start a deployment may set its parameters; whoever runs the worker sets its environment.

    Raises:
        QAdapterError: `model.trust_remote_code` is on in a run of a deployment, and the worker does not allow it.
    """
    allowed = os.environ.get(ALLOW_REMOTE_CODE) == "1"
    if experiment.model.trust_remote_code and deployment.get_id() and not allowed:
        raise QAdapterError(
            "model.trust_remote_code is on, which a deployment's parameters alone may not ask for: it runs code of "
            f"the model's repository. Set {ALLOW_REMOTE_CODE}=1 in the worker's environment, or start the run on the "
            "command line."
        )


def check_workspace(folder: Path) -> None:
    """Something can be written where results go, and other users cannot read it.

    Raises:
        QAdapterError: the disk is full or read-only, the place is no folder, or what lies there is open to other users
            and cannot be closed to them.
    """
    keep_private()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(65_536))
            file.flush()
    except OSError as error:
        raise QAdapterError(
            f"nothing can be written to the workspace {folder}: {error.strerror}. Free some space there, or name "
            "another folder with the environment variable QADAPTER_HOME."
        ) from error
    for name in (".qadapter", "mlruns"):
        close_to_others(folder / name)
    for database in folder.glob("mlflow.db*"):
        close_to_others(database)
