"""Evaluation and generation by two processes of `accelerate launch`: the files of one process, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.config.execution import LaunchSettings
from qadapter.config.model import ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.evaluation.measure import measure_retention
from qadapter.judging import rule
from qadapter.judging.comparing import measure_judged
from qadapter.judging.kind import Case, Material
from qadapter.methods.needs.base_answers import AnswerSettings, answer_prompts
from tasks.stages.process_launcher import ProcessLauncher
from tests.support.heard import Heard
from tests.support.tiny_toy import MODEL, TRAINING, TinyToy, make_tiny_toy

TWO = LaunchSettings(engine="accelerate", processes=2)
ADAPTATION = AdaptationSettings(batch_size=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("toy"))


def judged(launcher: ProcessLauncher, toy: TinyToy, adapter: Path | None, base: Path | None, home: Path) -> Path:
    """Adaptation with the toy world's rule as the judge."""
    training = OptimizerSettings(**TRAINING.model_dump())
    case = Case("harmless", "harmless", True, None, True, None, 0, 4, 8, 3, training, 64, None)
    material = Material(toy.world, None, toy.base, MODEL, home, 2)
    positional = (toy.base, adapter, toy.heldout, base)
    named: dict[str, Any] = {
        "model": MODEL, "settings": ADAPTATION, "max_length": 64, "world": toy.world, "style": None
    }  # fmt: skip
    for name in ("out", "scratch"):
        (home / name).mkdir(parents=True)
    launcher(
        measure_judged,
        rule.JUDGE.open,
        case,
        material,
        4,
        *positional,
        **named,
        out=home / "out",
        scratch=home / "scratch",
    )
    return home / "out"


def retained(launcher: ProcessLauncher, toy: TinyToy, home: Path) -> Path:
    """Retention of the base, with likelihoods, generated answers and old prompts."""
    settings = RetentionSettings(tasks=("toy_facts", "toy_sums"), limit=6, batch_size=2, max_new_tokens=8, answers=5)
    named: dict[str, Any] = {"benchmarks": toy.world, "old_texts": toy.pairs, "max_length": 64}
    for name in ("out", "scratch"):
        (home / name).mkdir(parents=True)
    launcher(
        measure_retention,
        toy.base,
        None,
        None,
        model=MODEL,
        settings=settings,
        **named,
        out=home / "out",
        scratch=home / "scratch",
    )
    return home / "out"


def answered(launcher: ProcessLauncher, toy: TinyToy, home: Path) -> Path:
    """The base's answers, sampled: drawn by one process in the order of one process."""
    for name in ("out", "scratch"):
        (home / name).mkdir(parents=True)
    launcher(
        answer_prompts,
        toy.base,
        toy.pairs,
        model=MODEL,
        settings=AnswerSettings(max_new_tokens=8, temperature=1.0),
        batch_size=3,
        seed=5,
        out=home / "out",
        scratch=home / "scratch",
    )
    return home / "out"


def assert_same_files(one: Path, two: Path) -> None:
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    for file in one.iterdir():
        other = two / file.name
        if file.name == "metrics.json":
            first, second = (json.loads(path.read_text()) for path in (file, other))
            assert first.keys() == second.keys()
            assert {k: v for k, v in first.items() if "cost/" not in k} == {
                k: v for k, v in second.items() if "cost/" not in k
            }
        else:
            assert file.read_bytes() == other.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.usefixtures("forked_launch")
def test_two_processes_evaluate_as_one(toy: TinyToy, tmp_path: Path) -> None:
    """Each computed a share of the batches, and one reported for both."""
    here = ProcessLauncher(LaunchSettings())
    both = ProcessLauncher.for_evaluation(TWO, MODEL)
    adapter = toy.train("sft", tmp_path / "sft") / "adapter"
    base = judged(here, toy, None, None, tmp_path / "base")
    one = judged(here, toy, adapter, base, tmp_path / "one")
    heard = Heard()
    with heard.listening():
        two = judged(both, toy, adapter, base, tmp_path / "two")
    assert_same_files(one, two)
    kept = {rank: (tmp_path / f"two/scratch/items/items-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)}
    assert len(kept[0]) >= len(kept[1]) > 3
    whole = (tmp_path / "one/scratch/items/items-0.jsonl").read_text().splitlines()
    assert len(kept[0]) + len(kept[1]) == len(whole)
    begun = [text for text in heard.told if isinstance(text, str) and text.startswith("scoring: reply ")]
    assert [text.endswith(" of 24") for text in begun] == [True], "the other process may have begun before"
    assert_same_files(retained(here, toy, tmp_path / "kept-one"), retained(both, toy, tmp_path / "kept-two"))
    assert_same_files(answered(here, toy, tmp_path / "answers-one"), answered(both, toy, tmp_path / "answers-two"))


def test_where_evaluations_run() -> None:
    """As many processes as trainings have, each with the whole base; in this one where the base is spread."""
    model = ModelSettings(pretrained="x")
    launched = ProcessLauncher.for_evaluation
    assert launched(LaunchSettings(), model).settings.engine == "in-process"
    assert launched(TWO, model).settings == TWO
    split = LaunchSettings(engine="accelerate", config="fsdp.yaml", processes=4)
    assert launched(split, model).settings == split.model_copy(update={"config": "ddp.yaml"})
    spread = ModelSettings(pretrained="x", device_map="auto")
    assert launched(split, spread).settings.engine == "in-process"
    assert spread.key() == model.key(), "where a base lies changes no result"
