"""A sequence of preferences: what a file says, which stages follow, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from pydantic import ValidationError

from flows.continual import check_continual, continual_stages
from flows.customize import train
from flows.running.run_request import RunRequest
from flows.running.sweep_plan import SweepRecorder
from qadapter.config.budget import Budget
from qadapter.config.continual import CONTINUAL_FOLDER, Continual, continuals, load_continual
from qadapter.config.customization import Customization, load_customization
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from tasks.stages.context import Cell
from tests.support.commands import subcommand
from tests.support.tiny_deliveries import CONFIG

main = subcommand("continual")


def recorded(name: str, **changes: Any) -> SweepRecorder:
    """The stages of a sequence."""
    loaded = load_continual(name).model_copy(update=changes)
    recorder = SweepRecorder()
    continual_stages(load_experiment(loaded.profile, loaded.overrides({})), loaded, recorder)
    return recorder


def test_the_files_are_those_of_the_issue() -> None:
    """Four domains and all four ways; three seeds in the toy world, one with the real model."""
    assert continuals() == ["small", "smoke"]
    for name, seeds in (("smoke", (0, 1, 2)), ("small", (0,))):
        loaded = load_continual(name)
        experiment = load_experiment(loaded.profile, loaded.overrides({}))
        assert tuple(experiment.domains) == loaded.domains
        assert len(loaded.domains) == 4
        assert loaded.ways == ("continued", "composed", "retrained", "replayed")
        assert experiment.seeds == seeds
        assert experiment.methods.run == ("q-adapter",)
        loaded.check(experiment)
        first = (CONTINUAL_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# make continual")


def test_the_stages_of_a_sequence() -> None:
    """The first preference is trained once for all ways; each step is measured on all preferences so far."""
    stages = {stage.name: stage for stage in recorded("smoke").stages}
    kinds = Counter(stage.task for stage in stages.values())
    assert kinds["compose_adapters"] == 3 * 4
    assert kinds["train_adapter"] == 3 * (4 + 3), "four alone, and three on all pairs"
    assert kinds["train_candidate"] == 3 * (3 + 3), "three further steps each of continued and replayed"
    assert kinds["mix_with_past"] == 3 * (3 + 3)
    assert kinds["measure_step"] == 3 * 4 * 4
    third = stages["outcome-replayed-3-business-1"].inputs
    assert list(third["data"]) == ["harmless", "academy", "business"]
    assert third["adapter"].name == "train-replayed-3-business-1"
    assert third["adapter"].inputs["champion"].name == "train-replayed-2-academy-1"
    mixed = third["adapter"].inputs["data"]
    assert (list(mixed.inputs["earlier"]), mixed.inputs["share"]) == (["harmless", "academy"], 1.0)
    anew = stages["train-retrained-3-business-1"].inputs
    assert anew["data"].inputs["share"] == 1.0
    assert "champion" not in anew
    continued = stages["train-continued-3-business-1"].inputs
    assert continued["data"].name == "prepare-business"
    composed = stages["compose-3-business-1"].inputs
    assert [one.name for one in composed["adapters"]] == [
        "train-alone-1-harmless-1", "train-alone-2-academy-1", "train-alone-3-business-1"
    ]  # fmt: skip
    assert composed["before"].name == "compose-2-academy-1"
    for way in ("continued", "retrained", "replayed"):
        assert stages[f"outcome-{way}-1-harmless-1"].inputs["adapter"].name == "train-alone-1-harmless-1"


@pytest.mark.slow
def test_tasks_without_an_accuracy_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of perplexities there is no mean that a sequence could forget, nor a curve's budget."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    only = {"evaluation.retention.tasks": ["wikitext"]}
    with pytest.raises(QAdapterError, match="no task with an accuracy, only wikitext: what a sequence forgets"):
        check_continual("smoke", None, None, only, remote=False)
    with pytest.raises(QAdapterError, match="no task with an accuracy, only wikitext: a budget of forgetting"):
        RunRequest("full-paper-repro", "smoke", None, {**only, "evaluation.curve": {}}).check(remote=False)


def test_retraining_has_as_many_steps_per_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    """120 steps per preference in the toy world: 360 for three."""
    seen = []

    class Recorder(SweepRecorder):
        def of(self, experiment: Any) -> SweepRecorder:
            seen.append(experiment.training.max_steps)
            return self

    loaded = load_continual("smoke").model_copy(update={"ways": ("retrained",), "seeds": (0,)})
    continual_stages(load_experiment("smoke", loaded.overrides({})), loaded, Recorder())
    assert seen == [240, 360, 480]


def test_without_composed_only_the_first_preference_is_trained_alone() -> None:
    stages = recorded("smoke", ways=("continued",)).stages
    assert [stage.name for stage in stages if stage.name.startswith("train-alone")] == [
        f"train-alone-1-harmless-{seed}" for seed in (0, 1, 2)
    ]


def written(tmp_path: Path, **changes: Any) -> str:
    """A file with a sequence."""
    content = yaml.safe_load((CONTINUAL_FOLDER / "smoke.yaml").read_text(encoding="utf-8")) | changes
    file = tmp_path / "sequence.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ["harmless"]}, "domains"),
        ({"domains": ["harmless", "harmless"]}, "more than once"),
        ({"ways": ["continued", "resumed"]}, "ways.1"),
        ({"domains": ["harmless", "acadmy"]}, "did you mean 'academy'"),
        ({"way": ["continued"]}, "did you mean 'ways'"),
        ({"weights": [0]}, "greater than 0"),
        ({"settings": {"methods.q-adapter": {"preset": "paper"}}}, "to residual with α0 = α̃, or leave composed"),
        ({"settings": {"domains.academy.base": "pretrained"}}, "set domains.<name>.base alike"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--sequence", written(tmp_path, **changes), "--plan"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kept", "retention"])
def test_a_domain_is_not_named_as_the_retention(name: str) -> None:
    """Its last score in `matrix.json`, or its score among a step's metrics, was the retention's."""
    given = load_continual("smoke").model_dump()
    with pytest.raises(ValidationError, match=f"domains names '{name}', which is what the report calls the retention"):
        Continual.model_validate({**given, "domains": ["academy", name]})


@pytest.mark.parametrize(
    "changes", [{"methods.run": ["sft"]}, {"methods": {"run": ["sft"]}}, {"run_domains": ["academy"]}]
)
def test_changes_without_effect_are_refused(changes: dict[str, Any]) -> None:
    """The method and the domains are the sequence's own: all was run as if they had not been given."""
    with pytest.raises(QAdapterError, match=r"continual smoke: (methods.run|run_domains) has no effect, because"):
        load_continual("smoke").overrides(changes)


def test_a_limit_on_over_refusals_is_refused_where_none_is_measured() -> None:
    """A sequence measures none; a profile and a customization where they ask nothing harmless."""
    loaded = load_continual("smoke")
    limited = loaded.model_copy(update={"budget": Budget(max_over_refusals=0.05)})
    with pytest.raises(QAdapterError, match=r"budget.max_over_refusals has no effect, because no over-refusal is"):
        limited.check(load_experiment("smoke", loaded.overrides({})))
    curve = {"evaluation.curve": {}, "evaluation.budget": {"max_over_refusals": 0.05}}
    load_experiment("smoke", curve)
    nothing = {"evaluation.retention.tasks": ["toy_facts"], "evaluation.retention.answers": 0}
    with pytest.raises(QAdapterError, match=r"evaluation.budget: max_over_refusals is 0.05, and no harmless request"):
        load_experiment("smoke", {**curve, **nothing})
    customization = load_customization("smoke")
    assert customization.budget is None
    weekly = customization.model_copy(update={"budget": Budget(max_over_refusals=0.05), "overrides": nothing})
    with pytest.raises(QAdapterError, match=r"^budget: max_over_refusals is 0.05, and no harmless request is asked"):
        weekly.experiment()


def test_an_unknown_sequence_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sequence", "smok"]) == 2
    errors = capsys.readouterr().err
    assert "there is no sequence 'smok', did you mean 'smoke'? Known are small, smoke; the path of a .yaml" in errors


def test_other_objectives_go_without_composing(tmp_path: Path) -> None:
    file = written(tmp_path, settings={"methods.q-adapter": {"preset": "paper"}}, ways=["continued", "replayed"])
    loaded, _, experiment = check_continual(file, None, None, {})
    assert loaded.ways == ("continued", "replayed")
    assert experiment.methods.q_adapter.preset == "paper"
    with pytest.raises(QAdapterError, match="α0 = α̃"):
        check_continual(written(tmp_path), None, None, {"methods.q-adapter.alpha_0": 0})


def test_a_plan_counts_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sequence", "smoke", "--plan", "seeds=[0]"]) == 0
    text = capsys.readouterr().out
    assert "harmless → academy → business → literature, seeds 0" in text
    assert f"  {'compose_adapters':<26}{4:>5}" in text


# ---- what the recurring pipeline takes from it


@pytest.mark.parametrize(
    ("start", "champion", "trained"),
    [("champion", True, "train_candidate"), ("base", True, "train_adapter"), ("champion", False, "train_adapter")],
)
def test_a_candidate_starts_where_the_config_says(start: str, champion: bool, trained: str) -> None:
    """From the champion's adapter, or anew; the first candidate has no champion."""
    customization = Customization.model_validate({**CONFIG, "start": start})
    asked: list[tuple[str, set[str]]] = []
    cell, anything = Cell(customization.domain, "q-adapter", 0), cast(Any, object())
    train(
        lambda task, **inputs: asked.append((task.fn.__name__, set(inputs))),
        customization,
        cell,
        anything,
        anything,
        anything if champion else None,
    )
    ((name, inputs),) = asked
    assert name == trained
    assert ("champion" in inputs) == (trained == "train_candidate")


def test_the_default_start_is_no_part_of_a_config() -> None:
    """So that a customisation of before has the same digest."""
    assert "start" not in Customization.model_validate(CONFIG).model_dump()
    assert Customization.model_validate({**CONFIG, "start": "base"}).model_dump()["start"] == "base"
