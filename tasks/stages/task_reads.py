"""What an evaluation's tasks read, as inputs of a stage: its key follows their contents, not their paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapter.config.evaluation import RetentionSettings
from qadapter.evaluation.lm_eval.reads import reads_of
from qadapter.files.folders import resolve_path
from tasks.stages.code_version import code_digest


def task_reads(
    names: Sequence[str], benchmarks: Path | None, official: Path | None, own: Mapping[str, Path]
) -> tuple[dict[str, Path], str]:
    """Files that the named tasks read, by the names of stage inputs, and the digest of the tasks' definitions.

    Args:
        names: of tasks, groups and suites.
        benchmarks: folder whose `benchmarks/` holds the items of the project's own tasks.
        official: folder with items of lm-eval's own tasks.
        own: benchmarks of the user's own, name → file of questions.
    """
    inputs: dict[str, Path] = {}
    definitions = {}
    for name, reads in reads_of(names, benchmarks, official, own).items():
        inputs |= {f"{name} reads {number}": file for number, file in enumerate(reads.files)}
        definitions[name] = {
            "settings": reads.settings,
            "code": [code_digest(module) for module in reads.modules],
            "datasets": reads.datasets,
        }
    return inputs, hashlib.sha256(json.dumps(definitions, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Questions:
    """What a run's retention tasks ask.

    Attributes:
        official: folder with items of lm-eval's own tasks.
        own: benchmarks of the user's own, name → file of questions.
        inputs: the files that the tasks read, by the names of stage inputs.
        definitions: digest of the tasks' definitions. A score depends on them as much as on the policy.
    """

    official: Path | None
    own: Mapping[str, Path]
    inputs: Mapping[str, Path]
    definitions: str


def questions_of(retention: RetentionSettings, benchmarks: Path | None, data: Path | None) -> Questions:
    """What the retention tasks of a config ask.

    Args:
        retention: the config's section.
        benchmarks: folder whose `benchmarks/` holds the items of the project's own tasks.
        data: the run's data folder, for paths that contain `{data}`.
    """
    official = Path(resolve_path(retention.official_data, data)) if retention.official_data else None
    own = retention.own_files(data)
    return Questions(official, own, *task_reads(retention.tasks, benchmarks, official, own))
