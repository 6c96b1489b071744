"""What an evaluation's tasks read, as inputs of a stage: its key follows their contents, not their paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qadapter.evaluation.lm_eval.reads import reads_of
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
