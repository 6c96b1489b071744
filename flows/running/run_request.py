"""A user's request for a flow run, and the checks that refuse it before the run starts."""

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
    """A user's request for a flow run.

    Attributes:
        experiment_name: name of the MLflow experiment.
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
        """Number of policies whose answers are judged: they determine the judge's price and share its budget."""
        return judged_rows(experiment)

    def fixed_sources(self, experiment: Experiment) -> dict[str, Source]:
        """The sources whose data must exist before a run."""
        return dict(experiment.sources)

    def check(self, *, remote: bool = True) -> Experiment:
        """Read the config and check everything that can be checked without computing.

        Args:
            remote: also check sources on the network.

        Raises:
            QAdapterError: the request is invalid; the message says what to correct.
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
                f"the profile {self.profile!r} needs a data folder and none was given; give one, for example "
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
    """Refuse to run code of a model repository if only the parameters of a deployment's run ask for it.

    Every user who may start a deployment sets its parameters, but only the operator sets the worker's environment.

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
    """Check that the workspace is writable, and make it private to the user.

    Raises:
        QAdapterError: the disk is full or read-only, the path is not a folder, or its content is open to other users
            and cannot be made private.
    """
    keep_private()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(65_536))
            file.flush()
    except OSError as error:
        raise QAdapterError(
            f"nothing can be written to the workspace {folder}: {error.strerror}. Free some space there, or set the "
            "environment variable QADAPTER_HOME to another folder."
        ) from error
    for name in (".qadapter", "mlruns"):
        close_to_others(folder / name)
    for database in folder.glob("mlflow.db*"):
        close_to_others(database)
