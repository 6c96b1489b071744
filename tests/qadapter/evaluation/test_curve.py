"""The curve: every point against a policy that was really run at that value of the dial, and which point is next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from qadapter.command.parser import main
from qadapter.config.curve import CurveSettings
from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.evaluation.curve.asked import AskedPrompts
from qadapter.evaluation.curve.both_rows import WeightedTexts, greedy_intervals, log_likelihoods
from qadapter.evaluation.curve.lm import DialledLM
from qadapter.evaluation.curve.measure import dialled, kept_items, measure_curve
from qadapter.evaluation.curve.points import Measure, Point, next_value, read_curves
from qadapter.evaluation.curve.scaled import ScaledTexts
from qadapter.evaluation.divergence import kl_per_token
from qadapter.evaluation.lm_eval.catalog import find_tasks
from qadapter.evaluation.lm_eval.harness import TaskScores, evaluate_tasks
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.evaluation.lm_eval.official_files import leaves
from qadapter.evaluation.measure import measure_adaptation, measure_retention
from qadapter.evaluation.preference import distinct_prompts, preference_metrics, score_pairs
from qadapter.files.artifacts import read_json, write_json_lines
from qadapter.inference.generate import generate_replies
from qadapter.policy.dial import Dial, DialKind
from qadapter.policy.files import saved_dial
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.objective import Objective
from qadapter.preferences.pair import Message, load_pairs
from qadapter.preferences.render import turn_end
from qadapter.progress.reports import listening
from qadapter.toyworld.rules import follows_rule
from qadapter.toyworld.world import ToyWorld
from tests.qadapter.policy.test_policy import ABSOLUTE, make_policy, tokens
from tests.support.tiny_chat import byte_tokenizer, tiny_policy
from tests.support.tiny_toy import MODEL, TinyToy, make_tiny_toy

GRID = tuple(step / 8 for step in range(9))


def greedy(policy: Any, prompts: torch.Tensor, dial: Dial) -> list[tuple[int, ...]]:
    """The six tokens that the policy writes after each of the prompts [B, T] at a dial."""
    output = policy.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        dial=dial,
    )
    return [tuple(row) for row in output[:, prompts.shape[1] :].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Objective.preset("residual"), ABSOLUTE], ids=["residual", "absolute"])
def test_an_interval_is_where_the_answer_is_generated(objective: Objective) -> None:
    """By brute force: the greedy answer at each weight, generated there."""
    policy, prompts = make_policy(objective=objective), tokens(3, 8)
    values = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.3)
    answers = {value: greedy(policy, prompts, Dial("q-weight", value)) for value in values}
    seen = 0
    for row in range(3):
        prompt = tuple(prompts[row].tolist())
        texts = [(prompt, answer) for answer in dict.fromkeys(found[row] for found in answers.values())]
        seen += len(texts)
        for (_, answer), (low, high) in zip(texts, greedy_intervals(policy, texts, pad=0, batch_size=2), strict=True):
            assert {value for value in values if low <= value <= high} == {
                value for value in values if answers[value][row] == answer
            }
    assert seen > 6  # the answers really change along the dial


def test_likelihoods_at_every_weight_come_from_one_pass() -> None:
    policy, ids = make_policy(objective=ABSOLUTE), tokens(3, 12)
    texts = [(tuple(row[:5]), tuple(row[5:])) for row in ids.tolist()]
    passes: list[int] = []
    policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    sums, greedy = log_likelihoods(policy, texts, GRID, pad=0, batch_size=8)
    assert passes == [3, 6]  # the base's rows, and those of the policy as trained
    with torch.no_grad():
        for column, value in enumerate(GRID):
            log_probs = policy(input_ids=ids, dial=Dial("q-weight", value)).logits.log_softmax(-1)[:, 4:-1]
            expected = log_probs.gather(-1, ids[:, 5:, None]).sum((1, 2))
            assert sums[:, column] == pytest.approx(expected.numpy(), abs=2e-4)
            assert greedy[:, column].tolist() == (log_probs.argmax(-1) == ids[:, 5:]).all(1).tolist()


def any_length(_: tuple[int, ...]) -> bool:
    return True


@pytest.mark.parametrize("kind", ["q-weight", "scale"])
@pytest.mark.parametrize(("first", "then"), [(4, 12), (12, 4)])
def test_an_answer_that_was_cut_sooner_is_not_taken_for_a_whole_one(kind: str, first: int, then: int) -> None:
    """Two tasks ask the same with other limits: each has the replies that it has alone."""
    policy, tokenizer = tiny_policy("q-adapter", 3), byte_tokenizer()
    prompts: list[list[Message]] = [[{"role": "user", "content": f"thing {i}?"}] for i in range(3)]

    def replies(*limits: int) -> list[str]:
        options = {"pad": 0, "batch_size": 4}
        texts = WeightedTexts(policy, GRID, **options) if kind == "q-weight" else ScaledTexts(policy, **options)
        for limit in limits:
            asked = AskedPrompts(texts, tokenizer, prompts, max_new_tokens=limit, batch_size=4)
            found = asked.replies(0.5)
        return found

    assert replies(first, then) == replies(then)
    assert replies(then) != replies(first)


def test_what_is_known_is_not_computed_again() -> None:
    policy, ids = make_policy(objective=Objective.preset("residual")), tokens(1, 12)
    text = (tuple(ids[0, :5].tolist()), tuple(ids[0, 5:].tolist()))
    texts = WeightedTexts(policy, GRID, pad=0, batch_size=4)
    first = texts.likelihoods([text], 0.5)
    passes: list[int] = []
    policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    assert texts.likelihoods([text, text], 0.25) != [first[0]] * 2
    texts.learn([(text[0], ())], 0.5)
    assert texts.answers([text[0]], 0.5, any_length) == [None]
    assert passes == []


def test_a_known_answer_at_another_scale_takes_one_pass() -> None:
    """Against decoding at that scale: an answer is given exactly where it is the greedy one."""
    policy, prompts = make_policy(objective=Objective.preset("residual")), tokens(3, 8)

    def written(scale: float) -> list[tuple[int, ...]]:
        return greedy(policy, prompts, Dial("scale", scale))

    asked = [tuple(row) for row in prompts.tolist()]
    answers = {scale: written(scale) for scale in (0.0, 0.5, 1.0, 1.5)}
    assert answers[0.0] != answers[1.5]
    texts = ScaledTexts(policy, pad=0, batch_size=4)
    for scale in (0.0, 0.5, 1.5):
        texts.learn(list(zip(asked, answers[scale], strict=True)), scale)
    for scale, expected in answers.items():
        known = [
            answer if answer in {answers[other][row] for other in (0.0, 0.5, 1.5)} else None
            for row, answer in enumerate(expected)
        ]
        assert texts.answers(asked, scale, any_length) == known
    passes: list[int] = []
    policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    assert texts.answers(asked, 0.5, any_length) == answers[0.5]
    assert passes == [3]  # those of the nearest scale, all right


def test_replies_end_where_a_turn_ends_in_ordinary_text() -> None:
    """A template that closes turns with the text " e" and no special token: what follows it is no part of a reply."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}U: {{ m['content'] }}\nA: "
        "{% else %}{{ m['content'] }} e\n{% endif %}{% endfor %}"
    )
    assert turn_end(tokenizer).token is None
    policy = make_policy(objective=Objective.preset("residual")).eval()
    prompts: list[list[Message]] = [[{"role": "user", "content": letter}] for letter in "abcdefghijklmnop"]
    expected = generate_replies(policy, tokenizer, prompts, max_new_tokens=40, batch_size=8)
    texts = WeightedTexts(policy, (0.0, 1.0), pad=0, batch_size=8)
    asked = AskedPrompts(texts, tokenizer, prompts, max_new_tokens=40, batch_size=8)
    assert asked.replies(1.0) == expected


@pytest.mark.parametrize("kind", ["q-weight", "scale"])
def test_long_texts_are_cut_as_in_the_evaluation(kind: DialKind) -> None:
    """163 tokens in a context of 64, and 160 tokens in windows, of which each token is scored once."""
    policy = make_policy(objective=Objective.preset("residual")).eval()
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "batch_size": 2, "max_length": 64}
    text = "abcdefgh" * 20

    def scores(lm: PolicyLM) -> list[float]:
        answer = lm.loglikelihood([Instance("loglikelihood", {}, (text, "xyz"), 0)])
        return [answer[0][0], *lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])]

    batches: dict[str, Any] = {"pad": 0, "batch_size": 2}
    texts = WeightedTexts(policy, (0.0, 1.0), **batches) if kind == "q-weight" else ScaledTexts(policy, **batches)
    for value in (0.0, 1.0):
        policy.dial = Dial(kind, value)
        expected = scores(PolicyLM(policy, **options))
        policy.dial = Dial(kind, 1.0)
        assert scores(DialledLM(texts, value, **options)) == pytest.approx(expected, abs=1e-3)


def test_reading_texts_tells_how_far_it_is() -> None:
    """Three texts in batches of two, at both ends of the dial: told after each batch."""
    policy = make_policy(objective=ABSOLUTE)
    told: list[tuple[Any, ...]] = []

    class Heard:
        def begin(self, work: str, unit: str, total: int, done: int) -> None:
            told.append((work, unit, total, done))

        def at(self, done: int) -> None:
            told.append((done,))

        def end(self) -> None:
            told.append(())

        def row(self, row: Any) -> None: ...

    with listening(Heard()):
        log_likelihoods(policy, [((1, 2), (3,)), ((2,), (4, 5)), ((3, 4), (6,))], [0.5], pad=0, batch_size=2)
    assert told == [("texts along the dial", "text", 3, 0), (2,), (3,), ()]


# ---- a whole curve --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("curve"))


ADAPTATION = AdaptationSettings(max_new_tokens=12, generate=4)
RETENTION = RetentionSettings(tasks=("toy_facts", "toy_howtos"), limit=12, max_new_tokens=12, batch_size=8, answers=4)


def no_judge(prompts: Any, before: Any, replies: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows = zip(prompts, before, replies, strict=True)
    return [{"prompt": p, "base": b, "reply": r, "verdict": "", "judge": ""} for p, b, r in rows], {}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["q-adapter", "sft"])
@pytest.mark.parametrize("world", [True, False], ids=["rule", "pairs"])
def test_each_point_is_the_policy_at_that_value(method: str, world: bool, toy: TinyToy, tmp_path: Path) -> None:
    """Against `evaluate_tasks`, generation and scoring with the dial there, nothing shared between the points."""
    adapter = toy.train(method, tmp_path / "trained") / "adapter"
    where = toy.world if world else None
    known: dict[str, list[Path]] = {"adaptation": [], "retention": []}
    for name, policy in (("base", None), ("policy", adapter)):
        folders = {half: tmp_path / name / half for half in known}
        for half, folder in folders.items():
            folder.mkdir(parents=True)
            known[half].append(folder)
        of_base = {half: known[half][0] if policy else None for half in known}
        measure_adaptation(
            toy.base, policy, toy.heldout, of_base["adaptation"], model=MODEL, settings=ADAPTATION, max_length=64,
            world=where, style=None, compare=no_judge, out=folders["adaptation"],
        )  # fmt: skip
        measure_retention(
            toy.base, policy, of_base["retention"], model=MODEL, settings=RETENTION, benchmarks=toy.world,
            old_texts=toy.heldout, max_length=64, out=folders["retention"],
        )  # fmt: skip
    out = tmp_path / "curve"
    out.mkdir()
    settings = CurveSettings(kinds=("q-weight", "scale"), points=4, values=(1.5,), steps=8)
    measure_curve(
        toy.base, adapter, toy.heldout, model=MODEL, adaptation=ADAPTATION, retention=RETENTION, curve=settings,
        max_length=64, world=where, style=None, benchmarks=toy.world, out=out,
        known_adaptation=(known["adaptation"][0], known["adaptation"][1]),
        known_retention=(known["retention"][0], known["retention"][1]), old_texts=toy.heldout,
    )  # fmt: skip
    weighted, scaled = read_curves(out)
    assert [weighted.kind, scaled.kind] == ["q-weight", "scale"]
    ends = [read_json(folder / "metrics.json") for folder in (*known["adaptation"], *known["retention"])]
    pairs = load_pairs(toy.heldout)
    network, tokenizer = load_base(toy.base, MODEL)
    base_scores = score_pairs(network, tokenizer, pairs, max_length=64, batch_size=8)
    policy = dialled(load_policy(network, adapter))
    old = distinct_prompts(pairs, 4)
    policy.dial = Dial("scale", 0.0)
    of_base = generate_replies(policy, tokenizer, old, max_new_tokens=12, batch_size=8)
    for found in (weighted, scaled):
        assert [found.points[0].value, found.as_trained.value, found.points[-1].value] == [0.0, 1.0, 1.5]
        assert len(found.points) <= 5
        for point, learnt, kept in ((found.points[0], ends[0], ends[2]), (found.as_trained, ends[1], ends[3])):
            score = "adaptation/score" if world else "adaptation/preference_accuracy_length_normalised"
            assert point.learnt.mean == pytest.approx(learnt[score])
            assert point.retention == pytest.approx(kept["retention/mean"])
            assert point.further() == {
                "over_refusals": pytest.approx(kept["retention/over_refusals"]),
                "answers_identical": pytest.approx(kept["retention/answers_identical"]),
                "kl_per_token": pytest.approx(kept["forgetting/kl_per_token"], abs=1e-6),
            }
        for point in found.points:
            policy.dial = Dial(found.kind, point.value)
            kl = kl_per_token(
                None, policy, tokenizer, [(p.prompt, p.chosen) for p in pairs[:12]], max_length=64, batch_size=8
            )
            assert point.kl == pytest.approx(kl.per_token, abs=1e-6)
            assert point.unchanged is not None
            answered = generate_replies(policy, tokenizer, old, max_new_tokens=12, batch_size=8)
            assert point.unchanged.values == tuple(map(float, map(str.__eq__, answered, of_base)))
            if world:
                prompts = distinct_prompts(pairs)
                replies = generate_replies(policy, tokenizer, prompts, max_new_tokens=12, batch_size=4)
                hits = follows_rule(ToyWorld.read(toy.world), None, prompts, replies)
                assert point.learnt.values == tuple(map(float, hits))
            else:
                scores = score_pairs(policy, tokenizer, pairs, max_length=64, batch_size=8)
                expected = preference_metrics(scores, base_scores)["preference_accuracy_length_normalised"]
                assert point.learnt.mean == pytest.approx(expected)
            scores = evaluate_tasks(
                policy, tokenizer, list(RETENTION.tasks), data=toy.world, limit=12, batch_size=8, max_gen_toks=12
            )
            for task in RETENTION.tasks:
                (measured,) = [one for name, one in point.kept.items() if f"/{task}/" in name]
                assert measured.values == tuple(float(item["score"]) for item in scores.samples[task])
    metrics = read_json(out / "metrics.json")
    assert metrics["curve/1/adaptation"] == pytest.approx(weighted.as_trained.learnt.mean)
    assert metrics["curve/scale/1.5/retention"] == pytest.approx(scaled.points[-1].retention)
    assert metrics["cost/curve_seconds"] >= metrics["cost/curve_scale_seconds"] > 0
    assert 0 <= metrics["cost/curve_answers_reused"] <= 1


@pytest.mark.slow
def test_the_command_refuses_to_choose_on_a_few_items(
    toy: TinyToy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It measures the whole curve, and halves of a handful of items tell nothing."""
    adapter = toy.train("sft", tmp_path / "trained") / "adapter"
    pairs = [{"prompt": f"how many is {i} ?", "chosen": "some", "rejected": "none at all"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["dial", str(adapter), "--base", str(toy.base), "--data", str(tmp_path / "pairs.jsonl"), "--points", "3"]
    command += ["--tasks", "toy_facts,toy_sums", "--benchmarks", str(toy.world), "--limit", "24"]
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "8", "--max-length", "60", "--budget", "1", "--save"]) == 2
    assert "too few to choose a dial on and report another half" in capsys.readouterr().err
    assert saved_dial(adapter).as_trained


def scored(place: int, **scores: float) -> dict[str, Any]:
    return {"doc_id": place, "prompt": f"question {place}", "target": "a", "response": "", "scores": scores}


def test_items_are_scored_by_the_metric_of_the_task() -> None:
    """LAMBADA's file lists perplexity first, whose items are log-likelihoods: half of the words are right."""
    items = [scored(0, perplexity=-0.5, acc=1.0), scored(1, perplexity=-4.0, acc=0.0)]
    found = TaskScores(
        metrics={"lambada/perplexity": 9.5, "lambada/acc": 0.5},
        samples={"lambada": items},
        higher_is_better={"lambada/perplexity": False, "lambada/acc": True},
    )
    kept = kept_items(found, ["lambada"])
    assert {name: task.values for name, task in kept.items()} == {"retention/lambada/acc": (1.0, 0.0)}
    assert Point(0.0, Measure((), ()), kept).retention == 0.5


def test_a_group_has_no_items_of_a_longer_named_one() -> None:
    """`mmlu_pro_law` is `mmlu_pro`'s, and `own_hard` no part of `own`: mmlu 1/2, mmlu_pro 1/4, own 2/2, own_hard 0/3.

    A task whose items have no score of their own is left out.
    """
    shares = {"mmlu_law": (1, 2), "mmlu_pro_law": (1, 4), "own": (2, 2), "own_hard": (0, 3)}
    samples = {task: [scored(i, acc=float(i < right)) for i in range(n)] for task, (right, n) in shares.items()}
    samples["cola"] = [{**scored(0), "scores": {"mcc": (1, 0)}}]
    found = TaskScores(
        metrics={"mmlu/acc": 0.5, "mmlu_pro/acc": 0.25, "own/acc": 1.0, "own_hard/acc": 0.0, "cola/mcc": 0.0},
        samples=samples,
        groups={"mmlu": ["mmlu_law"], "mmlu_pro": ["mmlu_pro_law"]},
    )
    kept = kept_items(found, ["mmlu", "mmlu_pro", "own", "own_hard", "cola"])
    means = {name.split("/")[1]: task.mean for name, task in kept.items()}
    assert means == {"mmlu": 0.5, "mmlu_pro": 0.25, "own": 1.0, "own_hard": 0.0}


# ---- which point is next --------------------------------------------------------------------------------------------


def point(value: float, learnt: float, kept: float) -> Point:
    return Point(value, Measure(("a",), (learnt,)), {"retention/x/acc": Measure(("b",), (kept,))})


def test_points_are_placed_where_the_curve_moves() -> None:
    """A policy that learns between .5 and .75 and forgets between .75 and 1: no point between 0 and .5."""

    def measured(value: float) -> Point:
        return point(value, float(np.interp(value, [0.5, 0.75], [0, 1])), float(np.interp(value, [0.75, 1], [1, 0.8])))

    settings, points = CurveSettings(points=6, steps=16), []
    while (value := next_value(points, settings)) is not None:
        points.append(measured(value))
    assert [p.value for p in points[:3]] == [0.0, 1.0, 0.5]
    assert len(points) == 6
    assert sorted(p.value for p in points)[1] == 0.5


def test_a_resolved_curve_takes_no_more_points() -> None:
    settings = CurveSettings(points=9, resolution=0.01)
    ends = [point(0.0, 0.5, 0.9), point(1.0, 0.5, 0.9)]
    assert next_value(ends, settings) is None
    assert next_value([ends[0], point(1.0, 0.52, 0.9)], settings) == 0.5
    assert next_value([ends[0], point(1.0, 0.505, 0.895)], settings) is None
    named = CurveSettings(points=2, values=(1.0, 1.5, 0.3))
    assert next_value(ends, named) == 1.5
    assert next_value([*ends, point(1.5, 1.0, 0.1)], named) == 0.3
    assert next_value([*ends, point(1.5, 1.0, 0.1), point(0.3, 1.0, 0.1)], named) is None
    everything = [point(value, value, 1 - value) for value in CurveSettings(points=9, steps=4).grid]
    assert next_value(everything, CurveSettings(points=9, steps=4)) is None


@pytest.mark.slow
def test_a_curve_on_plain_text_asks_no_task_with_a_template(toy: TinyToy, tmp_path: Path) -> None:
    """A base without chat template, a task that generates and a group that chooses: their answers are read again."""
    adapter = toy.train("sft", tmp_path / "trained") / "adapter"
    base = tmp_path / "base"
    shutil.copytree(toy.base, base)
    (base / "chat_template.jinja").unlink()
    index = TaskManager(include_path=list(find_tasks(["blimp"]).official), include_defaults=False)
    for task in leaves("blimp", index.task_index):
        name = index.task_index[task].cfg["dataset_name"]
        sides = {"sentence_good": "rain is wet .", "sentence_bad": "wet is rain ."}
        write_json_lines(tmp_path / "official/nyu-mll/blimp" / name / "train.jsonl", [{"UID": name, **sides}])
    tasks = ("toy_facts", "blimp")
    retention = RETENTION.model_copy(update={"tasks": tasks, "plain_tasks": tasks, "answers": 0})
    known = []
    for name, policy in (("before", None), ("after", adapter)):
        known.append(tmp_path / name)
        known[-1].mkdir()
        measure_retention(
            base, policy, known[0] if policy else None, model=MODEL, settings=retention, benchmarks=toy.world,
            old_texts=None, max_length=64, out=known[-1], official_data=tmp_path / "official",
        )  # fmt: skip
    out = tmp_path / "curve"
    out.mkdir()
    measure_curve(
        base, adapter, toy.heldout, model=MODEL, adaptation=ADAPTATION, retention=retention,
        curve=CurveSettings(points=3), max_length=64, world=None, style=None, benchmarks=toy.world, out=out,
        known_retention=(known[0], known[1]), official_data=tmp_path / "official",
    )  # fmt: skip
    (curve,) = read_curves(out)
    for end, folder in ((curve.points[0], known[0]), (curve.as_trained, known[1])):
        assert end.retention == pytest.approx(read_json(folder / "metrics.json")["retention/mean"])
    assert read_json(out / "metrics.json")["cost/curve_answers_reused"] > 0  # of the facts, asked as plain text
