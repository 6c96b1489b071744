"""A plan names what the flow would run and estimates what it would cost, without running or reaching for anything."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from flows.commands.spread import of_each_run
from flows.full_paper_repro import experiment_stages
from flows.running import plan, stage_costs
from flows.running.plan import Recorder, plan_text
from flows.running.stage_costs import PlannedStage
from qadapter.config.evaluation import BuiltBenchmarks, RetentionSettings
from qadapter.config.experiment import Experiment, load_experiment, profiles
from qadapter.config.model import FromScratch, LoraSettings, ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.judging import endpoint
from qadapter.judging.plan import case_of, judged_rows
from qadapter.planning import estimate as planning
from qadapter.planning import machine
from qadapter.preferences import sources
from qadapter.preferences.pair import PreferencePair
from qadapter.training.adapt import lora_config


def real_model(size: FromScratch) -> LlamaForCausalLM:
    """A model of this size with the whole vocabulary."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.context,
            tie_word_embeddings=True,
        )
    )


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- sizes


@pytest.mark.parametrize("profile", [name for name in profiles() if load_experiment(name).model.from_scratch])
def test_parameters_of_a_model_from_scratch(profile: str) -> None:
    experiment = load_experiment(profile)
    assert experiment.model.from_scratch is not None
    found = planning.model_size(experiment.model)
    model = real_model(experiment.model.from_scratch)
    assert found.parameters == pytest.approx(parameters(model), rel=0.02)
    adapted = get_peft_model(model, lora_config(experiment.lora))  # type: ignore[arg-type]
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert planning.adapter_parameters(found, experiment.lora) == pytest.approx(trainable, rel=0.15)


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 4), (False, 2)])
def test_parameters_of_a_model_in_a_folder(tmp_path: Path, tied: bool, kv_heads: int) -> None:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path)
    found = planning.model_size(ModelSettings(pretrained=str(tmp_path)))
    assert found.parameters == parameters(LlamaForCausalLM(config))
    assert found.unquantized == 500 * 64 * (1 if tied else 2)
    assert (found.hidden_size, found.layers, found.vocab_size) == (64, 3, 500)
    assert "from the config" in found.assumption


def test_a_size_out_of_a_name() -> None:
    """Llama-3.1-8B has 8.0 billion parameters, hidden size 4096 and 32 layers; the guess is near."""
    found = planning.model_size(ModelSettings(pretrained="nobody/Llama-3.1-8B-Instruct"))
    assert found.parameters == 8e9
    assert found.hidden_size == pytest.approx(4096, rel=0.1)
    assert found.layers == pytest.approx(32, abs=4)
    assert "guessed from the name" in found.assumption
    assert planning.model_size(ModelSettings(pretrained="nobody/tiny-125m")).parameters == 125e6


def test_a_name_without_a_size_is_refused() -> None:
    with pytest.raises(QAdapterError, match="says no size"):
        planning.model_size(ModelSettings(pretrained="nobody/some-model"))


# ---- arithmetic


def settings(**changes: Any) -> OptimizerSettings:
    return OptimizerSettings(**{"learning_rate": 1e-3, "batch_size": 16, "max_length": 64, **changes})


def test_steps() -> None:
    """100 pairs, 16 a step, one and a half epochs: ⌈9.375⌉ = 10; a number of steps that is given wins."""
    assert planning.steps(100, settings(epochs=1.5)) == 10
    assert planning.steps(100, settings(epochs=1.5, max_steps=7)) == 7
    assert planning.steps(96, settings(epochs=1)) == 6


def test_operations_and_memory_by_hand() -> None:
    size = planning.ModelSize(1e6, 100, 2, 1000, "test")
    assert planning.training_flops(size, tokens=50, passes=3) == 2 * 1e6 * 50 * 3
    whole = planning.weights_gb(size, ModelSettings(pretrained="x/1M"))
    half = planning.weights_gb(size, ModelSettings(pretrained="x/1M", dtype="bfloat16"))
    eight = planning.weights_gb(size, ModelSettings(pretrained="x/1M", dtype="bfloat16", quantization="int8"))
    assert (whole * 2**30, half * 2**30, eight * 2**30) == pytest.approx((4e6, 2e6, 1e6))


def test_a_4_bit_model_keeps_embeddings_and_head(tmp_path: Path) -> None:
    """Llama-3.1-8B: 128,256 · 4,096 numbers in the embeddings and as many in the head, in bfloat16; the rest in nf4."""
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    model = ModelSettings(pretrained=str(tmp_path), dtype="bfloat16", quantization="nf4")
    size = planning.model_size(model)
    outside = 2 * 128_256 * 4096
    expected = (size.parameters - outside) * 0.55 + outside * 2
    assert planning.weights_gb(size, model) * 2**30 == pytest.approx(expected)
    assert 5.4 < planning.weights_gb(size, model) < 5.7  # 4.1 GiB if all of it were in 4 bits
    guessed = ModelSettings(pretrained="nobody/Llama-3.1-8B", dtype="bfloat16", quantization="nf4")
    assert planning.weights_gb(planning.model_size(guessed), guessed) == pytest.approx(expected / 2**30, rel=0.1)


def test_memory_grows_with_what_costs_memory() -> None:
    size = planning.ModelSize(8e9, 4096, 32, 128_256, "test")
    model, lora = ModelSettings(pretrained="x/8B", dtype="bfloat16", quantization="int8"), LoraSettings()

    def memory(**changes: Any) -> float:
        return planning.training_memory_gb(size, model, lora, settings(max_length=512, bf16=True, **changes))

    small = memory(micro_batch_size=1, gradient_checkpointing=True)
    assert 8 < small < 16  # 7.5 GiB of weights in 8 bits and some activations
    assert small < memory(micro_batch_size=4, gradient_checkpointing=True)
    assert memory(micro_batch_size=4, gradient_checkpointing=True) < memory(micro_batch_size=4)


def test_what_a_benchmark_reads_by_hand() -> None:
    """BLiMP: 67 paradigms of six items, two sentences of 12 tokens each, all scored but the first token; HellaSwag: 100
    items of four endings. A built benchmark: ten items of four choices, 400 characters as 100 tokens at the longest."""
    built = BuiltBenchmarks(replies={"helpful": "helpful"}, max_items=10, max_chars=400)
    limits = {"blimp": 6, "hellaswag": 100}
    tasks = ("hellaswag", "blimp", "helpful_reply_matching", "mmlu")
    settings = RetentionSettings(tasks=tasks, own={"quiz": "q.jsonl"}, limit=50, limits=limits)
    tokens, scored = planning.retention_tokens(settings, built, 256, {"quiz": 7})
    mmlu = 57 * 50 * 256
    assert tokens == 100 * 240 + 67 * 6 * 24 + 10 * 8 * 50 + mmlu + 7 * 256
    assert scored == 100 * 80 + 67 * 6 * 22 + 10 * 4 * 50 + mmlu + 7 * 256


def test_what_is_asked_in_other_words_is_read_twice() -> None:
    """Five items a task more where there is a question: not of BLiMP, whose sentences have none."""
    built = BuiltBenchmarks(replies={"helpful": "helpful"}, max_items=10, max_chars=400)
    tasks = ("hellaswag", "blimp", "helpful_reply_matching", "helpful_bits_per_byte", "mmlu")
    plain = RetentionSettings(tasks=tasks, own={"quiz": "q.jsonl"}, limit=20)
    both = plain.model_copy(update={"reworded": 5})
    more = [
        after - before
        for before, after in zip(
            *(planning.retention_tokens(settings, built, 256, {"quiz": 3}) for settings in (plain, both)), strict=True
        )
    ]
    unknown = (57 * 5 + 3) * 256  # of the three items of one's own all
    assert more == [5 * 240 + 5 * 8 * 50 + unknown, 5 * 80 + 5 * 4 * 50 + unknown]


def test_tokens_of_a_pair_by_hand() -> None:
    """60 characters of prompt, 24 and 32 of replies: 15 + 7 tokens; a template adds 3.6 to two turns and a reply."""
    turns = ({"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 20})
    pair = PreferencePair(turns, "a" * 24, "b" * 32)  # type: ignore[arg-type]
    assert stage_costs._lengths_of_pair(pair, 100) == pytest.approx((15 + 7 + 3 * 3.6, 8))
    assert stage_costs._lengths_of_pair(pair, 20) == (20, 8)


def test_an_evaluation_by_hand() -> None:
    """10 held-out pairs of 50 tokens, 20 of them the reply; 4 answers of 16 tokens to prompts of 30.

    Pairs 2 · 10 · 50, answers 4 · (2 · 16 + 30), and twelve times answer and prompt: the base's by both models, the
    policy's by the base. A reward model reads both answers too, and scores no token.
    """
    experiment = load_experiment("mini", {"evaluation.adaptation": {"generate": 4, "max_new_tokens": 16}})
    plans = dict.fromkeys(experiment.sources, plan.SourcePlan(100, 50, 20, "", 10))
    tokens, scored = stage_costs._adaptation_reads(experiment, "academy", plans)
    assert tokens == 2 * 10 * 50 + 4 * (32 + 30) + 12 * 46 + 8 * 46
    assert scored == 2 * 10 * 20 + 4 * 32 + 12 * 16
    unjudged = load_experiment(
        "mini", {"evaluation.adaptation": {"generate": 4, "max_new_tokens": 16, "judge": "none"}}
    )
    assert stage_costs._adaptation_reads(unjudged, "academy", plans) == (tokens - 8 * 46, scored)
    of_base = stage_costs._adaptation_reads(experiment, "academy", plans, of_base=True)
    assert of_base == (tokens - 8 * 46 - 8 * 46, scored - 8 * 16), "it reads its own answers once"


def test_a_large_head_works_on_scored_tokens_only() -> None:
    """A million parameters, 0.8 of them embeddings that are the head too: 0.2 on 50 tokens, 0.8 on 20 of them."""
    size = planning.ModelSize(1e6, 100, 2, 8000, "test", unquantized=8e5)
    assert planning.training_flops(size, 50, 3, scored=20) == 2 * 3 * (2e5 * 50 + 8e5 * 20)


@pytest.mark.slow
def test_this_machines_rate_is_measured() -> None:
    """Between a slow core and a rack of them; nothing else of a machine that is not known can be asserted."""
    rate = machine.measured_flops(256, stages=2, threads=1)
    assert 1e8 < rate < 1e13


# ---- stages


def recorded(experiment: Experiment) -> list[PlannedStage]:
    recorder = Recorder()
    experiment_stages(experiment, recorder)
    return recorder.stages


def expected_names(x: Experiment) -> list[str]:
    """Every stage a flow run would have, counted out of the config by itself."""
    names = ["toy-world"] if x.toy_world else []
    names += [f"prepare-{source}" for source in x.sources]
    names += [f"quality-{source}" for source in x.sources]
    names += ["build-benchmarks"] if x.built_benchmarks else []
    names += ["pretrain"]
    names += ["helpful-sft"] if x.helpful_sft else []
    names += [f"retention-{base}" for base in {domain.base for domain in x.domains.values()}]
    for domain in x.domains:
        names += [f"evaluate-{domain}-base-None"]
        names += [f"judge-{domain}"] if x.judge_of(domain) == "reward-model" else []
        needs = {"replay": {"answers"}, "vas": {"rollouts", "reward"}, "pita": {"branches", "reward"}}
        needs |= {method: {"reward"} for method in ("rloo", "grpo", "shiq")}
        names += [f"{need}-{domain}" for need in set().union(*(needs.get(method, ()) for method in x.methods.run))]
        for method, seed in product(x.methods.run, x.seeds):
            names += [f"train-{domain}-{method}-{seed}", f"evaluate-{domain}-{method}-{seed}"]
            names += [f"curve-{domain}-{method}-{seed}"] if x.evaluation.curve else []
    return [*names, "report"]


@pytest.mark.parametrize("profile", profiles())
@pytest.mark.parametrize("overrides", [{}, {"seeds": [0, 1, 2], "methods.run": ["q-adapter", "dpo"]}])
def test_every_stage_is_named(profile: str, overrides: dict[str, Any]) -> None:
    experiment = load_experiment(profile, overrides)
    stages = recorded(experiment)
    names = [stage.name for stage in stages]
    assert sorted(names) == sorted(expected_names(experiment))
    assert len(set(names)) == len(names)
    for place, stage in enumerate(stages):
        assert {other.name for other in stage.feeds_on} <= set(names[:place]), stage.name


def test_what_feeds_what() -> None:
    by_name = {stage.name: {other.name for other in stage.feeds_on} for stage in recorded(load_experiment("smoke"))}
    assert by_name["toy-world"] == set()
    assert by_name["prepare-harmless"] == {"toy-world"}
    assert by_name["quality-harmless"] == {"toy-world", "prepare-harmless"}
    assert all(not name.startswith("quality") for name, feeds in by_name.items() if name != "report" for name in feeds)
    assert by_name["helpful-sft"] == {"pretrain", "prepare-helpful"}
    assert by_name["retention-helpful"] == {"helpful-sft", "prepare-helpful", "toy-world"}
    assert by_name["answers-academy"] == {"helpful-sft", "prepare-academy"}
    assert by_name["train-academy-dpo-0"] == {"helpful-sft", "prepare-academy"}
    assert by_name["train-academy-replay-0"] == {"helpful-sft", "prepare-academy", "answers-academy"}
    arena = {stage.name: {other.name for other in stage.feeds_on} for stage in recorded(load_experiment("arena"))}
    assert arena["reward-academy"] == {"helpful-sft", "prepare-academy"}
    assert arena["rollouts-academy"] == {"helpful-sft", "prepare-academy", "reward-academy"}
    assert arena["train-academy-vas-2"] == {"helpful-sft", "prepare-academy", "rollouts-academy"}
    assert arena["train-academy-grpo-1"] == {"helpful-sft", "prepare-academy", "reward-academy"}
    assert by_name["evaluate-academy-dpo-0"] == {
        "helpful-sft",
        "train-academy-dpo-0",
        "evaluate-academy-base-None",
        "prepare-academy",
        "retention-helpful",
        "prepare-helpful",
        "toy-world",
    }
    evaluations = {name for name in by_name if name.startswith("evaluate-")}
    assert evaluations < by_name["report"]


def test_a_curve_feeds_on_both_evaluations() -> None:
    experiment = load_experiment("smoke", {"evaluation.curve": {"points": 5}})
    by_name = {stage.name: {other.name for other in stage.feeds_on} for stage in recorded(experiment)}
    assert by_name["curve-academy-dpo-0"] == {
        "helpful-sft",
        "evaluate-academy-dpo-0",
        "evaluate-academy-base-None",
        "prepare-academy",
        "prepare-helpful",  # the old text
        "toy-world",
    }
    assert {name for name in by_name if name.startswith("curve-")} < by_name["report"]
    assert len([name for name in by_name if name.startswith("curve-")]) == 20


def test_a_scale_costs_an_evaluation_and_a_weight_none(offline: list[str]) -> None:
    """Three points between the ends and one beyond: four evaluations more than for the weights, which come from one."""
    curve = "evaluation.curve.points=5 evaluation.curve.values=[1.5]".split()
    weights, scales = (
        cost_table(plan_text("smoke", None, ["run_domains=[academy]", *curve, f"evaluation.curve.kinds=[{kinds}]"]))
        for kinds in ("q-weight", "q-weight,scale")
    )
    assert scales["measure sft"][2] == pytest.approx(5 * weights["measure sft"][2], rel=0.01)


def test_a_reward_model_is_trained_for_the_rows_of_its_domain() -> None:
    by_name = {stage.name: {other.name for other in stage.feeds_on} for stage in recorded(load_experiment("mini"))}
    assert by_name["judge-academy"] == {"helpful-sft", "prepare-academy"}
    for row in ("base-None", "dpo-0", "replay-0"):
        assert {name for name in by_name[f"evaluate-academy-{row}"] if "judge" in name} == {"judge-academy"}
    assert not [name for name in by_name["train-academy-dpo-0"] if "judge" in name]


def test_domains_may_start_from_different_bases() -> None:
    by_name = {stage.name: {other.name for other in stage.feeds_on} for stage in recorded(load_experiment("paper"))}
    assert "helpful-sft" in by_name["train-harmless-sft-0"]
    assert "pretrain" in by_name["train-academy-sft-0"]
    assert "helpful-sft" not in by_name["train-academy-sft-0"]
    assert {"retention-helpful", "retention-pretrained"} <= set(by_name)


# ---- the judge

ENDPOINT = {
    "evaluation.adaptation.judge": "endpoint",
    "evaluation.adaptation.endpoint": {
        "url": "http://127.0.0.1:9/v1",
        "model": "some-judge",
        "api_key_variable": "QADAPTER_TEST_KEY",
        "input_price": 2.0,
        "output_price": 10.0,
    },
}


def test_the_price_of_a_judge_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty rows of twenty answers in two orders: 800 calls of 120 + 64 + 2 · 24 = 232 tokens and 64 in answer.

    800 · (232 · 2 + 64 · 10) / 10⁶ = 0.8832. The key is nowhere in the plan.
    """
    monkeypatch.setenv("QADAPTER_TEST_KEY", "sk-secret")
    text = plan_text("smoke", None, ENDPOINT)
    assert "Judge of the answers\n  endpoint: harmless, academy, business, entertainment, literature\n" in text
    assert "endpoint some-judge: 800 calls (two orders" in text
    assert "up to 232 tokens each, about 0.88, no budget" in text
    assert "sk-secret" not in text
    assert "about 0.88, budget 0.90" in plan_text(
        "smoke", None, ENDPOINT | {"evaluation.adaptation.endpoint.budget": 0.9}
    )
    experiment = load_experiment("smoke", ENDPOINT | {"evaluation.adaptation.endpoint.budget": 0.9})
    assert judged_rows(experiment) == 20
    settings = case_of(experiment, "harmless", endpoint.JUDGE).settings
    assert endpoint.share_of_budget(settings, 20).budget == pytest.approx(0.9 / 20)


def test_runs_of_one_experiment_share_the_judges_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """`qadapter spread`: four runs of five rows spend what one run of twenty does, and find each other's verdicts."""
    monkeypatch.setenv("QADAPTER_TEST_KEY", "sk-secret")
    whole = ENDPOINT | {"evaluation.adaptation.endpoint.budget": 0.9}
    part = whole | of_each_run(load_experiment("smoke", whole)) | {"methods.run": ["dpo"]}
    assert "200 calls (two orders of 20 answers in 5 rows" in (text := plan_text("smoke", None, part))
    assert "about 0.22, budget 0.23" in text
    with pytest.raises(QAdapterError, match=r"budget: 0\.20, but judging would cost about 0\.22"):
        plan_text("smoke", None, part | {"evaluation.adaptation.endpoint.budget": 0.8})
    cases = [case_of(load_experiment("smoke", one), "harmless", endpoint.JUDGE) for one in (whole, part)]
    shares = [endpoint.share_of_budget(case.settings, rows).budget for case, rows in zip(cases, (20, 5), strict=True)]
    assert shares[0] == pytest.approx(shares[1])
    assert endpoint.JUDGE.cache_key(cases[0]) == endpoint.JUDGE.cache_key(cases[1])
    assert of_each_run(load_experiment("smoke")) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"evaluation.adaptation.endpoint.budget": 0.5},
            r"endpoint\.budget: 0\.50, but judging would cost about 0\.88",
        ),
        ({"evaluation.adaptation.endpoint.api_key_variable": "QADAPTER_NO_KEY"}, "QADAPTER_NO_KEY, which is not set"),
        ({"evaluation.adaptation.endpoint.url": "localhost"}, r"evaluation\.adaptation\.endpoint: The judge's url"),
        ({"evaluation.adaptation.endpoint.input_price": None, "evaluation.adaptation.endpoint.budget": 1}, "no prices"),
        (
            {"domains.pirate": {"source": "academy", "base": "helpful"}},
            r"evaluation\.adaptation\.criteria\.pirate: is missing",
        ),
    ],
)
def test_a_judge_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.setenv("QADAPTER_TEST_KEY", "sk-secret")
    with pytest.raises(QAdapterError, match=expected):
        plan_text("smoke", None, ENDPOINT | changes)


def test_a_domain_of_ones_own_brings_its_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_TEST_KEY", "sk-secret")
    own = {
        "domains.pirate": {"source": "academy", "base": "helpful"},
        "evaluation.adaptation.criteria": {"pirate": "which reply a pirate would prefer"},
    }
    case = case_of(load_experiment("smoke", ENDPOINT | own), "pirate", endpoint.JUDGE)
    assert endpoint.criterion_of(case) == "which reply a pirate would prefer"
    assert "960 calls (two orders" in plan_text("smoke", None, ENDPOINT | own)


# ---- the text


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network, and a list of what was asked for."""
    asked: list[str] = []

    def check(source: str, **_: Any) -> Any:
        asked.append(source)
        raise QAdapterError(f"{source} cannot be reached; check the network")

    monkeypatch.setattr(sources, "check", check)
    return asked


def cost_table(text: str) -> dict[str, list[float]]:
    """Kind of stage → runs, steps, tokens, memory, hours on each machine, from the plan's own table."""
    section = text.split("Cost (")[1].split("\n\n")[0].splitlines()[2:]
    table = {}
    for line in section:
        found = re.fullmatch(r"  (\S.*?)\s{2,}([\d ,.–/]+)", line)
        assert found, line
        table[found[1]] = [
            float("nan") if word == "–" else float(word.split("/")[-1].replace(",", "")) for word in found[2].split()
        ]
    return table


def test_the_plan_of_smoke(offline: list[str]) -> None:
    experiment = load_experiment("smoke")
    text = plan_text("smoke", None)
    stages = expected_names(experiment)
    assert text.startswith(f"Plan of smoke: the config is valid, {len(stages)} stages.")
    dag = text.split("Stages (")[1].splitlines()[1:]
    assert sorted(line.split()[0] for line in dag) == sorted(stages)
    table = cost_table(text)
    domains = len(experiment.domains)
    for method in experiment.methods.run:
        assert table[f"train {method}"][:2] == [domains * len(experiment.seeds), experiment.training.max_steps]
    assert table["pretrain_base"][:2] == [1, 700]
    assert table["all"][0] == len(stages)
    assert table["train dpo"][2] == table["train sft"][2]  # the same budget of tokens
    hours = [values[4] for kind, values in table.items() if kind != "all"]
    assert table["all"][-2] == pytest.approx(sum(hours), abs=0.005)
    assert 0.001 < table["all"][-2] < 1  # minutes, not hours
    assert "NOT REACHABLE" not in text
    assert offline == []


def test_the_time_of_stages_side_by_side() -> None:
    """Two at a time: 5 s alone, then 4 beside 3, then 2 beside what is left of the 4, and a stage that takes none."""
    base = PlannedStage("t", "base", {}, ())
    long, short, last = (PlannedStage("t", name, {}, (base,)) for name in ("long", "short", "last"))
    end = PlannedStage("t", "end", {}, (long, short, last))
    seconds = {base: 5.0, long: 4.0, short: 3.0, last: 2.0}
    stages = [base, long, short, last, end]
    assert plan.makespan(stages, seconds, 2) == 5 + 3 + 2
    assert plan.makespan(stages, seconds, 1) == 5 + 4 + 3 + 2
    assert plan.makespan(stages, seconds, 3) == 5 + 4


def test_a_step_of_dpo_takes_three_passes_and_sft_two(offline: list[str]) -> None:
    """The Q-Adapter's takes two and a half: both replies share the passes of their prompt."""
    table = cost_table(plan_text("smoke", None, ["training.max_steps=1000000"]))
    assert table["train dpo"][4] == pytest.approx(3 / 2 * table["train sft"][4], rel=0.01)
    assert table["train q-adapter"][4] == pytest.approx(2.5 / 2 * table["train sft"][4], rel=0.01)


def test_a_plan_follows_the_overrides(offline: list[str]) -> None:
    text = plan_text("smoke", None, ["training.max_steps=7", "seeds=[0,1,2]", "methods.run=[sft]"])
    assert cost_table(text)["train sft"][:2] == [15, 7]
    assert "train dpo" not in text
    small = text.split("Too small to show anything\n")[1].split("\n\n")[0]
    advice = "7 steps of 16 pairs hardly change a model; give training.max_steps=30"
    assert small.splitlines() == [f"  WARNING: {name}: {advice}" for name in load_experiment("smoke").domains]


def test_what_is_too_small_is_said_with_what_to_set() -> None:
    """54 pairs in steps of 64: one pass is 1 step, and ten are 30 with 54 · 10 / 30 = 18 pairs per step."""
    changes = {"training.max_steps": None, "training.epochs": 1, "training.batch_size": 64}
    experiment = load_experiment("smoke", changes)
    plans = dict.fromkeys(experiment.sources, plan.SourcePlan(54, 25, 12, "", 2))
    (section,) = plan._small(experiment, plans)
    assert section.splitlines()[1:3] == [
        "  WARNING: harmless: 1 step of 64 pairs hardly changes a model; give training.epochs=10 and "
        "training.batch_size=18",
        "  WARNING: harmless: only 2 held-out pairs: what was learnt shows in steps of 1/2; hold out at least 20 "
        "prompts with sources.harmless.heldout=20, or give sources.harmless.heldout_path",
    ]
    plenty = dict.fromkeys(experiment.sources, plan.SourcePlan(6400, 25, 12, "", 200))
    assert plan._small(experiment, plenty) == []
    assert plan._small(experiment, dict.fromkeys(experiment.sources, plan.SourcePlan(0, 25, 12, ""))) == []  # unknown


@pytest.mark.slow
def test_the_plan_of_mini(shared_data: Path) -> None:
    text = plan_text("mini", str(shared_data))
    assert text.startswith(f"Plan of mini: the config is valid, {len(expected_names(load_experiment('mini')))} stages.")
    assert "NOT REACHABLE" not in text
    for name in load_experiment("mini").sources:
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        found = re.search(
            r"([\d,]+) usable pairs on ([\d,]+) prompts, \d+ quarantined; about ([\d,]+) to train on", line
        )
        assert found, name
        usable, prompts, train = (int(number.replace(",", "")) for number in found.groups())
        assert 0 < prompts <= usable
        assert 0 < train < usable
    assert 0.05 < cost_table(text)["all"][-2] < 2  # hours on two cores


@pytest.mark.slow
def test_the_plan_of_paper_offline(offline: list[str]) -> None:
    """Nothing answers, and the plan is made all the same: it says so and estimates from what the config expects."""
    experiment = load_experiment("paper")
    text = plan_text("paper", None)
    lines = [line for line in text.splitlines() if "NOT REACHABLE now" in line]
    assert [line.split()[0] for line in lines] == list(experiment.sources)
    assert len(offline) >= len(lines)
    assert "8,000.0 M parameters (guessed from the name" in text
    assert "held as int8" in text
    table = cost_table(text)
    assert table["train dpo"][0] == 5
    steps = []
    for name, epochs in (("harmless", 2), ("academy", 3)):
        source = experiment.sources[name]
        assert source.expected_pairs is not None
        steps.append(math.ceil((source.expected_pairs - source.judge_pairs) / 512 * epochs))
    assert f" {steps[0]}/{steps[1]} " in next(line for line in text.splitlines() if line.startswith("  train dpo"))
    tokens = sum(2 * 512 * count * 256 for count in (steps[0], *[steps[1]] * 4))
    assert table["train dpo"][2] == pytest.approx(tokens)
    reworded = 64 * (57 + 1 + 1 + 24 + 1)  # of each of a benchmark's tasks
    items = 14_042 + 1_319 + 12_032 + 5_761 + 541 + reworded
    # KL: 1,000 helpful texts through policy and base; 16 old prompts and 100 new ones of 128 tokens, each answer twice;
    # the answers to new prompts are read three times to compare the models, and two of each by the judge
    kept = items * 512 + 2 * 1000 * 256 + 16 * (2 * 64 + 128)
    learnt = 2 * 1000 * 256 + 100 * (2 * 256 + 128) + 5 * 100 * (256 + 128)
    assert table["evaluate dpo"][2] == pytest.approx(5 * (kept + learnt))
    assert table["evaluate base"][2] == pytest.approx(5 * (learnt - 4 * 100 * (256 + 128)))
    assert table["measure_base_retention"][2] == pytest.approx(2 * kept)
    assert table["train_judge"][:2] == [5, math.ceil(2000 / 64)]
    assert 8 < table["train dpo"][3] < 80  # GB: it fits onto one GPU of 80
    assert 5 < table["all"][-1] < 1000  # hours on one H200
    assert "2 operations per parameter and token" in text


def test_a_plan_refuses_what_a_run_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match="unknown key, did you mean 'max_steps'"):
        plan_text("smoke", None, ["training.max_step=7"])
    with pytest.raises(QAdapterError, match="does not exist"):
        plan_text("mini", str(tmp_path / "nowhere"))
    with pytest.raises(QAdapterError, match="needs a data folder"):
        plan_text("mini", None)
    with pytest.raises(QAdapterError, match="did you mean"):
        plan_text("smoke", None, ["evaluation.retention.tasks=[toy_fact]"])


def test_unreadable_questions_are_refused_before_a_run(shared_data: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "2 + 2?", "answer": "4"}\n{"question": "no answer"}\n')
    with pytest.raises(QAdapterError, match=r"built_benchmarks\.questions\.gsm8k: .* has no 'answer'"):
        plan_text("mini", str(shared_data), [f"built_benchmarks.questions={{gsm8k: {questions}}}"])


@pytest.mark.slow
def test_a_plan_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: list[str]) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    plan_text("smoke", None)
    plan_text("paper", None)
    assert list(tmp_path.iterdir()) == []
    assert plan.Recorder().stages == []
