"""What is left of a flow run: from the plan, then from what was measured; in the log and in a terminal."""

from __future__ import annotations

import io
import json
import logging
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows.full_paper_repro import experiment_stages
from flows.running import left as left_module
from flows.running import stage_costs
from flows.running.left import Submitted, Teller, frame, kind_of, seconds_left, summary
from flows.running.plan import Recorder
from flows.running.stage_costs import plain, seconds_of
from qadapter.config.experiment import load_experiment
from qadapter.config.sources import Source
from qadapter.files.artifacts import write_json
from tasks.stages.context import Cell
from tasks.stages.live import Place

NOW = 1_000_000.0
TASKS = [
    Submitted("train-a-sft-0", "train sft", 100),
    Submitted("train-b-sft-0", "train sft", 100),
    Submitted("train-a-dpo-0", "train dpo", 200),
    Submitted("report", "write_report"),
]


def ended(task: str, seconds: float, *, cached: bool = False) -> Place:
    return Place("train", task, task, NOW - 500, ended=True, seconds=seconds, cached=cached)


def at_work(task: str, done: int, total: int, *, rate: float | None, began: float) -> Place:
    return Place("train", task, task, NOW - began, "training", "step", done, total, rate)


def left(names: set[str], *now: Place, parallel: int = 1) -> float | None:
    return seconds_left(TASKS, names, now, parallel, NOW)


def test_before_anything_was_measured_the_plan_counts() -> None:
    assert left(set()) == 400
    assert left(set(), parallel=2) == 200, "as long as the longest one"
    assert seconds_left(TASKS[-1:], set(), (), 1, NOW) is None, "without plan and measurement nothing is known"


def test_what_was_measured_counts_more_than_the_plan() -> None:
    """SFT took three times the plan's 100 s: the other SFT takes as long, and DPO three times its 200 s."""
    assert left({"train-a-sft-0"}, ended("train-a-sft-0", 300)) == 300 + 600


def test_found_stages_measure_nothing() -> None:
    assert left({"train-a-sft-0"}, ended("train-a-sft-0", 300, cached=True)) == 100 + 200


def test_a_failed_stage_measures_nothing() -> None:
    """Neither alone, nor where it is the second one of its task: then the task's time is not known."""
    assert left({"train-a-sft-0"}, ended("train-a-sft-0", 0)) == 100 + 200
    first, second = ended("train-a-sft-0", 300), replace(ended("train-a-sft-0", 0), stage="retention")
    assert left({"train-a-sft-0"}, first, second) == 100 + 200


def test_a_running_stage_knows_best() -> None:
    """60 of 100 steps at 5 s each: 200 s, where the plan has 100 s less the 50 s so far."""
    running = at_work("train-a-sft-0", 60, 100, rate=5.0, began=50)
    assert left(set(), running) == 200 + 100 + 200
    silent = at_work("train-a-sft-0", 0, 100, rate=None, began=30)
    assert left(set(), silent) == 70 + 100 + 200


def test_a_training_that_goes_on_sets_the_pace() -> None:
    """After 300 s 60 of 100 steps are done, 200 s are left: 500 s for 100 planned ones, so DPO's 200 s become 1,000."""
    running = at_work("train-a-sft-0", 60, 100, rate=5.0, began=300)
    assert left(set(), running) == 200 + 500 + 1000
    begun = at_work("train-a-sft-0", 5, 100, rate=5.0, began=300)
    assert left(set(), begun) == 475 + 100 + 200, "a twentieth of its steps says little"


def test_a_resumed_training_counts_what_it_did_before() -> None:
    """80 of 100 steps at 5 s were done before, 12 more in these 60 s: the training takes 500 s as above, not 100."""
    resumed = replace(at_work("train-a-sft-0", 92, 100, rate=5.0, began=60), before=80)
    assert left(set(), resumed) == 40 + 500 + 1000
    early = replace(at_work("train-a-sft-0", 82, 100, rate=0.5, began=1), before=80)
    assert left(set(), early) == 100 - 40 - 1 + 100 + 200, "in place of the 100 planned seconds less this one"


def test_at_the_end_nothing_is_left() -> None:
    assert left({task.name for task in TASKS}, ended("train-a-sft-0", 300)) == 0


def test_the_line_of_the_log() -> None:
    running = at_work("train-b-sft-0", 60, 100, rate=5.0, began=50)
    assert summary(TASKS, {"train-a-sft-0"}, [ended("train-a-sft-0", 1), running], 500.0) == (
        "1 of 4 stages have finished, about 8 min left in all; "
        "train-b-sft-0: training: step 60 of 100 (60 %), 5.0 s per step, about 3 min left"
    )
    assert summary(TASKS, set(), [], None) == "0 of 4 stages have finished"
    assert summary(TASKS, set(), [], 7200.0, sure=False) == (
        "0 of 4 stages have finished, 80 min to 3 h 00 min left by the plan in all"
    )


def test_the_line_of_a_terminal_fits() -> None:
    running = at_work("train-b-sft-0", 60, 100, rate=5.0, began=50)
    text = frame(TASKS, {"train-a-sft-0"}, [running], 500.0, 120)
    assert text.startswith("1/4 stages |")
    assert text.endswith("| 25 % · about 8 min left · train-b-sft-0 training step 60/100")
    assert len(frame(TASKS, {"train-a-sft-0"}, [running] * 9, 500.0, 80)) == 79


def test_kinds() -> None:
    assert kind_of("train_adapter", {"cell": Cell("a", "dpo", 0)}) == "train dpo"
    assert kind_of("prepare_data", {"source": "a"}) == "prepare_data"


def test_every_stage_of_the_plan_has_its_seconds() -> None:
    """The same stages that `make plan` estimates, and nothing is read for it."""
    experiment = load_experiment("smoke")
    recorder = Recorder()
    experiment_stages(experiment, recorder)
    known = [(experiment, stage.task, stage.name, plain(stage.inputs)) for stage in recorder.stages]
    found = seconds_of(pickle.loads(pickle.dumps(known)), None)  # a run computes it in another process
    assert found == seconds_of([(experiment, stage.task, stage.name, stage.inputs) for stage in recorder.stages], None)
    names = {stage.name for stage in recorder.stages}
    assert found.keys() < names
    assert {"pretrain", "helpful-sft", "train-academy-dpo-0", "evaluate-academy-dpo-0"} <= found.keys()
    assert all(seconds > 0 for seconds in found.values())
    assert found["train-academy-dpo-0"] > found["train-academy-sft-0"]


def test_prepared_data_set_the_first_estimate(tmp_path: Path) -> None:
    """Rows of 47 tokens instead of half of 256: a training's time is that of its tokens, 37 % of what was assumed.

    Prompts of 80 and replies of 80 characters are 40 tokens a sequence, and a template adds 3.6 to each of the two; 20
    and the end are scored. A step of SFT reads 16 sequences, 2 passes: 64 steps · 16 · 2 · 2 · (body · 47.2 + head ·
    21) operations at 48 GFLOP/s.
    """
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path)
    overrides = {"model.pretrained": str(tmp_path), "run_domains": ["academy"], "parallel": 1}
    experiment = load_experiment("small", overrides)
    recorder = Recorder()
    experiment_stages(experiment, recorder)
    stages = [(experiment, stage.task, stage.name, stage.inputs) for stage in recorder.stages]
    prepared = {}
    for source in experiment.sources:
        prepared[source] = tmp_path / source
        write_json(tmp_path / source / "summary.json", {"train_pairs": 300, "heldout_pairs": 50})
        reply = [{"role": "assistant", "content": "b" * 80}]
        row = {"prompt": [{"role": "user", "content": "a" * 80}], "chosen": reply, "rejected": reply}
        (tmp_path / source / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 300)
    before, after = seconds_of(stages, None), seconds_of(stages, None, prepared)
    ends = 2 * 1000 * 64
    body = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    expected = 64 * 16 * 2 * 2 * (body * 47.2 + ends / 2 * 21) / 48e9
    assert after["train-academy-sft-0"] == pytest.approx(15 + expected)  # 15 s until a stage's first step
    assert before["train-academy-sft-0"] == pytest.approx(
        15 + expected * (body * 128 + ends / 2 * 64) / (body * 47.2 + ends / 2 * 21)
    )
    assert after.keys() == before.keys()


def test_prepared_single_replies_have_their_seconds(tmp_path: Path) -> None:
    """100 single replies are 50 pairs of a training: the same tokens as above, in 50 / 16 steps."""
    single = {"prompt": [{"role": "user", "content": "a" * 80}], "label": True}
    row = {**single, "completion": [{"role": "assistant", "content": "b" * 80}]}
    write_json(tmp_path / "summary.json", {"train_pairs": 0, "single_rows": 100, "heldout_pairs": 5})
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "single.jsonl").write_text(f"{json.dumps(row)}\n" * 100)
    assert stage_costs._plan_prepared(tmp_path, 256) == stage_costs.SourcePlan(50, 20 + 20 + 2 * 3.6, 21, "", 5)


def test_the_plan_reads_single_replies(tmp_path: Path) -> None:
    """51 of them are 25 pairs, and the rows' own lengths count; they were refused as having no usable pair."""
    rows = [{"prompt": f"{i:080}", "completion": "b" * 80, "label": i % 2 == 0} for i in range(51)]
    (tmp_path / "kto.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"prompt": "empty"}]))
    source = Source(path="kto.jsonl", pairing="none", heldout_path="held.jsonl")
    plan = stage_costs._plan_local(source, 256, [tmp_path / "kto.jsonl"])
    assert (plan.train_pairs, plan.tokens_per_sequence, plan.reply_tokens) == (25, pytest.approx(47.2), 21)
    assert plan.note == "51 single replies, 1 quarantined; 47 tokens a sequence"


class Terminal(io.StringIO):
    """A terminal that keeps what was drawn."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_a_run_tells_and_draws(
    tmp_path: Path, terminal: io.StringIO, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(left_module, "BETWEEN_LINES", 0.2)
    monkeypatch.setattr(left_module, "_BETWEEN_FRAMES", 0.05)
    shown: list[float] = []
    monkeypatch.setattr(left_module, "create_progress_artifact", lambda share, **_: shown.append(share) or "id")
    monkeypatch.setattr(left_module, "update_progress_artifact", lambda _, share, **__: shown.append(share))
    caplog.set_level(logging.INFO, "flows.test")
    monkeypatch.setattr(left_module, "get_run_logger", lambda: logging.getLogger("flows.test"))
    asked = []

    def plan() -> Mapping[str, float]:
        asked.append(1)
        return {"train-a-sft-0": 120.0}

    teller = Teller(tmp_path, 1, name="full paper smoke", plan=plan, terminal=terminal)
    teller.submitted("train-a-sft-0", "train sft")
    teller.submitted("report", "write_report")
    place: dict[str, Any] = asdict(Place("train", "a · sft", "train-a-sft-0", time.time(), "training", "step", 3, 9))
    write_json(tmp_path / "train-a-sft-0-train.json", place)
    teller.start()
    time.sleep(0.9)
    teller.ended.update(("train-a-sft-0", "report"))
    teller.stop()
    assert len(asked) == 1
    assert caplog.messages[0].startswith(
        "0 of 2 stages have finished, 80 s to 3 min left by the plan in all; train-a-sft-0: train"
    )
    assert (shown[0], shown[-1]) == (0.0, 100.0)
    drawn = terminal.getvalue()
    if terminal.isatty():
        assert "0/2 stages |" in drawn
        assert "training step 3/9" in drawn
        assert drawn.endswith("\r\x1b[K"), "the line is wiped at the end"
    else:
        assert drawn == ""
