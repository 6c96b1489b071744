"""`kill -9` in the stages that only a sequence of preferences has: pairs, outcomes, composed adapters, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.processes.test_kill_matrices import TRAINING
from tests.support.kills import Killed, Row, cut, killed_at_each
from tests.support.real_runs import OVERRIDES, RealHome, Server

SEQUENCE: dict[str, Any] = {
    "name": "tiny",
    "profile": "smoke",
    "domains": ["harmless", "academy"],
    "seeds": [0],
    "ways": ["composed", "retrained", "replayed"],
    "budget": {"max_forgetting": 1.0},
    "weights": [1.0],
    "factors": [1.0],
}
CHANGES: dict[str, Any] = {
    "sources": {
        "helpful": OVERRIDES["sources"]["helpful"],
        "harmless": {"path": "{data}/hh-rlhf/harmless.jsonl", "heldout": 40, "max_heldout_pairs": 24},
        "academy": {
            "path": "{data}/dsp/domain_specific_preference.json", "domain": "academy", "heldout": 0.4
        },
    },
    "domains": {
        "harmless": {"source": "harmless", "base": "helpful"}, "academy": {"source": "academy", "base": "helpful"}
    },
    "training": TRAINING | {"max_steps": 3},
    "evaluation.retention": {"tasks": ["toy_facts"], "limit": 24, "answers": 0, "max_new_tokens": 3},
}  # fmt: skip
"""Two preferences, one seed, three ways; enough items for two halves."""

MATRIX = [
    Row("sequence-outcome", "written", "its files cut"),
    Row("compose", "renamed"),
    Row("sequence-pairs", "written"),
    Row("continual-report", "written"),
]


@dataclass
class ContinualHome(RealHome):
    """A workspace in which real processes run `make continual`."""

    def command(self, **changes: Any) -> tuple[str, list[str]]:
        file = self.folder / "tiny.yaml"
        file.write_text(yaml.safe_dump(SEQUENCE), encoding="utf-8")
        module, (_, _, _, *overrides) = super().command(**CHANGES, **changes)
        kept = [text for text in overrides if not text.startswith("methods.run")]
        return module, ["continual", "--sequence", str(file), *kept]


@pytest.fixture(scope="module")
def killed(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed[ContinualHome]:
    home, quiet = (
        ContinualHome(tmp_path_factory.mktemp(f"{name}-continual"), prefect_server, "") for name in ("killed", "quiet")
    )
    return killed_at_each(home, quiet, MATRIX, cut_what_was_written)


def cut_what_was_written(home: ContinualHome, row: Row) -> None:
    for file in next(home.store.glob(f"stages/{row.stage}/.*.tmp")).rglob("*.json"):
        cut(file)


@pytest.mark.slow
def test_every_kill_hit(killed: Killed[ContinualHome], record_property: Callable[[str, object], None]) -> None:
    """The fifth table of docs/operations.md."""
    killed.every_kill_hit(record_property)
    print(f"finished: {sum(killed.home.finished().values())}")


@pytest.mark.slow
def test_the_numbers_are_those_of_an_undisturbed_run(killed: Killed[ContinualHome]) -> None:
    finished = killed.home.finished()
    assert finished == killed.quiet.finished()
    assert finished["train"] == 2 + 1 + 1, "two alone, one on both, one trained on with replay"
    assert finished["compose"] == 2
    assert finished["sequence-outcome"] == 1 + 1 + 2 + 1 + 1, "the base; step 1 of both ways is one policy"
    assert killed.home.results() == killed.quiet.results()
    assert killed.home.measured() == killed.quiet.measured()
    assert not list(killed.home.store.glob("stages/*/.*"))
    assert not list(killed.home.store.glob("scratch/*/*"))


@pytest.mark.slow
def test_the_report_has_every_way(killed: Killed[ContinualHome]) -> None:
    (folder,) = killed.home.store.glob("stages/continual-report/[!.]*")
    table = json.loads((folder / "matrix.json").read_text(encoding="utf-8"))
    assert set(table["way"]) == set(SEQUENCE["ways"])
    assert len(table["score"]) == 3 * (1 + 2 + 2)
    assert (folder / "continual.html").is_file()
    assert "By default: " in (folder / "continual.md").read_text(encoding="utf-8")
