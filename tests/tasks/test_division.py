"""The held-out share of a growing source is never what the champion was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import flows.check_champion
import flows.customize
from qadapter.config.customization import Customization, load_customization
from qadapter.errors import QAdapterError
from tasks.candidate import refuse_other_division
from tasks.tracking.registry import Version
from tests.support.tiny_deliveries import CONFIG


def customization(folder: Path, seed: int = 0, **source: Any) -> Customization:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, "seed": seed, "source": {"path": "incoming", **source}}))
    return load_customization(str(file))


def trained_with(earlier: Customization) -> Version:
    """A champion as the registry has it."""
    return Version(
        3, "run", "models:/x", {"config": json.dumps({"customization": earlier.model_dump(mode="json")})}, (), 0
    )


def looked_for(now: Customization, champion: Version, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(flows.customize, "registry_of", lambda _: SimpleNamespace(champion=lambda: champion))
    monkeypatch.setattr(flows.customize, "changes_of", lambda _: None)

    def step(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(path=folder)

    return flows.customize._customize(now.experiment(), step, now, "", "fingerprint", force=True)


def checked(now: Customization, champion: Version, *_: Any) -> Any:
    registry: Any = None
    return flows.check_champion._heldout(lambda *_, **__: None, now, registry, champion, None)


@pytest.mark.parametrize("flow", [looked_for, checked])
@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"heldout": 0.1}, {"heldout": 0.2}, "trained with heldout 0.1 and seed 0; with heldout 0.2 and seed 0"),
        (
            {"heldout": 0.1},
            {"heldout": 0.1, "seed": 1},
            "trained with heldout 0.1 and seed 0; with heldout 0.1 and seed 1",
        ),
        ({"heldout_path": "held.jsonl"}, {}, "trained with held-out files; with heldout 0.1 and seed 0"),
    ],
)
def test_prompts_that_the_champion_has_learnt_are_not_held_out(
    flow: Callable[..., Any],
    before: dict[str, Any],
    now: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    champion = trained_with(customization(tmp_path, **before))
    with pytest.raises(QAdapterError, match=said):
        flow(customization(tmp_path, **now), champion, tmp_path, monkeypatch)


def test_the_same_division_and_held_out_files_are_taken(tmp_path: Path) -> None:
    share, files = customization(tmp_path, heldout=0.1), customization(tmp_path, seed=5, heldout_path="held.jsonl")
    refuse_other_division(None, share)
    for before in (share, files):
        refuse_other_division(trained_with(before), files)
    refuse_other_division(trained_with(share), customization(tmp_path, heldout=0.1, max_heldout_pairs=5))
    for tags in ({}, {"config": "… and 1 more: too long for a tag"}):
        refuse_other_division(Version(1, "run", "models:/x", tags, (), 0), share)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"heldout": 20}, "source.heldout is 20 prompts, and where a source grows or shrinks a number moves prompts"),
        ({"judge_pairs": 20}, "source.judge_pairs has no effect"),
    ],
)
def test_what_a_growing_source_cannot_follow_is_refused(source: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=said):
        customization(tmp_path, **source)
    assert customization(tmp_path, heldout=20, heldout_path="held.jsonl").source.heldout == 20
