"""The benchmark scripts run, on a shape of no size, and print every side; their numbers are nobody's business here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import decoding, measure, preparation, published, scoring, shapes, training_step
from benchmarks.tried import compiled_pairwise_loss
from qadapter.policy.objective import Objective, pairwise_loss

COLUMNS = ["seconds", "speed-up", "peak", "MB", "memory"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "extra", "sides"),
    [(training_step, ["--tried"], 10), (decoding, ["--new-tokens", "3"], 4), (scoring, [], 4)],
    ids=["training_step", "decoding", "scoring"],
)
def test_prints_one_table(script, extra: list[str], sides: int, capsys: pytest.CaptureFixture[str]):
    script.main(["--shapes", "tiny", "--batches", "1", "--rounds", "1", *extra])
    lines = capsys.readouterr().out.strip().splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == COLUMNS)
    rows = [line for line in lines[start + 1 :] if line.strip()]
    assert len(rows) == sides
    assert rows[0].startswith("published code")
    assert rows[0].split()[-3] == "1.00x"


@pytest.mark.slow
def test_the_machines_rates_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    products, bandwidth = measure.rates("cpu", torch.float32, size=64, copied=2**12)
    assert products > 0.1, "a product of 64 × 64 takes microseconds: what is around it is not counted"
    assert bandwidth > 0
    measure.prepare(measure.arguments(None).parse_args([]))
    (_, line, *_) = capsys.readouterr().out.splitlines()
    assert line.startswith("matrix products ")


def test_a_side_without_room_is_not_run() -> None:
    def boom() -> None:
        raise AssertionError("it was run")

    results = measure.compare({"large": boom, "small": lambda: None}, 1, "cpu", {"large": 1e15, "small": 1.0})
    assert results["large"] == measure.TooLarge(1e15)
    lines = measure.table("title", results, "large").splitlines()
    assert lines[2].split() == "large does not fit, it would need about 1000000 GB".split()
    assert lines[3].split()[2] == "1.00x"


@pytest.mark.slow
def test_the_sides_of_this_project_have_the_same_loss():
    """TRL's is another method, and the published code's mask is not shifted."""
    sides = training_step.sides(shapes.SHAPES["tiny"], 2, "cpu", torch.float32, tried=True)
    readable = sides["this project's readable objective"]().item()
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


@pytest.mark.parametrize("configuration", published.CONFIGURATIONS)
def test_published_step_has_the_presets_loss_and_gradients(configuration: str) -> None:
    objective = Objective.preset("published-code", alpha_0=0.3)
    shape = shapes.SHAPES["tiny"]
    data = shapes.batch(shape, 2, "cpu")
    ours = shapes.policy(shape, "cpu", torch.float32, objective).train()
    loss = published.published_step(ours.peft_model, data, objective, configuration)
    weights = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    got = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    assert got.keys() == weights.keys()
    ours.zero_grad()
    q, base = ours.q_and_base_logits(data["input_ids"], data["attention_mask"])
    expected = pairwise_loss(q, base.detach(), data["input_ids"], data["response_mask"], objective).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_published_step_sends_no_gradient_through_the_bases_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the base's pass returns reaches the loss without a graph, in each configuration."""
    seen: list[bool] = []
    terms = published.published_terms

    def watch(q_logits: torch.Tensor, base_logits: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(base_logits.requires_grad or not q_logits.requires_grad)
        return terms(q_logits, base_logits, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(published, "published_terms", watch)
    shape = shapes.SHAPES["tiny"]
    ours = shapes.policy(shape, "cpu", torch.float32, Objective.preset("published-code")).train()
    for configuration in published.CONFIGURATIONS:
        published.published_step(ours.peft_model, shapes.batch(shape, 1, "cpu"), ours.objective, configuration)
    assert seen == [False, False, False]


def test_the_published_way_generates_the_same_text():
    makers = decoding.sides(shapes.SHAPES["tiny"], 2, 8, "cpu", torch.float32)
    assert torch.equal(makers["published code's way"](), makers["this project"]())


@pytest.mark.slow
def test_preparation_gives_the_same_files_as_datasets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    preparation.main(["--rows", "300", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "300 pairs" in shown
    assert shown.strip().endswith("same files: yes")
    assert not list(tmp_path.iterdir())
