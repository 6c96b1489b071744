"""A config is read whole or refused whole: every problem at once, each with its path and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qadapter.config.experiment import PROFILE_FOLDER, Experiment, load_experiment, profiles
from qadapter.config.reading import parse_overrides
from qadapter.errors import QAdapterError
from qadapter.methods.table import METHODS, NAMES


def refused(overrides: Any, profile: str = "smoke") -> str:
    """The message with which a profile and its overrides are refused."""
    with pytest.raises(QAdapterError) as error:
        load_experiment(profile, overrides)
    return str(error.value)


# ---- the profiles


def test_every_profile_loads() -> None:
    """Each of the files, counted, so that one that no test loads cannot rot."""
    files = sorted(PROFILE_FOLDER.glob("*.y*ml"))
    assert sorted(file.stem for file in files) == profiles()
    loaded = {file.stem: load_experiment(file.stem) for file in files}
    assert len(loaded) == len(files) >= 3
    assert {"smoke", "mini", "paper"} <= set(loaded)
    for name, experiment in loaded.items():
        assert experiment.name == name
        if name == "arena":  # everything there is, on fewer domains
            assert experiment.methods.run == NAMES
            assert len(experiment.seeds) == 3
            continue
        if name == "arena-small":
            chosen = {"q-adapter", "dpo", "rpo", "kto", "simpo", "kl-sft", "tmkl", "replay", "sft"}
            assert set(experiment.methods.run) == chosen
            own = {"name", "methods", "evaluation"}
            assert experiment.model_dump(exclude=own) == loaded["small"].model_dump(exclude=own)
            continue
        assert experiment.methods.run == tuple(method.name for method in METHODS if method.by_default)
        every = load_experiment(name, {"run_domains": None})  # small runs two by default
        assert list(every.domains) == ["harmless", "academy", "business", "entertainment", "literature"]


@pytest.mark.parametrize("name", profiles())
def test_a_profile_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (PROFILE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# make ")
    assert name in ("smoke", "arena") or f"PROFILE={name}" in first


def test_the_paper_profile_has_the_papers_values() -> None:
    paper = load_experiment("paper")
    assert paper.model.pretrained == "meta-llama/Llama-3.1-8B-Instruct"
    assert paper.model.quantization == "int8"
    assert paper.model.trust_remote_code is False
    assert (paper.lora.rank, paper.lora.alpha, paper.lora.dropout) == (8, 16, 0.05)
    assert (paper.training.learning_rate, paper.training.batch_size, paper.training.max_length) == (3e-4, 512, 512)
    assert (paper.training.epochs, paper.training.max_steps) == (3, None)
    assert paper.methods.q_adapter.preset == "paper"
    assert paper.evaluation.retention.plain_tasks == ("mmlu",)
    assert {name: domain.base for name, domain in paper.domains.items()} == {
        "harmless": "helpful",
        **dict.fromkeys(("academy", "business", "entertainment", "literature"), "pretrained"),
    }


def test_which_profiles_need_a_folder() -> None:
    assert {name: load_experiment(name).needs_data for name in ("smoke", "mini", "paper")} == {
        "smoke": False,  # its toy world is the folder
        "mini": True,
        "paper": False,
    }


def test_what_was_written_can_be_read_again() -> None:
    """MLflow's parameters and cache keys are made of this dump."""
    experiment = load_experiment("smoke", {"seeds": [0, 3], "methods.q-adapter.beta": 0.5})
    assert Experiment.model_validate(experiment.model_dump(mode="json", by_alias=True)) == experiment


def test_a_profile_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((PROFILE_FOLDER / "smoke.yaml").read_text(encoding="utf-8").replace("name: smoke", "name: mine"))
    assert load_experiment(str(file)).name == "mine"


def test_an_unknown_profile_is_named_with_the_nearest() -> None:
    message = refused((), profile="smok")
    assert "no profile 'smok'" in message
    assert "did you mean 'smoke'?" in message
    assert "arena, arena-small, mini, paper, small, smoke" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a\n- b\n", "contains list; expected a mapping"),
        (b"", "contains NoneType; expected a mapping"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    assert expected in refused((), profile=str(file))


def test_a_config_of_nothing_lists_what_is_required(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("name: empty\n")
    lines = refused((), profile=str(file)).splitlines()
    required = ["sources", "model", "training", "domains", "methods", "evaluation"]
    assert sorted(lines[1:]) == sorted(f"  {key}: is required" for key in required)


# ---- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1e-4", 1e-4),
        (" 3E+2 ", 300.0),
        ("2.5e-3", 2.5e-3),
        ("-1e-4", -1e-4),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[0, 1,2]", [0, 1, 2]),
        ("[sft, q-adapter]", ["sft", "q-adapter"]),
        ("{a: 1}", {"a": 1}),
        ('"{data}/x.jsonl"', "{data}/x.jsonl"),
        ("hub:owner/name", "hub:owner/name"),
        ("1e-4x", "1e-4x"),
        ("", None),
    ],
)
def test_values_of_strings(text: str, value: Any) -> None:
    parsed = parse_overrides([f" some.key = {text}" if text.startswith("[") else f"some.key={text}"])
    assert parsed == {"some.key": value}
    assert type(parsed["some.key"]) is type(value)


def test_strings_and_mappings_say_the_same() -> None:
    strings = [
        "training.learning_rate=1e-4",
        "seeds=[0,1]",
        "pretraining.save_steps=null",
        "methods.run=[sft,q-adapter]",
        "methods.q-adapter.alpha_0=2e-1",
        "toy_world.seed=7",
    ]
    mapping = {
        "training.learning_rate": 0.0001,
        "seeds": [0, 1],
        "pretraining.save_steps": None,
        "methods.run": ["sft", "q-adapter"],
        "methods.q-adapter.alpha_0": 0.2,
        "toy_world.seed": 7,
    }
    experiment = load_experiment("smoke", strings)
    assert experiment == load_experiment("smoke", mapping)
    assert experiment.training.learning_rate == 1e-4
    assert experiment.seeds == (0, 1)
    assert experiment.pretraining is not None
    assert experiment.pretraining.save_steps is None
    assert experiment.methods.run == ("sft", "q-adapter")
    assert experiment.methods.q_adapter.alpha_0 == 0.2


def test_an_override_opens_a_section_that_was_not_there() -> None:
    assert load_experiment("smoke", ["built_benchmarks.replies={advice: helpful}"]).built_benchmarks is not None


def test_a_number_as_text_is_the_number() -> None:
    """Deployment parameters arrive as JSON, in which people quote what they should not."""
    assert load_experiment("smoke", {"training.learning_rate": "1e-4"}).training.learning_rate == 1e-4


def test_overrides_are_left_as_they_were_given() -> None:
    given = {"lora": {"rank": 2}, "lora.rank": 3}
    assert load_experiment("smoke", given).lora.rank == 3
    assert given == {"lora": {"rank": 2}, "lora.rank": 3}


def test_overrides_do_not_leak_between_anchored_sections() -> None:
    changed = load_experiment("paper", {"sources.academy.max_heldout_pairs": 7})
    assert changed.sources["academy"].max_heldout_pairs == 7
    assert changed.sources["business"] == load_experiment("paper").sources["business"]


@pytest.mark.parametrize("given", ["training.max_steps", "=5", "  =5", "--training.max_steps"])
def test_an_override_without_a_value(given: str) -> None:
    message = refused([given])
    assert repr(given) in message
    assert "training.max_steps=5" in message


def test_an_override_that_is_no_yaml() -> None:
    assert "'seeds=[0,' is not YAML" in refused(["seeds=[0,"])


def test_an_override_below_a_value() -> None:
    assert "override name.first: name is a value and has no key 'first'" in refused(["name.first=x"])


# ---- refusals


def test_every_problem_at_once_with_its_path() -> None:
    message = refused(
        {
            "training.learning_rat": 1e-3,
            "training.batch_size": "many",
            "training.max_length": 0,
            "domains.harmless.base": "helpfull",
            "model.from_scratch.heads": None,
            "methods.q_adapter": {"beta": 1},
            "methods.replay.max_new_token": 3,
            "evaluation.retention.task": [],
            "sources.helpful.heldout": -1,
            "seeds": [],
            "tools": {},
        }
    )
    first, *lines = message.splitlines()
    assert first == "11 problems in smoke.yaml and its overrides:"
    by_path = dict(line.strip().split(": ", 1) for line in lines)
    assert by_path["training.learning_rat"] == "unknown key, did you mean 'learning_rate'?"
    assert by_path["training.batch_size"].startswith("Input should be a valid integer")
    assert by_path["training.batch_size"].endswith("(given: 'many')")
    assert by_path["training.max_length"].endswith("greater than or equal to 2 (given: 0)")
    assert "'pretrained' or 'helpful'" in by_path["domains.harmless.base"]
    assert "(given: None)" in by_path["model.from_scratch.heads"]
    assert by_path["methods.q_adapter"] == "unknown key, did you mean 'q-adapter'?"
    assert by_path["methods.replay.max_new_token"] == "unknown key, did you mean 'max_new_tokens'?"
    assert by_path["evaluation.retention.task"] == "unknown key, did you mean 'tasks'?"
    assert by_path["sources.helpful.heldout"].endswith("greater than 0 (given: -1)")
    assert "at least 1" in by_path["seeds"]
    assert by_path["tools"].startswith("unknown key")
    assert set(by_path) == {
        "training.learning_rat",
        "training.batch_size",
        "training.max_length",
        "domains.harmless.base",
        "model.from_scratch.heads",
        "methods.q_adapter",
        "methods.replay.max_new_token",
        "evaluation.retention.task",
        "sources.helpful.heldout",
        "seeds",
        "tools",
    }


def test_an_unknown_key_like_nothing_lists_the_known_ones() -> None:
    message = refused({"lora.zzzz": 1, "domains.academy.zzzz": 1})
    assert "lora.zzzz: unknown key; known: rank, alpha, dropout, target_modules" in message
    assert "domains.academy.zzzz: unknown key; known: source, base" in message


def test_the_nearest_key_is_known_below_names_too() -> None:
    assert "sources.helpful.pth: unknown key, did you mean 'path'?" in refused({"sources.helpful.pth": "x"})


def test_an_unknown_method_is_refused() -> None:
    assert "'q-adapter', 'sft', 'dpo', 'replay', 'orpo', " in refused({"methods.run": ["ppo"]})


@pytest.mark.parametrize("key", ["training.learning_rate", "sources.helpful.heldout", "methods.dpo.beta"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_none_are_refused(key: str, value: float) -> None:
    assert key in refused({key: value})


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown source of a domain": (
        {"domains.academy.source": "acadmy"},
        "domains.academy.source: no source 'acadmy', did you mean 'academy'?",
    ),
    "unknown source of the SFT base": (
        {"helpful_sft.source": "helpfull"},
        "helpful_sft.source: no source 'helpfull', did you mean 'helpful'?",
    ),
    "unknown source of the corpus": (
        {"pretraining.corpus_sources": ["harmless", "zzz"]},
        "pretraining.corpus_sources.1: no source 'zzz'; known: ",
    ),
    "unknown source of a benchmark": (
        {"built_benchmarks": {"replies": {"x": "harmles"}}},
        "built_benchmarks.replies.x: no source 'harmles', did you mean 'harmless'?",
    ),
    "epochs that do not count": (
        {"domains.academy.epochs": 2},
        "domains.academy.epochs has no effect with training.max_steps",
    ),
    "a source that no domain uses": (
        {"sources.spare": {"path": "x.jsonl"}},
        "sources ['spare'] are used by no domain",
    ),
    "a model from scratch that is not trained": (
        {"pretraining": None},
        "model.from_scratch and pretraining go together",
    ),
    "a pretrained model that is pre-trained": (
        {"model": {"pretrained": "some/model"}, "helpful_sft.lora": True},
        "model.from_scratch and pretraining go together",
    ),
    "nothing to pre-train on": (
        {"toy_world": None},
        "pretraining.corpus_sources: without a toy world",
    ),
    "full fine-tuning of a pretrained model": (
        {"model": {"pretrained": "some/model"}, "pretraining": None},
        "helpful_sft.lora: full fine-tuning is for models from scratch",
    ),
    "pre-training beyond the context": (
        {"pretraining.max_length": 97},
        "pretraining.max_length 97 is longer than the model's context 96",
    ),
    "fine-tuning beyond the context": (
        {"helpful_sft.max_length": 128},
        "helpful_sft.max_length 128 is longer than the model's context 96",
    ),
    "training beyond the context": (
        {"training.max_length": 100},
        "training.max_length 100 is longer than the model's context 96",
    ),
    "the mean's name": (
        {"domains.mean": {"source": "academy"}},
        "domains.mean: the report and MLflow call the mean over all domains so",
    ),
    "a seed twice": ({"seeds": [0, 1, 0]}, "seeds names [0] more than once"),
    "a method twice": ({"methods.run": ["sft", "dpo", "sft"]}, "run names ['sft'] more than once"),
    "a task twice": ({"evaluation.retention.tasks": ["toy_facts", "toy_facts"]}, "tasks names ['toy_facts'] more than"),
    "a plain task that is no task": (
        {"evaluation.retention.plain_tasks": ["mmlu"]},
        "plain_tasks ['mmlu'] are not among tasks",
    ),
    "heads that do not divide the width": (
        {"model.from_scratch.heads": 3},
        "hidden_size 128 is not a multiple of heads 3",
    ),
    "micro-batches that do not divide the batch": (
        {"training.micro_batch_size": 3},
        "batch_size 16 is not a multiple of micro_batch_size 3",
    ),
    "groups of replies that a micro-batch cannot be divided into": (
        {"methods.run": ["sft", "rloo"], "training.micro_batch_size": 1},
        "replies_per_prompt: 2 replies per micro-batch (two for each of its 1 pairs) are not a multiple of 4",
    ),
    "more iterations than steps": (
        {"methods.run": ["sft", "spin"], "training.max_steps": 1},
        "methods.spin.iterations: 2 are more than the 1 steps of training.max_steps",
    ),
    "neither a size nor a name": ({"model": {}, "pretraining": None}, "give exactly one of from_scratch"),
    "a size and a name": ({"model.pretrained": "some/model"}, "give exactly one of from_scratch"),
    "a quantised model from scratch": ({"model.quantization": "int8"}, "quantization is for pretrained models"),
    "the rule of a world that is none": (
        {"toy_world": None, "pretraining.corpus_sources": ["helpful"], "evaluation.adaptation.judge": "rule"},
        "evaluation.adaptation.judge: 'rule' is a toy world's",
    ),
    "an endpoint that is not named": (
        {"evaluation.adaptation.judge": "endpoint"},
        "evaluation.adaptation.endpoint: is required by evaluation.adaptation.judge 'endpoint'",
    ),
    "a judge without answers": (
        {
            "evaluation.adaptation.judge": "endpoint",
            "evaluation.adaptation.endpoint": {"url": "http://localhost/v1", "model": "m"},
            "evaluation.adaptation.generate": 0,
        },
        "evaluation.adaptation.generate: 0 leaves evaluation.adaptation.judge 'endpoint' no answers",
    ),
    "a reward model beyond the context": (
        {
            "evaluation.adaptation.reward_model": {"learning_rate": 1e-3, "batch_size": 4, "max_length": 97},
        },
        "evaluation.adaptation.reward_model.max_length 97 is longer than the model's context 96",
    ),
    "a share and a number": ({"sources.helpful.heldout": 2.5}, "a share below 1 or a whole number of prompts, not 2.5"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str) -> None:
    overrides, expected = CONTRADICTIONS[name]
    message = refused(overrides)
    assert message.startswith("1 problem in smoke.yaml and its overrides:\n  ")
    assert expected in message


def test_a_reward_model_without_pairs_is_refused_by_source() -> None:
    message = refused({"evaluation.adaptation.judge": "reward-model", "sources.harmless.judge_pairs": 40})
    assert message.startswith("4 problems")
    for name in ("academy", "business", "entertainment", "literature"):
        assert f"sources.{name}.judge_pairs: 0, but evaluation.adaptation.judge is 'reward-model'" in message


def test_who_judges() -> None:
    """The toy world's rule, else a reward model where pairs are set apart for it, else none; or the named judge."""
    assert load_experiment("smoke").judge_of("academy") == "rule"
    paper = load_experiment("paper", {"sources.harmless.judge_pairs": 0, "sources.academy.judge_pairs": 9})
    assert paper.judge_of("harmless") == "none"
    assert paper.judge_of("academy") == "reward-model"
    assert load_experiment("paper", {"evaluation.adaptation.judge": "none"}).judge_of("academy") == "none"
    silent = load_experiment("paper", {"sources.academy.judge_pairs": 9, "evaluation.adaptation.generate": 0})
    assert silent.judge_of("academy") == "none"
    mini = load_experiment("mini")
    assert {mini.judge_of(domain) for domain in mini.domains} == {"reward-model"}


def test_a_base_that_is_not_made() -> None:
    sources = {name: source.model_dump() for name, source in load_experiment("smoke").sources.items()}
    del sources["helpful"]
    message = refused({"helpful_sft": None, "sources": sources, "domains.academy.base": "pretrained"})
    assert "domains ['harmless', 'business', 'entertainment', 'literature'] use the base 'helpful'" in message


def test_contradictions_are_reported_together() -> None:
    message = refused(
        {
            "domains.academy.source": "acadmy",
            "training.max_length": 100,
            "pretraining.max_length": 99,
            "seeds": [1, 1],
        }
    )
    assert message.splitlines() == [
        "4 problems in smoke.yaml and its overrides:",
        "  seeds names [1] more than once",
        "  domains.academy.source: no source 'acadmy', did you mean 'academy'?",
        "  pretraining.max_length 99 is longer than the model's context 96",
        "  training.max_length 100 is longer than the model's context 96",
    ]


def test_a_config_does_not_change_after_validation() -> None:
    experiment = load_experiment("smoke")
    with pytest.raises(ValueError, match="frozen"):
        experiment.training.batch_size = 3  # type: ignore[misc]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's cores are shared out among the stages that run side by side; never fewer than one."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert load_experiment("smoke", {"threads": None, "parallel": 1}).threads_per_stage == 8
    assert load_experiment("smoke", {"threads": None, "parallel": 3}).threads_per_stage == 2
    assert load_experiment("smoke", {"threads": None, "parallel": 20}).threads_per_stage == 1
    assert load_experiment("smoke", {"threads": 5, "parallel": 2}).threads_per_stage == 5


def test_the_profile_is_plain_yaml() -> None:
    """No profile needs the tags of another library to be read."""
    for name in profiles():
        assert isinstance(yaml.safe_load((PROFILE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")), dict)


def test_domains_that_do_not_run_are_left_out_with_their_sources() -> None:
    """Also the two that a YAML alias made of one section; a source that something else uses stays."""
    two = load_experiment("small")
    assert (list(two.domains), list(two.sources)) == (["harmless", "academy"], ["helpful", "harmless", "academy"])
    every = ["harmless", "academy", "business", "entertainment", "literature"]
    assert list(load_experiment("small", {"run_domains": every}).domains) == every
    assert list(load_experiment("small", {"run_domains": None}).domains) == every
    judged = {"run_domains": ["academy"], "built_benchmarks.replies": {"helpful": "helpful", "dsp": "harmless"}}
    assert list(load_experiment("small", judged).sources) == ["helpful", "harmless", "academy"]
    with pytest.raises(QAdapterError, match=r"run_domains: no domain 'academi', did you mean 'academy'\?"):
        load_experiment("small", {"run_domains": ["academi"]})
