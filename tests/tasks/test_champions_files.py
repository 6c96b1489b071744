"""What a champion is made of, as the recurring pipeline keeps it: whole or refused, and its base where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from flows.check_champion import check_champion
from flows.customize import customize_on_new_preferences
from qadapter.config.customization import load_customization
from qadapter.config.model import ModelSettings
from qadapter.files.artifacts import MANIFEST, digest_tree, list_files, read_json
from qadapter.preferences.ledger import RECORDS
from tasks.candidate import champions_adapter, champions_base, config_of, digest_of, learnt_by, registry_of
from tasks.tracking.models import find_base, find_served_model
from tasks.tracking.registry import Version
from tasks.train import Base
from tests.processes.test_customize import Step, Story, workspace_at
from tests.processes.test_served_model import WEIGHTS, hub_with
from tests.support.damage import cut, damaged, hidden, zero
from tests.support.tiny_deliveries import CONFIG, MODEL, deliver, evasions, refusals, write_config

pytestmark = pytest.mark.slow

HARMS = pytest.mark.parametrize("harm", [cut, zero])
DAMAGED = "The {} of version 1 of 'qadapter-tiny' in MLflow at"


@pytest.fixture(scope="module")
def told(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """One delivery, and its champion."""
    home = tmp_path_factory.mktemp("home")
    with workspace_at(home):
        story = Story(home, write_config(home))
        deliver(home, "1-first.jsonl", refusals()[:40])
        assert story.run("first").name == "Promoted", story.steps["first"].message
        yield story


def champion(story: Story) -> Version:
    found = registry_of(load_customization(story.config)).champion()
    assert found is not None
    return found


def weights(story: Story, part: str) -> Path:
    """The file in MLflow's copy of version 1."""
    (file,) = [f for f in list_files(Path(story.versions()[0].source)).values() if f.name == WEIGHTS[part]]
    return file


def stages(story: Story, *names: str) -> list[Path]:
    return [folder for name in names for folder in (story.home / ".qadapter/stages" / name).iterdir()]


def test_the_versions_tags_hold_what_was_trained_and_measured(told: Story) -> None:
    """Against the files of the stages themselves."""
    tags = told.versions()[0].tags
    customization = load_customization(told.config)
    expected = json.loads(json.dumps(config_of(customization, customization.experiment())))
    assert json.loads(tags["config"]) == expected
    assert expected["customization"]["gate"]["adaptation"]["min_gain"] == 0.01
    assert tags["config_digest"] == digest_of(expected)

    (mixture,) = stages(told, "training-mix")
    sides = {side: read_json(mixture / MANIFEST)["files"][f"{side}.jsonl"]["sha256"] for side in ("train", "heldout")}
    assert tags["data_digest"] == digest_of(sides)

    measured = {}
    for half in ("adaptation", "retention"):
        (stage,) = [s for s in stages(told, half) if "adapter" in read_json(s / MANIFEST)["inputs"]]
        measured |= read_json(stage / "metrics.json")
    assert "drift/words" in measured
    shown = {
        name: value
        for name, value in measured.items()
        if not name.startswith(("cost/", "drift/")) or name == "drift/moved"  # of drift only the headline
    }
    assert json.loads(tags["metrics"]) == shown
    assert {"adaptation/implied_reward_accuracy", "retention/toy_facts/exact_match"} & shown.keys()

    (ledger,) = stages(told, "new-preferences")
    assert tags["ledger_digest"] == read_json(ledger / MANIFEST)["files"][RECORDS]["sha256"]
    (adapter,) = stages(told, "adapter")
    assert tags["adapter_digest"] == digest_tree(adapter / "adapter")


@HARMS
@pytest.mark.parametrize("part", ["adapter", "base"])
def test_a_check_of_a_damaged_champion_says_so(told: Story, part: str, harm: Callable[[Path], None]) -> None:
    with damaged(weights(told, part), harm):
        step = told.run("check", check_champion)
    assert step.name == "Fell"
    assert DAMAGED.format(part) in step.message
    assert "Restore them from a backup, or roll back to another version" in step.message


@HARMS
@pytest.mark.parametrize("part", ["adapter", "base"])
def test_a_damaged_champion_is_not_trained_on(
    told: Story, part: str, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    """Where no stage has the same files any more: the profile has moved on to another base, and stages were pruned."""
    more = deliver(told.home, "2-more.jsonl", evasions()[:46])
    gone = stages(told, "adapter", "train") if part == "adapter" else stages(told, "helpful-sft")
    changes = {} if part == "adapter" else {"overrides": CONFIG["overrides"] | {"base_seed": 5}}
    told.config = write_config(told.home, **changes)
    try:
        with damaged(weights(told, part), harm), hidden(gone, tmp_path / "aside"):
            step = told.run("damaged", customize_on_new_preferences)
            for made in stages(told, "helpful-sft") if part == "base" else ():
                shutil.rmtree(made)
    finally:
        more.unlink()
        told.config = write_config(told.home)
    assert step.name == "Failed"
    assert DAMAGED.format(part) in step.message
    assert len(step.versions) == 1


@HARMS
def test_a_finished_stage_with_the_same_files_stands_in(told: Story, harm: Callable[[Path], None]) -> None:
    version = champion(told)
    with disable_run_logger(), damaged(weights(told, "adapter"), harm), damaged(weights(told, "base"), harm):
        adapter = champions_adapter(version, MODEL)
        assert adapter.is_relative_to(told.home / ".qadapter/stages")
        assert digest_tree(adapter) == version.tags["adapter_digest"]
        other = Base("another/model", None, "helpful", {"revision": "c" * 40})
        base = champions_base(other, version, ModelSettings(pretrained="another/model"), MODEL)
        assert Path(base.location).is_relative_to(told.home / ".qadapter/stages")
        assert digest_tree(Path(base.location)) == version.tags["base_digest"]
    assert champions_adapter(version, MODEL).is_relative_to(Path(version.source))


def test_a_champions_base_is_loaded_as_the_version_says(told: Story) -> None:
    """The profile may name another repository and its commit now, or another precision of the same files."""
    version, own = champion(told), {"dtype": "float32", "quantization": "none", "revision": None}
    with disable_run_logger():
        profile = ModelSettings(pretrained="another/model", revision="c" * 40, dtype="bfloat16", quantization="int8")
        other = Base("another/model", None, "pretrained", {"revision": "c" * 40})
        base = champions_base(other, version, profile, MODEL)
        assert base.location == find_base(f"{MODEL}/1")
        assert base.settings(profile).numerics() == own
        assert ModelSettings.model_validate(base.settings(profile).model_dump()) == base.settings(profile)

        same = Base(find_base(f"{MODEL}/1"), None, "helpful")
        halved = ModelSettings(pretrained="there", dtype="bfloat16")
        assert champions_base(same, version, halved, MODEL).settings(halved).numerics() == own
        as_it_was = ModelSettings(pretrained="there")
        assert champions_base(same, version, as_it_was, MODEL) is same, "so its stages keep their keys"
        assert same.settings(halved) is halved


def test_what_a_champion_has_learnt_is_kept_in_mlflow(told: Story, tmp_path: Path) -> None:
    """Read from there where the stage is gone or damaged; where MLflow's copy is damaged too, everything is new."""
    registry, version = registry_of(load_customization(told.config)), champion(told)
    stage = Path(version.tags["ledger"])
    (kept,) = (told.home / "mlruns").glob(f"*/{version.run_id}/artifacts/ledger/{RECORDS}")
    with disable_run_logger():
        assert learnt_by(version, registry) == stage
        with damaged(stage / RECORDS, zero):
            place = learnt_by(version, registry)
            assert place not in (None, stage)
        with hidden([stage], tmp_path / "aside"):
            place = learnt_by(version, registry)
            assert place is not None
            assert digest_tree(place / RECORDS) == version.tags["ledger_digest"]
            with damaged(kept, cut):
                assert learnt_by(version, registry) is None


def test_newness_is_by_the_champion_after_its_stage_is_deleted(told: Story) -> None:
    """With a damaged registered adapter too, of which a finished stage still has the files."""
    shutil.rmtree(champion(told).tags["ledger"])
    deliver(told.home, "2-better.jsonl", evasions()[:46])
    with damaged(weights(told, "adapter"), zero):
        step = told.run("better")
    assert step.name in {"Promoted", "Rejected"}, step.message
    assert step.versions[1].tags["data_pairs"] == "86 (46 new)"
    assert step.versions[1].tags["parent"] == "1"


# ---- a base of the hub


def with_hub_base(home: Path, **model: Any) -> str:
    """The tiny customisation of a base that the hub has."""
    overrides = {k: v for k, v in CONFIG["overrides"].items() if not k.startswith(("model.", "pretraining."))}
    overrides |= {"model": {"pretrained": "owner/model", **model}, "pretraining": None, "helpful_sft.lora": True}
    return write_config(home, overrides=overrides | {"domains.harmless.base": "pretrained"})


@pytest.fixture(scope="module")
def moved(told: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Story, str, Step, Step]]:
    """Two deliveries; between them the hub's main moves on to a commit that cannot be loaded."""
    home, hub = tmp_path_factory.mktemp("hub-home"), tmp_path_factory.mktemp("hub")
    (folder,) = [stage / "model" for stage in stages(told, "helpful-sft")]
    old, new = hub_with(hub, folder)
    (hub / "models--owner--model/snapshots" / new / "model.safetensors").write_bytes(b"broken")
    with workspace_at(home) as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        story = Story(home, with_hub_base(home))
        deliver(home, "1-first.jsonl", refusals()[:40])
        first = story.run("first")
        (hub / "models--owner--model/refs/main").write_text(new)
        story.config = with_hub_base(home, dtype="bfloat16")
        deliver(home, "2-better.jsonl", evasions()[:46])
        yield story, old, first, story.run("second")


def test_a_champions_base_stays_at_its_commit_when_main_moves(moved: tuple[Story, str, Step, Step]) -> None:
    """In training, evaluation and serving, and in the precision it was trained with, though the profile's is new."""
    story, old, first, second = moved
    assert first.name == "Promoted", first.message
    assert second.name in {"Promoted", "Rejected"}, second.message
    assert [version.tags["base_digest"] for version in story.versions()] == [f"owner/model@{old}"] * 2
    assert story.versions()[1].tags["parent"] == "1"
    for name in ("train", "adaptation", "retention"):
        held = [read_json(stage / MANIFEST)["config"]["model"] for stage in stages(story, name)]
        assert len(held) >= 2
        assert held == [{"quantization": "none", "dtype": "float32", "revision": old}] * len(held), name
    (base_row,) = [s for s in stages(story, "adaptation") if "adapter" not in read_json(s / MANIFEST)["inputs"]]
    assert base_row, "it was measured once, and is the same base still"
    for number in (1, 2):
        served = find_served_model(f"{MODEL}/{number}")
        assert served.base == "owner/model"
        assert served.numerics == {"dtype": "float32", "quantization": "none", "revision": old}


def test_a_check_measures_on_the_old_commit_too(moved: tuple[Story, str, Step, Step]) -> None:
    story, *_ = moved
    assert story.run("check", check_champion).name == "Steady"
