"""The benchmark scripts run, on a shape of no size, and print every side; their numbers are nobody's business here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decoding, measure, published, scoring, shapes, training_step
from benchmarks.tried import compiled_pairwise_loss
from qadapter.policy.objective import Objective, pairwise_loss

COLUMNS = ["seconds", "speed-up", "peak", "MB", "memory"]


@pytest.mark.parametrize(
    ("script", "extra", "sides"),
    [(training_step, ["--tried"], 8), (decoding, ["--new-tokens", "3"], 4), (scoring, [], 4)],
    ids=["training_step", "decoding", "scoring"],
)
def test_prints_one_table(script, extra: list[str], sides: int, capsys: pytest.CaptureFixture[str]):
    script.main(["--shapes", "tiny", "--batches", "1", "--rounds", "1", *extra])
    lines = capsys.readouterr().out.strip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == COLUMNS)
    rows = [line for line in lines[start + 1 :] if line.strip()]
    assert len(rows) == sides
    assert rows[0].startswith("published code's way")
    assert rows[0].split()[-3] == "1.00x"


def test_a_side_without_room_is_not_run() -> None:
    def boom() -> None:
        raise AssertionError("it was run")

    results = measure.compare({"large": boom, "small": lambda: None}, 1, "cpu", {"large": 1e15, "small": 1.0})
    assert results["large"] == measure.TooLarge(1e15)
    lines = measure.table("title", results, "large").splitlines()
    assert lines[2].split() == "large does not fit, it would need about 1000000 GB".split()
    assert lines[3].split()[2] == "1.00x"


def test_the_sides_of_this_project_have_the_same_loss():
    """TRL's is another method, and the published code's mask is not shifted."""
    sides = training_step.sides(shapes.SHAPES["tiny"], 2, "cpu", torch.float32, tried=True)
    readable = sides["base without autograd"]().item()
    fused = ("+ vocabulary in blocks (fused)", "+ shared prompt = this project", "tried: fused, base in same pass")
    for name in fused:
        assert sides[name]().item() == pytest.approx(readable, rel=1e-5), name
    # That side has a padded length of its own, which only `paper` does not look at
    objective = Objective.preset("paper")
    data = shapes.batch(shapes.SHAPES["tiny"], 2, "cpu")
    ours = shapes.policy(shapes.SHAPES["tiny"], "cpu", torch.float32, objective)
    expected = ours(**data).loss.item()
    for loss in (pairwise_loss, compiled_pairwise_loss()):
        got = training_step.response_positions_loss(ours, data, objective, loss).item()
        assert got == pytest.approx(expected, rel=1e-5)


def test_the_published_way_is_the_preset_of_that_name():
    objective = Objective.preset("published-code", alpha_0=0.3)
    shape = shapes.SHAPES["tiny"]
    data = shapes.batch(shape, 2, "cpu")
    ours = shapes.policy(shape, "cpu", torch.float32, objective)
    loss = published.published_step(ours.peft_model, data, objective)
    q, base = ours.q_and_base_logits(data["input_ids"], data["attention_mask"])
    expected = pairwise_loss(q, base, data["input_ids"], data["response_mask"], objective).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_published_way_generates_the_same_text():
    makers = decoding.sides(shapes.SHAPES["tiny"], 2, 8, "cpu", torch.float32)
    assert torch.equal(makers["published code's way"](), makers["this project"]())
