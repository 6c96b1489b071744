"""`kill -9` in the stages that only a sequence of preferences has: pairs, outcomes, composed adapters, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from tests.processes.test_kill_matrices import TRAINING
from tests.support.kills import Row, cut
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


@dataclass
class Killed:
    """A workspace in which every run but the last was killed, and one without trouble."""

    home: ContinualHome
    quiet: ContinualHome
    codes: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def killed(prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    home = ContinualHome(tmp_path_factory.mktemp("killed-continual"), prefect_server, "")
    before = 0
    for row in MATRIX:
        row.ended(home.run((row.stage, row.moment)))
        finished = sum(home.finished().values())
        row.outcome += f"; {finished} ({finished - before}) stages finished"
        before = finished
        if row.damage:
            for file in next(home.store.glob(f"stages/{row.stage}/.*.tmp")).rglob("*.json"):
                cut(file)
    quiet = ContinualHome(tmp_path_factory.mktemp("quiet-continual"), prefect_server, "")
    return Killed(home, quiet, [home.run(), quiet.run()])


@pytest.mark.slow
def test_every_kill_hit(killed: Killed, record_property: Callable[[str, object], None]) -> None:
    """The fifth table of docs/operations.md."""
    for row in MATRIX:
        record_property(f"{row.stage} {row.moment}", str(row))
        print(f"| {row.stage} | {row.moment} | {row.damage or '–'} | {row.outcome} |")
    print(f"finished: {sum(killed.home.finished().values())}")
    assert killed.codes == [0, 0], killed.home.printed()[-4000:] + killed.quiet.printed()[-4000:]
    assert [row.outcome.split(";")[0] for row in MATRIX] == ["signal 9"] * len(MATRIX)


@pytest.mark.slow
def test_the_numbers_are_those_of_an_undisturbed_run(killed: Killed) -> None:
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
def test_the_report_has_every_way(killed: Killed) -> None:
    (folder,) = killed.home.store.glob("stages/continual-report/[!.]*")
    table = json.loads((folder / "matrix.json").read_text(encoding="utf-8"))
    assert set(table["way"]) == set(SEQUENCE["ways"])
    assert len(table["score"]) == 3 * (1 + 2 + 2)
    assert (folder / "continual.html").is_file()
    assert "By default: " in (folder / "continual.md").read_text(encoding="utf-8")
