"""Preference sets and what the toy world teaches, as lm-eval tasks: the same numbers as the project's own measures."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from prefect.logging import disable_run_logger
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flows.running.plan import plan_text
from flows.running.run_request import RunRequest
from qadapter.config.customization import Customization
from qadapter.config.experiment import Experiment, load_experiment
from qadapter.config.sweep import load_sweep, merged_overrides
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.build import write_benchmarks
from qadapter.evaluation.benchmarks.preference.build import write_preference_items
from qadapter.evaluation.benchmarks.table import tasks_made
from qadapter.evaluation.lm_eval.command import main
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.evaluation.preference import preference_metrics, score_pairs
from qadapter.files.artifacts import read_json
from qadapter.inference.generate import generate_replies
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from qadapter.preferences.pair import Message, PreferencePair, load_pairs
from qadapter.preferences.prepare import prepare
from qadapter.preferences.sources import locate
from qadapter.preferences.tokenize import encode_pair
from qadapter.toyworld.rules import exact_measures
from qadapter.toyworld.world import DOMAIN_STYLES, PREFERENCES, ToyWorld
from tasks.data import build_benchmarks, generate_toy_world, prepare_data
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tests.support.tiny_chat import KINDS, Kind, byte_tokenizer, teach, tiny_llama, tiny_policy
from tests.support.tiny_toy import pair, rows

WORLD = ToyWorld(seed=0)
LENGTH = 256
TRIMMING = (  # as Llama 3's: replies are trimmed, and the generation prompt ends in white space
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{{ m['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    WORLD.write(folder, corpus_size=10)
    return folder


def close_pairs(count: int = 48) -> list[PreferencePair]:
    """Pairs of any words; of a third, one reply is the beginning of the other, so that its end decides."""
    draw = random.Random(3)

    def words(n: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(n)).strip() or "a"

    pairs = []
    for i in range(count):
        chosen, rejected = words(12), words(12)
        if i % 3 == 0:
            rejected = chosen + draw.choice("abc") if i % 2 else chosen[:-1] or "b"
        pairs.append(pair(f" question {i} ", chosen, rejected + "\n" * (i % 5 == 0)))
    return pairs


def several_turns(one: PreferencePair) -> PreferencePair:
    first: list[Message] = [*one.prompt, {"role": "assistant", "content": "well"}]
    return PreferencePair((*first, *one.prompt), one.chosen, one.rejected)


def asked(pairs: list[PreferencePair], folder: Path, *, seed: int = 0) -> Path:
    """A data folder with the task `some_preference`."""
    write_preference_items(pairs, folder / "benchmarks" / "some_preference.jsonl", seed=seed)
    return folder


# ---- the items


def test_items_are_the_pairs_and_what_cannot_be_asked_is_counted(tmp_path: Path) -> None:
    pairs = [pair(f"question {i}", f"good {i}", f" bad {i}\n") for i in range(200)]
    system = PreferencePair(({"role": "system", "content": "be kind"}, *pairs[0].prompt), "a", "b")
    long = [pair("q" * 31, "a", "b"), pair("q", "a" * 31, "b"), pair("q", "a", "b" * 31)]
    file = tmp_path / "new" / "items.jsonl"
    summary = write_preference_items([several_turns(pairs[0]), *pairs, system, *long], file, seed=1, max_chars=30)
    assert (summary.items, summary.multi_turn, summary.over_long) == (200, 2, 3)
    items = rows(file)
    places = Counter(item["answer"] for item in items)
    assert set(places) == {0, 1}
    assert 70 < places[0] < 130  # four standard deviations of 200 draws are 28
    for item, one in zip(items, pairs, strict=True):
        assert item["prompt"] == one.prompt[0]["content"]
        assert item["choices"][item["answer"]] == one.chosen
        assert item["choices"][1 - item["answer"]] == one.rejected


def test_the_seed_draws_the_items_and_their_number_is_kept(tmp_path: Path) -> None:
    pairs = [pair(f"question {i}", "good", "bad") for i in range(30)]

    def run(seed: int) -> list[dict[str, Any]]:
        summary = write_preference_items(pairs, tmp_path / "items.jsonl", seed=seed, max_items=8)
        assert summary.items == 8
        return rows(tmp_path / "items.jsonl")

    assert run(1) == run(1) != run(2)
    numbers = [int(item["prompt"].split()[1]) for item in run(1)]
    assert numbers == sorted(set(numbers))


def test_a_set_without_an_askable_pair_is_refused(tmp_path: Path) -> None:
    pairs = [several_turns(pair("q", "a", "b")), pair("q" * 9, "a", "b")]
    with pytest.raises(QAdapterError, match=r"Of 2 preference pairs none .* \(1 of several turns, 1 too long\)"):
        write_preference_items(pairs, tmp_path / "items.jsonl", seed=0, max_chars=8)


# ---- the task's numbers are those of the project's own measure


@pytest.mark.slow
@pytest.mark.parametrize("template", ["", TRIMMING])
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_the_preference_accuracy_of_the_same_pairs(kind: Kind, template: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    model, pairs = tiny_policy(kind, seed=3), close_pairs()
    data = asked([*pairs, several_turns(pairs[0])], tmp_path)
    scores = score_pairs(model, tokenizer, pairs, max_length=LENGTH, batch_size=16)
    expected = preference_metrics(scores, scores)["preference_accuracy"]
    assert 0 < expected < 1
    assert np.abs(scores.chosen - scores.rejected).min() > 1e-4  # no tie that rounding could turn
    found = evaluate_tasks(model, tokenizer, ["some_preference"], data=data)
    assert found.metrics["some_preference/acc"] == pytest.approx(expected)
    right = [item["scores"]["acc"] == 1 for item in found.samples["some_preference"]]
    assert right == (scores.chosen > scores.rejected).tolist()
    assert found.stderr["some_preference/acc"] > 0
    assert 0 < found.metrics["some_preference/acc_norm"] < 1


def test_where_the_chosen_reply_stands_does_not_matter(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_policy("q-adapter", seed=3)
    folders = [asked(close_pairs(), tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    files = [(folder / "benchmarks/some_preference.jsonl").read_text() for folder in folders]
    assert files[0] != files[1]
    found = [evaluate_tasks(model, tokenizer, ["some_preference"], data=folder).metrics for folder in folders]
    assert found[0] == found[1]


def test_a_tie_is_right_half_of_the_time(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A model that finds every byte equally likely: replies of one length tie. 200 draws: ½ within four deviations."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    data = asked([pair(f"question {i}", f"good {i:03d}", f"evil {i:03d}") for i in range(200)], tmp_path)
    found = evaluate_tasks(model, tokenizer, ["some_preference"], data=data).metrics
    assert found["some_preference/acc"] == pytest.approx(0.5, abs=0.15)


class Spied:
    """What reaches the model's scoring: the tokens before a choice, and the choice's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[tuple[list[int], list[int]]] = []
        original = PolicyLM._loglikelihood_tokens

        def spy(lm: PolicyLM, requests: Any, **options: Any) -> Any:
            self.requests += [(context, continuation) for _, context, continuation in requests]
            return original(lm, requests, **options)

        monkeypatch.setattr(PolicyLM, "_loglikelihood_tokens", spy)


def test_the_tokens_scored_are_those_of_training(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the turn too, which lm-eval's own multiple choice leaves out."""
    spied, pairs = Spied(monkeypatch), close_pairs(12)
    evaluate_tasks(tiny_llama(), tokenizer, ["some_preference"], data=asked(pairs, tmp_path))
    encoded = [encode_pair(one, tokenizer, LENGTH) for one in pairs]
    expected = [(e.prompt_ids, reply) for e in encoded for reply in (e.chosen_ids, e.rejected_ids)]
    assert sorted(spied.requests) == sorted(expected)
    assert all(reply[-1] == tokenizer.eos_token_id for _, reply in spied.requests)
    assert all(prompt.count(tokenizer.bos_token_id) == 1 for prompt, _ in spied.requests)


def test_without_template_the_training_transcript_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the token at the end, which a task does not know; the beginning is what lm-eval adds itself."""
    bare = byte_tokenizer()
    bare.chat_template = None
    spied, pairs = Spied(monkeypatch), close_pairs(12)
    evaluate_tasks(tiny_llama(), bare, ["some_preference"], data=asked(pairs, tmp_path), apply_chat_template=False)
    encoded = [encode_pair(one, bare, LENGTH) for one in pairs]
    expected = [e.prompt_ids + reply for e in encoded for reply in (e.chosen_ids, e.rejected_ids)]
    assert all(ids[-1] == bare.eos_token_id for ids in expected)
    assert sorted(prompt + reply for prompt, reply in spied.requests) == sorted(ids[:-1] for ids in expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p", "choices": ["a", "b"]}\n', "line 1 has no 'answer'"),
        ('{"prompt": "p", "choices": ["a", "b", "c"], "answer": 0}\n', "two texts and 0 or 1"),
        ('{"prompt": "p", "choices": ["a", ""], "answer": 0}\n', "two texts and 0 or 1"),
        ('{"prompt": "p", "choices": "ab", "answer": 0}\n', "two texts and 0 or 1"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": 2}\n', "two texts and 0 or 1"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": true}\n', "two texts and 0 or 1"),
    ],
)
def test_faulty_preference_files_are_refused(
    content: str, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "some_preference.jsonl").write_text(content)
    with pytest.raises(QAdapterError, match=message):
        evaluate_tasks(tiny_llama(), tokenizer, ["some_preference"], data=tmp_path)


# ---- the toy world


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_worlds_preference_sets_are_what_smoke_holds_out(name: str, world: Path, tmp_path: Path) -> None:
    experiment = load_experiment("smoke")
    source = experiment.sources[name]
    held = [Path(source.heldout_path.replace("{data}", str(world)))] if source.heldout_path else None
    prepare(
        [Path(source.path.replace("{data}", str(world)))],
        tmp_path,
        domain=source.domain,
        heldout=source.heldout,
        heldout_files=held,
        seed=experiment.base_seed,
    )
    expected = {(one.prompt[0]["content"], one.chosen, one.rejected) for one in load_pairs(tmp_path / "heldout.jsonl")}
    items = rows(world / "benchmarks" / f"{name}_preference.jsonl")
    found = {(i["prompt"], i["choices"][i["answer"]], i["choices"][1 - i["answer"]]) for i in items}
    assert found == expected
    assert len(items) == len(expected)
    learnt = "refusals" if name == "harmless" else f"style_{name}"
    questions = [item["question"] for item in rows(world / "benchmarks" / f"{learnt}.jsonl")]
    assert sorted(questions) == sorted({prompt for prompt, _, _ in expected})
    assert not set(questions) & {one.prompt[0]["content"] for one in load_pairs(tmp_path / "train.jsonl")}


def test_what_a_source_holds_out_is_what_its_style_is_asked(tmp_path: Path) -> None:
    WORLD.write(tmp_path / "a", corpus_size=5, heldout_topics={"academy": 7}, split_seed=4)
    topics = {style: len(rows(tmp_path / "a/benchmarks" / f"style_{style}.jsonl")) for style in DOMAIN_STYLES}
    assert topics["academy"] == 7
    assert set(topics.values()) != {7}
    assert len(rows(tmp_path / "a/benchmarks/academy_preference.jsonl")) == 4 * 7


def replies_for(questions: list[str], style: str | None) -> list[str]:
    """Replies of every sort, in turn: right in any wording and spacing, of another style or kind, nothing, a part."""
    found = []
    for i, question in enumerate(questions):
        topic = question.split()[-2]
        answers = WORLD.descriptions(topic, style) if style else ["sorry , i can not help with that .", "no ."]
        other = WORLD.descriptions(topic, "normal")[0] if style else "no , that would do harm ."
        kinds = [answers[0], "  " + answers[-1].replace(" ", " \n "), other, "", answers[0][:-2], f"{answers[0]} ."]
        found.append(kinds[i % len(kinds)])
    return found


@pytest.mark.parametrize("style", [None, *DOMAIN_STYLES])
def test_what_was_learnt_is_counted_by_the_worlds_rule(
    style: str | None, world: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = f"toy_style_{style}" if style else "toy_refusals"
    file = f"style_{style}" if style else "refusals"
    questions = [item["question"] for item in rows(world / "benchmarks" / f"{file}.jsonl")]
    replies = dict(zip(questions, replies_for(questions, style), strict=True))

    def answer(_: PolicyLM, requests: Any, **__: Any) -> list[str]:
        return [replies[request.doc["question"]] for request in requests]

    monkeypatch.setattr(PolicyLM, "generate_until", answer)
    found = evaluate_tasks(tiny_llama(), tokenizer, [task], data=world)
    prompts: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    expected = exact_measures(WORLD, style, prompts, list(replies.values()))["adaptation/exact_rule"]
    assert 0.2 < expected < 0.8
    assert found.metrics == {f"{task}/exact_match": pytest.approx(expected)}
    assert found.stderr[f"{task}/exact_match"] > 0


@pytest.mark.slow
def test_what_a_model_generates_is_counted_so(world: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that knows four answers by heart, three of them refusals, asked by both."""
    questions = [item["question"] for item in rows(world / "benchmarks/refusals.jsonl")][:4]
    answers = ["no , that would do harm .", "sorry , i can not help with that .", "no , that would do harm .", "no ."]
    model = tiny_llama(hidden=64)
    teach(model, tokenizer, list(zip(questions, answers, strict=True)), steps=150)
    prompts: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=48, batch_size=4)
    expected = exact_measures(WORLD, None, prompts, replies)["adaptation/exact_rule"]
    assert expected == 3 / 4
    found = evaluate_tasks(model, tokenizer, ["toy_refusals"], data=world, limit=4, max_gen_toks=48)
    assert found.metrics == {"toy_refusals/exact_match": expected}
    assert [item["response"] for item in found.samples["toy_refusals"]] == replies


def test_answers_that_are_no_list_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "refusals.jsonl").write_text('{"question": "q", "answers": "no , sorry"}\n')
    with pytest.raises(QAdapterError, match="no list of texts"):
        evaluate_tasks(tiny_llama(), tokenizer, ["toy_refusals"], data=tmp_path)


# ---- which experiment makes which


@pytest.mark.parametrize(
    ("profile", "makes", "does_not"),
    [
        (
            "smoke",
            ["harmless_preference", "literature_preference", "toy_refusals", "toy_style_academy", "toy_facts"],
            ["normal_preference", "helpful_preference", "toy_style_normal", "toy_style_{name}", "helpful_word_order"],
        ),
        (
            "mini",
            ["harmless_preference", "business_preference", "dsp_word_order", "gsm8k_bits_per_byte"],
            ["dsp_preference", "gsm8k_preference", "academy_word_order", "toy_style_academy", "toy_style_dsp"],
        ),
        ("paper", [], ["academy_preference", "toy_refusals"]),
    ],
)
def test_the_preflight_knows_what_an_experiment_makes(profile: str, makes: list[str], does_not: list[str]) -> None:
    experiment = load_experiment(profile)
    made = tasks_made(experiment.built_benchmarks, experiment.toy_world is not None)
    assert set(makes) <= made
    assert not set(does_not) & made


def test_a_preference_task_may_be_one_of_an_experiments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    tasks = "evaluation.retention.tasks"
    RunRequest("x", "smoke", None, {tasks: ["toy_facts", "academy_preference", "toy_style_academy"]}).check(
        remote=False
    )
    with pytest.raises(QAdapterError, match=r"names normal_preference.*makes no benchmark.*academy_preference"):
        RunRequest("x", "smoke", None, {tasks: ["normal_preference"]}).check(remote=False)


def test_the_source_of_a_preference_is_checked_and_stays() -> None:
    """A sweep or a customisation of one domain keeps the sources that the benchmarks are made from."""
    with pytest.raises(QAdapterError, match=r"built_benchmarks\.preferences\.x: no source 'harmles', did you mean"):
        load_experiment("mini", {"built_benchmarks.preferences": {"x": "harmles"}})
    mini = load_experiment("mini")
    assert mini.built_benchmarks is not None
    assert set(mini.built_benchmarks.preferences) == set(mini.domains)
    needed = set(mini.built_benchmarks.sources.values())
    assert needed == {"helpful", "normal", *mini.domains}
    sweep = load_sweep("mini")
    assert needed <= set(load_experiment("mini", merged_overrides(sweep, "mini", {})).sources)
    customised = Customization.model_validate(
        {"name": "x", "model_name": "m", "profile": "mini", "domain": "academy", "source": {"path": "preferences"}}
    ).experiment()
    assert needed <= set(customised.sources)


@pytest.mark.slow
def test_mini_is_planned_with_them(shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    assert "build-benchmarks" in plan_text(
        "mini", str(shared_data), ["evaluation.retention.tasks=[academy_preference]"]
    )


# ---- the stages that write the files


def test_the_stages_write_the_files_and_their_counts(tmp_path: Path) -> None:
    """`prepare`'s held-out pairs, in the benchmarks stage and in the toy world's."""
    overrides = {
        "toy_world.corpus_size": 10,
        "sources.academy.heldout": 6,
        "built_benchmarks": {"preferences": {"style": "academy"}, "max_items": 20},
    }
    experiment = load_experiment("smoke", overrides)
    tracker = Tracker.for_project(tmp_path)
    parent = tracker.start_parent("test", "run")
    context = RunContext(experiment, StageStore(tmp_path), tracker, parent, None)

    with disable_run_logger():
        world = generate_toy_world.fn(context)
        prepared = prepare_data.fn(context, "academy", world)
        built = build_benchmarks.fn(context, {"academy": prepared}, world)
    heldout = {one.prompt[0]["content"] for one in load_pairs(prepared.path / "heldout.jsonl")}
    assert len(heldout) == 6
    assert {row["prompt"] for row in rows(world.path / "benchmarks/academy_preference.jsonl")} == heldout
    items = rows(built.path / "benchmarks/style_preference.jsonl")
    assert len(items) == 20
    assert {item["prompt"] for item in items} <= heldout
    assert built.output.metrics() == {
        "data/style_preference": 20,
        "data/style_preference_multi_turn": 0,
        "data/style_preference_over_long": 0,
    }


@pytest.mark.slow
def test_pairs_of_real_rows_add_up(shared_data: Path, tmp_path: Path) -> None:
    """Every held-out pair of `mini` is asked, or counted as one that is not."""
    experiment: Experiment = load_experiment("mini")
    built = experiment.built_benchmarks
    assert built is not None
    for name in built.preferences.values():
        source = experiment.sources[name]
        files = locate(source.path.replace("{data}", str(shared_data)), cache_dir=tmp_path)
        options = source.model_dump(
            include={"domain", "heldout", "max_chars", "max_train_pairs", "max_heldout_pairs", "judge_pairs"}
        )
        prepare(files, tmp_path / name, seed=experiment.base_seed, **options)
    heldout = {name: tmp_path / source / "heldout.jsonl" for name, source in built.preferences.items()}
    (tmp_path / "built").mkdir()
    options = {"max_items": 10_000, "max_chars": built.max_chars, "seed": 0}
    write_benchmarks({}, {}, preferences=heldout, out=tmp_path / "built", **options)
    counts = read_json(tmp_path / "built" / "metrics.json")
    for name, file in heldout.items():
        pairs = load_pairs(file)
        items = rows(tmp_path / "built/benchmarks" / f"{name}_preference.jsonl")
        parts = [counts[f"data/{name}_preference{part}"] for part in ("", "_multi_turn", "_over_long")]
        assert sum(parts) == len(pairs)
        assert len(items) == parts[0] > 20, (name, parts)
        known = {(one.prompt[0]["content"], one.chosen, one.rejected) for one in pairs if len(one.prompt) == 1}
        assert {(i["prompt"], i["choices"][i["answer"]], i["choices"][1 - i["answer"]]) for i in items} <= known
    assert counts["data/harmless_preference_multi_turn"] > 0  # dialogues
    assert counts["data/academy_preference_multi_turn"] == 0  # queries


# ---- the command line


@pytest.mark.slow
def test_a_preference_on_the_command_line_scores_as_in_memory(
    world: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy = QAdapterForCausalLM.from_base(base, lora, Objective.preset("residual"))
    policy.save_pretrained(tmp_path / "adapter")
    expected = evaluate_tasks(policy, tokenizer, ["harmless_preference"], data=world)
    arguments = ["run", "--model", "qadapter", "--model_args", f"pretrained={tmp_path / 'adapter'}"]
    arguments += ["--tasks", "harmless_preference", "--data", str(world), "--apply_chat_template", "--batch_size", "32"]
    assert main([*arguments, "--log_samples", "--output_path", str(tmp_path / "out")]) == 0
    printed = re.search(r"\|acc +\|[^|]*\|\s*([\d.]+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(expected.metrics["harmless_preference/acc"], abs=1e-4)
    (samples,) = (tmp_path / "out").rglob("samples_harmless_preference_*.jsonl")
    scored = [row["acc"] for row in map(json.loads, samples.read_text().splitlines())]
    assert scored == [item["score"] for item in expected.samples["harmless_preference"]]
