"""A candidate's training has the settings that the first training of its domain has."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from prefect.logging import disable_run_logger

import tasks.candidate
import tasks.train
from qadapter.config.experiment import load_experiment
from qadapter.config.training import OptimizerSettings
from tasks.candidate import train_candidate
from tasks.stages.context import Cell, RunContext
from tasks.stages.process_launcher import ProcessLauncher
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageOutput
from tasks.train import Base, train_adapter


def test_a_domains_epochs_are_those_of_every_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"domains.harmless.epochs": 3, "training.max_steps": None, "training.epochs": 1}
    experiment = load_experiment("smoke", changes)
    keyed: list[Any] = []
    trained: list[OptimizerSettings] = []

    def launched(_: ProcessLauncher, *__: Any, **settings: Any) -> None:
        trained.append(settings["training"])

    def found(_: RunContext, name: str, *, config: Any, compute: Any, **__: Any) -> StageResult:
        keyed.append(config["training"])
        compute(tmp_path, tmp_path)
        return done

    monkeypatch.setattr(ProcessLauncher, "__call__", launched)
    for module in (tasks.train, tasks.candidate):
        monkeypatch.setattr(module, "run_stage", found)
    context = RunContext(experiment, MagicMock(), MagicMock(), "parent")
    done = StageResult(StageOutput("any", "0" * 64, tmp_path, "1" * 64, cached=False, seconds=0.0), "run")
    cell, base = Cell("harmless", "q-adapter", 0), Base(str(tmp_path), None, "helpful")
    with disable_run_logger():
        train_adapter.fn(context, cell, base, done, {})
        train_candidate.fn(context, cell, base, done, done)
    assert [one.epochs for one in trained] == [one["epochs"] for one in keyed] == [3, 3]
