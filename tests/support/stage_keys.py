"""The cache keys of an experiment's stages, and of a candidate's training, without computing any of them.

A stage's output stands for its key, so that a changed key changes those of all stages that read it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock

from prefect.logging import disable_run_logger

from flows.full_paper_repro import experiment_stages
from qadapter.config.experiment import load_experiment
from tasks.candidate import train_candidate
from tasks.data import prepare_data
from tasks.quality import measure_quality
from tasks.report import write_report
from tasks.stages.context import Cell, RunContext
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageOutput, _input_digest, _key, code_digest

JUDGED: dict[str, Any] = {
    "domains": {"harmless": {"source": "harmless", "base": "helpful"}},
    "sources": {
        "helpful": {"path": "{data}/hh-rlhf/helpful.jsonl.gz", "heldout": 0.2},
        "harmless": {"path": "{data}/hh-rlhf/harmless.jsonl", "heldout": 0.2, "judge_pairs": 10},
    },
    "evaluation.adaptation.judge": "reward-model",
}
"""Overrides of the smoke profile: one domain, judged by a reward model."""


class KeyStore:
    """A store in which every stage is found, empty but for what tasks read beside their inputs."""

    def __init__(self, root: Path) -> None:
        self.root, self.keys = root, dict[str, str]()

    def run(
        self,
        name: str,
        *,
        module: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, StageOutput | Path],
        compute: Callable[[Path, Path], None],
        before: Callable[[], None],
    ) -> StageOutput:
        """Note the stage's key; `before` is only called of stages that are not found."""
        digests = {label: _input_digest(source) for label, source in inputs.items()}
        key = _key(name, code_digest(module, compute), config, digests)
        label = [name, *([config["method"]] if "method" in config else []), *(["on"] if "champion" in inputs else [])]
        self.keys[" ".join(label)] = key
        return self.finished(name, key)

    def finished(self, name: str, key: str) -> StageOutput:
        """A finished stage with the files that tasks read themselves."""
        folder = self.root / key
        folder.mkdir(exist_ok=True)
        (folder / "train.jsonl").write_text("")
        accuracies = ("accuracy", "accuracy_low", "accuracy_high")
        (folder / "metrics.json").write_text(json.dumps({f"judge/{measure}": 0.9 for measure in accuracies}))
        counts = (f"{side}_{what}" for side in ("train", "heldout", "judge") for what in ("sha256", "pairs", "prompts"))
        (folder / "summary.json").write_text(json.dumps(dict.fromkeys(counts, 0)))
        return StageOutput(name, key, folder, key, cached=False, seconds=0.0)


def stage_keys(methods: list[str]) -> dict[str, str]:
    """Stage → key, of the smoke profile with these methods; without the report, which may look at all methods."""
    experiment = load_experiment("smoke", {**JUDGED, "methods.run": methods})
    with TemporaryDirectory() as folder, disable_run_logger():
        store = KeyStore(Path(folder))
        context = RunContext(experiment, store, MagicMock(), "parent")  # type: ignore[arg-type]
        by_cell: dict[str, str] = {}

        def run(task: Any, **inputs: Any) -> Any:
            if task in (write_report, measure_quality):
                return None
            if task is prepare_data:  # it reads the files; methods have no part in them
                return StageResult(store.finished("prepare", inputs["source"]), "run")
            done = task.fn(context, **inputs)
            result = done.data if hasattr(done, "data") else done
            cell = inputs.get("cell")
            if cell and hasattr(result, "adaptation"):
                for half in ("adaptation", "retention"):
                    by_cell[f"{half} {cell.name}"] = getattr(result, half).output.key
                if cell.method == "q-adapter":
                    champion = {"base": inputs["base"], "data": inputs["data"], "champion": result.training}
                    train_candidate.fn(context, Cell("harmless", "candidate", 0), **champion)
            return result

        experiment_stages(experiment, run)
        kept = {name: key for name, key in store.keys.items() if name.split()[0] not in ("adaptation", "retention")}
        return {**kept, **by_cell}


if __name__ == "__main__":
    print(json.dumps(stage_keys(sys.argv[1:])))
