"""The trainer: learns, logs the right numbers, accumulates exactly, goes on bitwise, and refuses early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainingArguments

from qadapter.command.sections import ObjectiveOptions
from qadapter.errors import QAdapterError
from qadapter.methods.q_adapter import QAdapterSettings
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective, pairwise_loss
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.records import Reason
from qadapter.preferences.tokenize import collate_pairs, encode_pair
from qadapter.training.trainer import QAdapterConfig, QAdapterTrainer
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_models import lora, tiny_model

TOKENIZER = byte_tokenizer()
WORDS = ("red", "green", "blue", "a longer colour", "x")


def pairs(count: int = 8) -> list[PreferencePair]:
    return [
        PreferencePair(
            ({"role": "user", "content": f"{WORDS[i % 5]} {i}?"},),
            "Yes." + " Indeed." * (i % 3),
            "No" + "!" * (i % 4),
        )
        for i in range(count)
    ]


def make_trainer(out: Path, data: Any = None, model: Any = None, **settings: Any) -> QAdapterTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 7,
    }
    options: dict[str, Any] = {"peft_config": lora()}
    for name in ("peft_config", "eval_dataset", "processing_class"):
        if name in settings:
            options[name] = settings.pop(name)
    return QAdapterTrainer(
        model=tiny_model() if model is None else model,
        args=QAdapterConfig(**{**defaults, **settings}),
        train_dataset=pairs() if data is None else data,
        **{"processing_class": TOKENIZER, **options},
    )


def adapter_state(trainer: QAdapterTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "loss/preference",
    "loss/regularization",
    "kl/base",
}


@pytest.mark.slow
def test_the_default_objective_is_one_everywhere() -> None:
    """In Python, in a config and in the command."""
    named = {QAdapterConfig("out", use_cpu=True).objective, QAdapterSettings().preset, ObjectiveOptions().preset}
    assert named == {"residual"}


@pytest.mark.parametrize("objective", ["paper", "published-code", "residual"])
def test_learns_the_preference_and_moves_only_the_adapter(tmp_path: Path, objective: str):
    trainer = make_trainer(tmp_path, objective=objective, max_steps=30, eval_dataset=pairs())
    frozen = {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
    start = adapter_state(trainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss/preference"] < 0.9 * before["eval_loss/preference"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.5
    assert after["eval_rewards/accuracies"] >= before["eval_rewards/accuracies"]
    assert after["eval_kl/base"] > before["eval_kl/base"]
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.policy.named_parameters() if n in frozen)
    assert all(not torch.equal(p, start[n]) for n, p in adapter_state(trainer).items())


def test_logs_are_the_definition_of_the_batch(tmp_path: Path):
    """One step on all pairs at once: what it logs is the readable objective on that batch, before the update."""
    trainer = make_trainer(tmp_path, objective="residual", beta=0.3, per_device_train_batch_size=8, max_steps=2)
    reference = make_trainer(tmp_path / "other", objective="residual", beta=0.3).policy
    trainer.train()
    logged = trainer.state.log_history[:2]
    objective = Objective.preset("residual", beta=0.3)
    batch = collate_pairs([encode_pair(pair, TOKENIZER, 64) for pair in pairs()], 0)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # untrained: no reward, no divergence
    assert logged[0]["kl/base"] == pytest.approx(0, abs=1e-6)
    assert set(logged[1]) >= METRICS
    # the second step starts where one step leads; take that step by hand
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    q, base = reference.q_and_base_logits(batch["input_ids"], batch["attention_mask"])
    pairwise_loss(q, base, batch["input_ids"], batch["response_mask"], objective).loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()
    q, base = reference.q_and_base_logits(batch["input_ids"], batch["attention_mask"])
    expected = pairwise_loss(q, base, batch["input_ids"], batch["response_mask"], objective)
    assert logged[1] == pytest.approx(
        logged[1]
        | {
            "loss": expected.loss.item(),
            "loss/preference": expected.preference_loss.item(),
            "loss/regularization": expected.regularization.item(),
            "kl/base": expected.kl.item(),
            "rewards/chosen": expected.chosen_rewards.mean().item(),
            "rewards/rejected": expected.rejected_rewards.mean().item(),
            "rewards/margins": (expected.chosen_rewards - expected.rejected_rewards).mean().item(),
            "rewards/accuracies": (expected.chosen_rewards > expected.rejected_rewards).float().mean().item(),
        },
        rel=1e-4,
        abs=1e-6,
    )


def test_metrics_are_means_since_the_last_log(tmp_path: Path):
    often = make_trainer(tmp_path / "a", max_steps=4, logging_steps=1)
    seldom = make_trainer(tmp_path / "b", max_steps=4, logging_steps=2)
    often.train()
    seldom.train()
    for metric in METRICS - {"loss/regularization", "kl/base"}:  # those two are means over tokens
        ones = [entry[metric] for entry in often.state.log_history if metric in entry]
        twos = [entry[metric] for entry in seldom.state.log_history if metric in entry]
        assert len(ones) == 4
        assert twos == pytest.approx([(ones[0] + ones[1]) / 2, (ones[2] + ones[3]) / 2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["paper", "residual"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_accumulation_is_exact(tmp_path: Path, objective: str, beta: float):
    """8 at once, 4 + 4, 3 + 3 + 2 and 8 × 1 are the same step, although the pairs differ in length."""
    states, losses = [], []
    for batch, steps in ((8, 1), (4, 2), (3, 3), (1, 8)):
        trainer = make_trainer(
            tmp_path / f"{batch}",
            objective=objective,
            beta=beta,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.0,
        )
        trainer.train()
        states.append(adapter_state(trainer))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    for state, loss in zip(states[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_both_implementations_train_alike(tmp_path: Path):
    runs = [make_trainer(tmp_path / kind, loss_implementation=kind, max_steps=6) for kind in ("fused", "readable")]
    for run in runs:
        run.train()
        assert run.policy.loss_implementation == run.args.loss_implementation
    logs = [[entry for entry in run.state.log_history if "loss" in entry] for run in runs]
    for fused, readable in zip(*logs, strict=True):
        assert fused == pytest.approx(readable, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path):
    def settings(folder: str) -> dict[str, Any]:
        return {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "peft_config": lora(dropout=0.2)}

    whole = make_trainer(tmp_path / "whole", **settings("whole"))
    whole.train()
    first = make_trainer(tmp_path / "cut", **settings("cut"))
    first.train()
    for name in ("checkpoint-6", "checkpoint-7"):
        for file in sorted((tmp_path / "cut" / name).glob("*")):
            file.unlink()
        (tmp_path / "cut" / name).rmdir()
    resumed = make_trainer(tmp_path / "cut", **{**settings("cut"), "seed": 7})
    with torch.no_grad():  # what was there before the checkpoint is loaded must not matter
        for parameter in resumed.policy.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    expected = adapter_state(whole)
    assert resumed.state.global_step == 7
    for name, value in adapter_state(resumed).items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = ([e for e in t.state.log_history if "loss" in e and e["step"] > 3] for t in (resumed, whole))
    assert [e["loss"] for e in ours] == [e["loss"] for e in theirs]


def test_checkpoint_and_saved_model_are_policies(tmp_path: Path):
    trainer = make_trainer(
        tmp_path / "run", objective="residual", alpha_0=0.8, save_strategy="steps", save_steps=2, max_steps=2
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    ids = torch.tensor([TOKENIZER("hello")["input_ids"]])
    trainer.policy.eval()
    with torch.no_grad():
        expected = trainer.policy(input_ids=ids).logits
        for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
            loaded = QAdapterForCausalLM.from_pretrained(folder, base_model=tiny_model())
            assert loaded.config.alpha_0 == 0.8
            assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert (tmp_path / "final" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_best_checkpoint_is_loaded_at_the_end(tmp_path: Path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=pairs(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=False,  # the least trained one is best
        max_steps=3,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = QAdapterForCausalLM.from_pretrained(trainer.state.best_model_checkpoint, base_model=tiny_model())
    for (name, mine), (_, saved) in zip(trainer.policy.named_parameters(), best.named_parameters(), strict=True):
        assert torch.equal(mine, saved), name


def test_the_best_of_a_loss_is_the_smallest(tmp_path: Path):
    def larger(metric: str, **given: bool) -> bool | None:
        return QAdapterConfig(
            output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=metric, **given
        ).greater_is_better

    smaller = ("loss", "eval_loss", "loss/preference", "eval_loss/regularization", "kl/base", "eval_colors_loss")
    assert not any(larger(metric) for metric in smaller)
    assert all(larger(metric) for metric in ("rewards/margins", "eval_rewards/accuracies"))
    assert larger("kl/base", greater_is_better=True)


def test_evaluation_over_batches_is_the_objective_over_all(tmp_path: Path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset={"a": pairs(7), "b": pairs(2)},
        per_device_eval_batch_size=3,
        objective="residual",
        group_by_length=True,  # of the pairs that are trained on; these stay in their order
    )
    trainer.train()
    metrics = trainer.evaluate()
    batch = collate_pairs([encode_pair(pair, TOKENIZER, 64) for pair in pairs(7)], 0)
    policy = trainer.policy.eval()
    with torch.no_grad():
        q, base = policy.q_and_base_logits(batch["input_ids"], batch["attention_mask"])
        expected = pairwise_loss(q, base, batch["input_ids"], batch["response_mask"], policy.objective)
    assert metrics["eval_a_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert metrics["eval_a_loss/regularization"] == pytest.approx(expected.regularization.item(), rel=1e-5)
    assert metrics["eval_a_kl/base"] == pytest.approx(expected.kl.item(), rel=1e-5)
    assert {f"eval_b_{name}" for name in METRICS} <= set(metrics)


# ---- data ----------------------------------------------------------------------------------------------------------


def test_a_second_training_logs_its_own_means(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=3, beta=0.0)
    trainer.train()
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(logged["loss/preference"], rel=1e-5)


def test_rows_given_to_evaluate_and_predict_are_tokenised(tmp_path: Path):
    rows = [conversational(row) for row in pairs(4)]
    expected = make_trainer(tmp_path, eval_dataset=rows).evaluate()
    trainer = make_trainer(tmp_path)
    found = [trainer.evaluate(rows), trainer.evaluate({"a": pairs(4)}), trainer.predict(rows).metrics]
    losses = [found[0]["eval_loss"], found[1]["eval_a_loss"], found[2]["test_loss"]]
    assert losses == pytest.approx([expected["eval_loss"]] * 3)
    with pytest.raises(QAdapterError, match="The evaluation data have no usable pair"):
        trainer.evaluate([{"prompt": "a", "chosen": "", "rejected": "b"}])


def conversational(row: PreferencePair) -> dict[str, Any]:
    return dict(row.to_trl())


def implicit(row: PreferencePair) -> dict[str, Any]:
    full = row.to_trl()
    return {"chosen": full["prompt"] + full["chosen"], "rejected": full["prompt"] + full["rejected"]}


def plain(row: PreferencePair) -> dict[str, Any]:
    return {"prompt": row.prompt[0]["content"], "chosen": row.chosen, "rejected": row.rejected}


def plain_implicit(row: PreferencePair) -> dict[str, Any]:
    return {key: row.prompt[0]["content"] + getattr(row, key) for key in ("chosen", "rejected")}


@pytest.mark.slow
@pytest.mark.parametrize("form", [conversational, implicit, plain, plain_implicit])
def test_takes_every_form_of_preference_data(tmp_path: Path, form: Callable[[PreferencePair], dict[str, Any]]):
    from datasets import Dataset

    rows = [form(pair) for pair in pairs()]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), max_steps=1)
    encoded = trainer.train_dataset[0]
    prompt, chosen = TOKENIZER.decode(encoded.prompt_ids), TOKENIZER.decode(encoded.chosen_ids)
    # bare texts too: as a file is read, and as the policy is asked later
    assert (prompt, chosen) == ("<bos><|user|>red 0?<eos><|assistant|>", "Yes.<eos>")
    assert TOKENIZER.decode(encoded.rejected_ids) == "No<eos>"
    trainer.train()
    assert trainer.quarantined == []


def test_unusable_rows_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = conversational(pairs()[0])
    rows = [
        good,
        {**good, "chosen": [{"role": "assistant", "content": ""}]},
        {**good, "rejected": good["chosen"]},
        {**good, "rejected": None},
        {**good, "chosen": [*good["chosen"], {"role": "user", "content": "Thanks"}]},
        {**good, "prompt": []},
        {**good, "prompt": [{"role": "judge", "content": "x"}]},
        {"prompt": "a"},
        pairs()[1],
    ]
    trainer = make_trainer(tmp_path, rows, eval_dataset=rows[:2])
    assert len(trainer.train_dataset) == 2
    assert [index for index, _ in trainer.quarantined] == [1, 2, 3, 4, 5, 6, 7]
    reasons = dict(trainer.quarantined)
    # the reasons that a file's quarantine gives
    assert reasons[1] == Reason.EMPTY_REPLY
    assert reasons[2] == Reason.IDENTICAL_REPLIES
    assert reasons[3] == Reason.WRONG_FIELDS
    assert reasons[4] == reasons[5] == Reason.NOT_A_DIALOGUE
    assert reasons[6] == reasons[7] == Reason.WRONG_FIELDS
    assert [index for index, _ in trainer.quarantined_eval] == [1]
    assert "7 of 9 training pairs are unusable and left out, the first at index 1" in caplog.text


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refuses_early_what_cannot_work(tmp_path: Path):
    with pytest.raises(QAdapterError, match=r"has no adapter to train\. Give peft_config"):
        make_trainer(tmp_path, peft_config=None)
    with pytest.raises(QAdapterError, match="carries an adapter already"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(), lora()))
    frozen = get_peft_model(tiny_model(), lora())
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(QAdapterError, match="The adapter is frozen"):
        make_trainer(tmp_path, model=frozen, peft_config=None)
    with pytest.raises(QAdapterError, match=r"no usable pair \(1 rows, all unusable; the first because"):
        make_trainer(tmp_path, [{"prompt": "a", "chosen": "", "rejected": "b"}])
    with pytest.raises(QAdapterError, match="have no length"):
        make_trainer(tmp_path, iter(pairs()))
    with pytest.raises(QAdapterError, match=r"token id 2.., but the base has only 100 embeddings"):
        make_trainer(tmp_path, model=tiny_model(vocab_size=100))
    with pytest.raises(QAdapterError, match=r"knows only 16 positions\. Set max_length to 16 or less"):
        make_trainer(tmp_path, model=tiny_model(max_position_embeddings=16))
    with pytest.raises(QAdapterError, match="alpha_tilde is -1"):
        make_trainer(tmp_path, alpha_tilde=-1)
    with pytest.raises(QAdapterError, match="no preset 'dpo'"):
        make_trainer(tmp_path, objective="dpo")
    with pytest.raises(QAdapterError, match="loss_implementation is 'quick'; expected 'fused' or 'readable'"):
        make_trainer(tmp_path, loss_implementation="quick")
    with pytest.raises(QAdapterError, match="There is no tokenizer with the base"):
        make_trainer(tmp_path, processing_class=None)


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"default": 1.0, "other": 1.0}, {"other": 1.0}, {"default": 0.5}])
def test_refuses_a_policy_whose_weights_it_would_not_train(tmp_path: Path, weights: dict[str, float]):
    policy = QAdapterForCausalLM.from_base(tiny_model(), lora(), Objective.preset("residual"))
    policy.save_pretrained(tmp_path / "other")
    policy.attach(tmp_path / "other", "other")
    policy.set_adapter_weights(weights)
    with pytest.raises(QAdapterError, match="Training moves one adapter, with weight 1"):
        make_trainer(tmp_path, model=policy, peft_config=None)
    policy.set_adapter_weights({"default": 1.0})
    make_trainer(tmp_path, model=policy, peft_config=None)


def test_options_that_would_have_no_effect_are_refused(tmp_path: Path):
    for options, expected in (
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha cannot be set: NEFTune adds noise to the embeddings"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be set: preference objectives have no labels"),
        ({"torch_compile": True}, "torch_compile cannot be set"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics cannot be set"),
        ({"train_sampling_strategy": "batch_rebalance"}, "expected random, sequential or group_by_length"),
        ({"max_length": 1}, r"max_length is 1; expected at least 2"),
        ({"max_length": 64.5}, "max_length is 64.5"),
        ({"alpha_tilde": 1e-300}, "alpha_tilde from 1e-06"),
        ({"peft_config": lora(modules_to_save=["nrm"])}, "modules to save that llama does not have: nrm"),
        ({"processing_class": "gpt2"}, "processing_class is str; expected a tokenizer"),
    ):
        with pytest.raises(QAdapterError, match=expected):
            make_trainer(tmp_path, **options)
    with pytest.raises(QAdapterError, match="args is TrainingArguments; expected QAdapterConfig"):
        QAdapterTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True), pairs())


@pytest.mark.slow
def test_pairs_grouped_by_length_are_the_same_after_a_resume(tmp_path: Path):
    """A step holds pairs of similar length, each pair comes once per epoch, and each epoch has its own order."""
    data = [PreferencePair(({"role": "user", "content": "?" * (1 + 7 * i % 29)},), "Yes.", "No") for i in range(160)]
    for name in ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}):
        trainer = make_trainer(tmp_path, data, max_length=None, **name)
        sampler = trainer._get_train_sampler()
        lengths = trainer.train_dataset.lengths
        first = list(sampler)
        assert sorted(first) == list(range(160))
        spread = [max(x) - min(x) for x in (([lengths[i] for i in first[k : k + 4]]) for k in range(0, 160, 4))]
        assert sum(spread) / len(spread) < (max(lengths) - min(lengths)) / 3
        assert list(sampler) == first
        sampler.set_epoch(1)
        assert list(sampler) != first
    assert not isinstance(make_trainer(tmp_path, data)._get_train_sampler(), type(sampler))
    trainer.train()
    assert trainer.state.global_step == 4


def test_without_max_length_nothing_is_cut(tmp_path: Path):
    data = [PreferencePair(({"role": "user", "content": "?" * 90},), "Yes." * 20, "No")]
    cut = make_trainer(tmp_path, data, max_length=100)
    assert cut.train_dataset.truncation.prompts == 1
    whole = make_trainer(tmp_path, data, max_length=None)
    assert whole.train_dataset.truncation.cut == 0
    assert whole.train_dataset.longest == 90 + 81 + 4  # <bos><|user|>…<eos><|assistant|>, and a reply with its <eos>
    with pytest.raises(QAdapterError, match=r"175 tokens long, but the base knows only 64 positions"):
        make_trainer(tmp_path, data, max_length=None, model=tiny_model(max_position_embeddings=64))


def test_frames_and_several_data_sets(tmp_path: Path):
    import pandas as pd
    from datasets import Dataset, DatasetDict

    rows = [plain(pair) for pair in pairs()]
    both = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:3]))
    trainer = make_trainer(tmp_path, pd.DataFrame(rows), eval_dataset=both, max_steps=1)
    assert len(trainer.train_dataset) == 8
    assert {name: len(found) for name, found in trainer.eval_dataset.items()} == {"train": 8, "test": 3}
    trainer.train()
    assert "eval_test_loss" in trainer.evaluate()
    with pytest.raises(QAdapterError, match=r"a DatasetDict with the keys train, test.*such as data\['train'\]"):
        make_trainer(tmp_path, both)
    with pytest.raises(QAdapterError, match="no length"):
        make_trainer(tmp_path, both["train"].to_iterable_dataset())


def test_a_fractional_alpha_is_the_number(tmp_path: Path):
    trainer = make_trainer(tmp_path, peft_config=lora(lora_alpha=0.5), max_steps=1)
    scalings = {module.scaling["default"] for module in trainer.policy.modules() if isinstance(module, LoraLayer)}
    assert scalings == {0.5 / 4}
    trainer.train()
    trainer.save_model(str(tmp_path / "m"))
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text())["lora_alpha"] == 0.5
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "m", base_model=tiny_model())
    assert {module.scaling["default"] for module in loaded.modules() if isinstance(module, LoraLayer)} == {0.5 / 4}


def test_refuses_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(QAdapterConfig, "n_gpu", 2)
    with pytest.raises(QAdapterError, match=r"2 GPUs in one process would split pairs.*accelerate launch"):
        make_trainer(tmp_path)


@pytest.mark.slow
def test_takes_a_path_a_peft_model_and_a_policy(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    by_path = make_trainer(tmp_path / "a", model=str(tmp_path / "base"), processing_class=None)
    by_path.train()
    torch.manual_seed(7)
    peft_model = get_peft_model(tiny_model(), lora())
    by_peft = make_trainer(tmp_path / "b", model=peft_model, peft_config=None)
    by_peft.train()
    by_path.save_model(str(tmp_path / "adapter"))
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    further = make_trainer(tmp_path / "c", model=loaded, peft_config=None, objective="residual")
    further.train()
    assert further.policy.objective == Objective.preset("residual")
    assert further.policy.config.alpha_0 == 1.0
    steps = [len([e for e in t.state.log_history if "loss" in e]) for t in (by_path, by_peft, further)]
    assert steps == [4, 4, 4]


def test_the_tokenizer_is_of_the_bases_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "hub" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("v1", "a" * 40), ("main", "b" * 40)):
        (repository / "refs" / name).write_text(commit)
        tiny_model().save_pretrained(repository / "snapshots" / commit)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template += f"{{# {name} #}}"
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = {"model": "me/tiny", "processing_class": None}
    old = make_trainer(tmp_path / "old", **asked, model_init_kwargs={"revision": "v1"})
    new = make_trainer(tmp_path / "new", **asked)
    ends = [trainer.processing_class.chat_template.rpartition("{#")[2] for trainer in (old, new)]
    assert ends == [" v1 #}", " main #}"]


def test_config_is_complete_and_written_with_the_model(tmp_path: Path):
    args = QAdapterConfig(output_dir=str(tmp_path), objective="published-code", shift_mask=True, use_cpu=True)
    assert (args.learning_rate, args.max_length, args.remove_unused_columns) == (3e-4, 512, False)
    assert args.to_objective() == Objective.preset("published-code", shift_mask=True)
    trainer = make_trainer(tmp_path, objective="published-code", gamma=0.9)
    trainer.save_model(str(tmp_path / "m"))
    written = json.loads((tmp_path / "m" / "q_adapter.json").read_text())["objective"]
    assert (written["gamma"], written["aggregation"], written["shift_mask"]) == (0.9, "padded-mean", False)
