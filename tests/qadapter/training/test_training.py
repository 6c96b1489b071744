"""Training: from a corpus to a base, from a base to adapters; every method on the same terms, whole or resumed."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer

from qadapter.config.experiment import load_experiment
from qadapter.config.model import LoraSettings, ModelSettings
from qadapter.config.training import HelpfulSettings, OptimizerSettings, PretrainingSettings
from qadapter.errors import QAdapterError
from qadapter.inference.generate import generate_replies
from qadapter.methods.dpo import DPOSettings
from qadapter.methods.needs.base_answers import prompt_key
from qadapter.methods.q_adapter import QAdapterSettings
from qadapter.methods.sft import SFTSettings
from qadapter.methods.table import NAMES
from qadapter.policy.guided import GuidedForCausalLM
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import Message, load_pairs
from qadapter.progress.reports import listening
from qadapter.training import adapt, supervised
from qadapter.training.arguments import (
    measured_cost,
    tokens_seen,
    trainer_arguments,
)
from qadapter.training.checkpoints import last_checkpoint, seal
from qadapter.training.corpus import read_corpus
from qadapter.training.pretraining import CHAT_TEMPLATE, model_from_scratch, pretrain, train_tokenizer
from qadapter.training.supervised import fine_tune_base, train_sft
from tests.support.heard import Heard
from tests.support.killed_training import killed_at
from tests.support.tiny_toy import (
    LORA,
    MODEL,
    PAIRS,
    SIZE,
    STEPS,
    TRAINING,
    TinyToy,
    make_tiny_toy,
    pair,
    rows,
    write_pairs,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("training"))


@dataclass
class Trained:
    """An adapter, and what was seen while it was trained."""

    out: Path
    sequences: list[int] = field(default_factory=list)
    tokens: int = 0
    base_before: list[torch.Tensor] = field(default_factory=list)
    base_after: list[torch.Tensor] = field(default_factory=list)
    trainable: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def adapters(world: TinyToy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Each method once, uninterrupted, watched from outside."""
    root = tmp_path_factory.mktemp("adapters")
    trained: dict[str, Trained] = {}
    for method in NAMES:
        seen = Trained(root / method)
        world.needs_of(method)  # a reward model's training is not this method's
        with pytest.MonkeyPatch.context() as patch:
            _watch(seen, patch)
            world.train(method, seen.out)
        trained[method] = seen
    return trained


def _watch(seen: Trained, patch: pytest.MonkeyPatch) -> None:
    networks: list[torch.nn.Module] = []
    load, step = adapt.load_base, Trainer.training_step

    def watched_load(*arguments: Any) -> Any:
        network, tokenizer = load(*arguments)
        networks.extend(network.parameters())  # the very tensors, below all of PEFT's wrappers
        seen.base_before = [parameter.detach().clone() for parameter in network.parameters()]
        return network, tokenizer

    def watched_step(trainer: Trainer, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> Any:
        if isinstance(inputs, list):  # prompts, each as often as it is answered
            seen.sequences.append(len(inputs))
        else:  # KTO reads other rows' replies too, without learning from them
            own = {name: value for name, value in inputs.items() if not name.startswith("KL_")}
            seen.sequences.append(sum(len(ids) for name, ids in own.items() if name.endswith("input_ids")))
            seen.tokens += sum(int(mask.sum()) for name, mask in own.items() if name.endswith("attention_mask"))
        seen.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        loss = step(trainer, model, inputs, *rest)
        seen.base_after = [parameter.detach().clone() for parameter in networks]  # type: ignore[attr-defined]
        return loss

    patch.setattr(adapt, "load_base", watched_load)
    patch.setattr(Trainer, "training_step", watched_step)


OWN_REPLIES = ("rloo", "grpo")
GUIDED = ("vas", "pita")


def same_weights(first: Path, second: Path) -> bool:
    (one,), (two,) = (sorted(folder.glob("*.safetensors")) for folder in (first, second))
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(out: Path) -> list[dict[str, Any]]:
    """The training curve."""
    return rows(out / "history.jsonl")


# ---- tokenizer and model from scratch

TALK: list[list[Message]] = [
    [
        {"role": "user", "content": "what is 12 plus 7 ?"},
        {"role": "assistant", "content": "12 plus 7 is 19 ."},
        {"role": "user", "content": "thank you"},
        {"role": "assistant", "content": "my pleasure !"},
    ]
]


@pytest.mark.parametrize("kind", ["words", "byte-bpe"])
def test_tokenizer_round_trip_and_chat_template(kind: str, tmp_path: Path) -> None:
    size = SIZE.model_copy(update={"tokenizer": kind})
    tokenizer = train_tokenizer(TALK, size)
    text = "12 plus 7 is 19 ."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    rendered = tokenizer.apply_chat_template(TALK[0], tokenize=False)
    assert rendered == (
        "<|user|>what is 12 plus 7 ?<|end|><|assistant|>12 plus 7 is 19 .<|end|>"
        "<|user|>thank you<|end|><|assistant|>my pleasure !<|end|>"
    )
    asked = tokenizer.apply_chat_template(TALK[0][:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>what is 12 plus 7 ?<|end|><|assistant|>"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert [ids[0], ids[-2], ids[-1]] == tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.padding_side == "left"
    assert again.model_max_length == SIZE.context
    assert again.chat_template == CHAT_TEMPLATE
    assert again.apply_chat_template(TALK[0], return_dict=True) == tokenizer.apply_chat_template(
        TALK[0], return_dict=True
    )
    batch = again(["a", "12 plus 7"], padding=True, add_special_tokens=False)
    assert batch["input_ids"][0][0] == again.pad_token_id


def test_a_word_that_was_never_read() -> None:
    tokenizer = train_tokenizer(TALK, SIZE)
    assert tokenizer("12 unheard ?", add_special_tokens=False)["input_ids"][1] == tokenizer.unk_token_id


def test_bytes_can_spell_anything_and_digits_stand_alone() -> None:
    tokenizer = train_tokenizer(TALK, SIZE.model_copy(update={"tokenizer": "byte-bpe"}))
    text = "Ünheard – 日本語 \n\t 1234567 🦆"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("1234567", add_special_tokens=False)["input_ids"]) == 7


@pytest.mark.parametrize("kind", ["words", "byte-bpe"])
def test_the_same_texts_make_the_same_tokenizer(kind: str, world: TinyToy) -> None:
    size = SIZE.model_copy(update={"tokenizer": kind})
    first, second = (train_tokenizer(world.conversations, size).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_is_no_larger_than_asked(world: TinyToy) -> None:
    small = SIZE.model_copy(update={"vocab_size": 60})
    assert len(train_tokenizer(world.conversations, small)) == 60


def test_a_model_from_scratch(world: TinyToy) -> None:
    tokenizer = train_tokenizer(world.conversations, SIZE)
    one, two, other = (model_from_scratch(SIZE, tokenizer, seed) for seed in (0, 0, 1))
    assert one.config.vocab_size == len(tokenizer) < SIZE.vocab_size  # no rows for words that do not exist
    assert one.get_input_embeddings().weight is one.get_output_embeddings().weight
    assert (one.config.eos_token_id, one.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


# ---- pre-training


def test_pretraining_learns_and_writes_a_whole_model(world: TinyToy) -> None:
    folder = world.base.parent
    assert {path.name for path in folder.iterdir()} == {"model", "history.jsonl", "metrics.json"}
    history = rows(folder / "history.jsonl")
    assert [row["step"] for row in history] == list(range(1, 61))
    assert history[0]["train/loss"] == pytest.approx(math.log(246), abs=0.4)  # about uniform over the words
    assert history[-1]["train/loss"] < 0.5 * history[0]["train/loss"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train/final_loss"] == history[-1]["train/loss"]
    assert metrics["train/steps"] == 60
    model = AutoModelForCausalLM.from_pretrained(world.base)
    assert metrics["cost/trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["cost/train_seconds"] > 0
    assert metrics["cost/train_tokens_per_second"] == pytest.approx(
        metrics["cost/train_tokens"] / metrics["cost/train_seconds"]
    )
    assert 15 < metrics["cost/train_tokens"] / (60 * 16) < 30  # tokens of a toy conversation


@pytest.mark.slow
def test_no_pickle_is_written(world: TinyToy, adapters: dict[str, Trained]) -> None:
    """Weights are safetensors; Trainer's own record of its arguments is a pickle."""
    files = [path for root in (world.base, *(seen.out for seen in adapters.values())) for path in root.rglob("*.*")]
    assert len(files) > 20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".jinja", ".md"}


def test_pretraining_resumed_is_pretraining_uninterrupted(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PretrainingSettings(
        learning_rate=1e-2, max_steps=7, batch_size=8, max_length=64, logging_steps=1, save_steps=3, schedule="cosine"
    )
    some = world.conversations[:40]  # an epoch is 5 steps

    def run(out: Path, scratch: Path) -> Path:
        out.mkdir()
        pretrain(some, SIZE, settings, seed=5, out=out, scratch=scratch)
        return out

    whole = run(tmp_path / "whole", tmp_path / "s1")
    killed_at(5, monkeypatch, lambda: run(tmp_path / "killed", tmp_path / "s2"))
    assert not list((tmp_path / "killed").iterdir())
    assert Path(str(last_checkpoint(tmp_path / "s2"))).name == "checkpoint-3"
    resumed = run(tmp_path / "resumed", tmp_path / "s2")
    assert same_weights(whole / "model", resumed / "model")
    assert rows(whole / "history.jsonl") == rows(resumed / "history.jsonl")
    fresh = run(tmp_path / "fresh", tmp_path / "s3")
    assert same_weights(whole / "model", fresh / "model")
    # Killed after its last step, in the middle of an epoch: there transformers itself would train an eighth one.
    assert Path(str(last_checkpoint(tmp_path / "s1"))).name == "checkpoint-7"
    ended = run(tmp_path / "ended", tmp_path / "s1")
    assert same_weights(whole / "model", ended / "model")
    assert rows(whole / "history.jsonl") == rows(ended / "history.jsonl")


def test_the_longest_conversation_is_cut(world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = Trainer.training_step

    def watched(trainer: Trainer, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", watched)
    settings = PretrainingSettings(learning_rate=1e-3, max_steps=2, batch_size=16, max_length=9)
    pretrain(world.conversations, SIZE, settings, seed=0, out=tmp_path, scratch=tmp_path / "s")
    assert widths == [9, 9]


# ---- what is read


def test_a_corpus_of_conversations_keeps_its_frequencies(tmp_path: Path) -> None:
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "corpus.jsonl").write_text(f"{json.dumps(said)}\n" * 3)
    assert read_corpus([tmp_path]) == [said["messages"]] * 3


def test_a_corpus_may_hold_what_looks_like_the_end_of_a_line(tmp_path: Path) -> None:
    said = {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c\x85d"}]}
    (tmp_path / "corpus.jsonl").write_text(f"{json.dumps(said, ensure_ascii=False)}\n", encoding="utf-8")
    assert read_corpus([tmp_path]) == [said["messages"]]


def test_a_corpus_of_pairs_has_both_replies_and_no_held_out_ones(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    folder.mkdir()
    write_pairs(folder / "train.jsonl", [pair("a", "b", "c"), pair("a", "b", "d"), pair("e", "b", "c")])
    write_pairs(folder / "heldout.jsonl", [pair("secret", "x", "y")])
    turns = [[message["content"] for message in conversation] for conversation in read_corpus([folder, folder])]
    assert turns == [["a", "b"], ["a", "c"], ["a", "d"], ["e", "b"], ["e", "c"]]


def test_a_folder_without_a_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"neither corpus\.jsonl nor train\.jsonl"):
        read_corpus([tmp_path])


def test_pretraining_without_a_conversation_is_refused(tmp_path: Path) -> None:
    settings = PretrainingSettings(learning_rate=1e-3, max_steps=2, batch_size=2, max_length=9)
    with pytest.raises(QAdapterError, match="no conversation"):
        pretrain([], SIZE, settings, seed=0, out=tmp_path, scratch=tmp_path / "s")


# ---- arguments


def test_arguments_of_a_trainer(tmp_path: Path) -> None:
    settings = OptimizerSettings(learning_rate=1e-3, epochs=2, batch_size=12, micro_batch_size=3, max_length=8)
    pairwise = trainer_arguments(settings, seed=4, scratch=tmp_path)
    single = trainer_arguments(settings, seed=4, scratch=tmp_path, sequences_per_example=2)
    assert (pairwise["per_device_train_batch_size"], pairwise["gradient_accumulation_steps"]) == (3, 4)
    assert (single["per_device_train_batch_size"], single["gradient_accumulation_steps"]) == (6, 4)
    assert (pairwise["max_steps"], pairwise["num_train_epochs"]) == (-1, 2)
    assert (pairwise["seed"], pairwise["data_seed"]) == (4, 4)
    assert pairwise["save_strategy"] == "no"
    assert pairwise["report_to"] == "none"
    assert trainer_arguments(TRAINING, seed=0, scratch=tmp_path)["save_strategy"] == "steps"


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "never") is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        seal(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").mkdir()  # killed while it was written
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_tokens_seen_by_hand() -> None:
    """5 examples in batches of 2 are 3 steps an epoch, 15 tokens: 4 steps saw 20 on average."""
    assert tokens_seen([1, 2, 3, 4, 5], steps=4, batch_size=2) == 20
    assert tokens_seen([3, 3], steps=2, batch_size=8) == 12


def test_cost_is_measured() -> None:
    with measured_cost() as cost:
        held = np.ones(2**23)  # 64 MiB
        time.sleep(0.25)
        del held
    assert 0.25 <= cost.seconds < 5
    if not torch.cuda.is_available():
        assert 50 < cost.peak_memory_mb < 500


# ---- every method on the same terms


@pytest.mark.parametrize("method", NAMES)
def test_only_the_adapter_moves(method: str, adapters: dict[str, Trained]) -> None:
    seen = adapters[method]
    assert len(seen.base_before) > 5
    assert all(torch.equal(a, b) for a, b in zip(seen.base_before, seen.base_after, strict=True))
    assert seen.trainable
    head = {name for name in seen.trainable if name.startswith("value_head.")}
    assert len(head) == (2 if method in GUIDED else 0)
    assert all("lora_" in name for name in seen.trainable - head)
    saved = load_file(seen.out / "adapter/adapter_model.safetensors")
    assert len(saved) == len(seen.trainable - head)
    moved = [name for name, weight in saved.items() if "lora_B" in name and weight.abs().max() > 0]
    assert len(moved) == len(saved) / 2  # B starts at zero: each of them has moved
    assert not json.loads((seen.out / "adapter/adapter_config.json").read_text()).get("modules_to_save")


def test_every_method_sees_the_same_number_of_sequences(adapters: dict[str, Trained]) -> None:
    """Ten pairs in steps of four, twice: 8, 8 and 4 sequences, for SFT and replay too, whose examples are single.

    Where a method makes its own replies, every step has 8: there is no last one of an epoch with what is left.
    """
    for method, seen in adapters.items():
        metrics = json.loads((seen.out / "metrics.json").read_text())
        assert metrics["train/steps"] == STEPS
        if method in OWN_REPLIES:
            assert seen.sequences == [8] * STEPS, method
            assert metrics["cost/train_tokens"] > metrics["cost/generated_tokens"] > 8 * STEPS
        elif method in GUIDED:
            assert len(seen.sequences) == STEPS
            assert seen.sequences[:3] == [8, 8, 8], method
            assert metrics["cost/train_tokens"] == pytest.approx(seen.tokens, rel=0.2)
        else:
            assert seen.sequences == [8, 8, 4, 8, 8, 4], method
            assert metrics["cost/train_tokens"] == seen.tokens, method
        assert metrics["cost/adapter_bytes"] == (seen.out / "adapter/adapter_model.safetensors").stat().st_size
    sizes = {
        json.loads((seen.out / "metrics.json").read_text())["cost/trainable_parameters"] for seen in adapters.values()
    }
    assert len(sizes) == 2, "and the head of guided decoding"


def test_micro_batches_see_the_same(world: TinyToy, tmp_path: Path) -> None:
    seen = Trained(tmp_path / "sft")
    with pytest.MonkeyPatch.context() as patch:
        _watch(seen, patch)
        world.train("sft", seen.out, training=TRAINING.model_copy(update={"micro_batch_size": 2, "max_steps": 3}))
    assert seen.sequences == [4, 4, 4, 4, 4]  # 20 in all, as two steps of two and one of one


def test_metrics_and_files_have_the_same_names_for_each_method(adapters: dict[str, Trained]) -> None:
    names = {method: set(json.loads((seen.out / "metrics.json").read_text())) for method, seen in adapters.items()}
    assert names["q-adapter"] == names["sft"] == names["dpo"] == names["replay"]
    assert names["sft"] == {
        "train/final_loss",
        "train/steps",
        "train/truncated_prompts",
        "train/truncated_replies",
        "train/truncated_ends",
        "cost/train_seconds",
        "cost/train_tokens",
        "cost/train_tokens_per_second",
        "cost/train_peak_memory_mb",
        "cost/trainable_parameters",
        "cost/adapter_bytes",
    }
    for method, seen in adapters.items():
        files = {path.name for path in seen.out.iterdir()} - ({"params.json"} if method == "q-adapter" else set())
        assert files == {"adapter", "history.jsonl", "metrics.json", "unused.jsonl"}
        assert [row["step"] for row in rows(seen.out / "history.jsonl")] == [1, 2, 3, 4, 5, 6]
        assert rows(seen.out / "unused.jsonl") == []


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_resumed_is_uninterrupted(
    method: str, world: TinyToy, adapters: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the second epoch, a step behind a checkpoint; run again with the same scratch folder."""
    scratch = tmp_path / "scratch"
    killed_at(5, monkeypatch, lambda: world.train(method, tmp_path / "killed", scratch=scratch))
    assert not (tmp_path / "killed" / "adapter").exists()
    checkpoint = Path(str(last_checkpoint(scratch)))
    assert checkpoint.name == "checkpoint-4"
    assert 0 < json.loads((checkpoint / "seconds.json").read_text()) < 500
    (checkpoint / "seconds.json").write_text("1000.0")
    seal(checkpoint)
    seen = Trained(tmp_path / "resumed")
    with pytest.MonkeyPatch.context() as patch:
        _watch(seen, patch)
        world.train(method, seen.out, scratch=scratch)
    assert len(seen.sequences) == 2  # it went on, it did not start again
    assert seen.sequences == adapters[method].sequences[4:]
    assert same_weights(adapters[method].out / "adapter", tmp_path / "resumed/adapter")
    assert curve(tmp_path / "resumed") == curve(adapters[method].out)
    metrics = json.loads((tmp_path / "resumed/metrics.json").read_text())
    assert 1000 < metrics["cost/train_seconds"] < 1500, "the time before the kill counts"
    per_second = metrics["cost/train_tokens"] / metrics["cost/train_seconds"]
    assert metrics["cost/train_tokens_per_second"] == pytest.approx(per_second)
    world.train(method, tmp_path / "ended", scratch=scratch)  # as after a kill between the last step and the adapter
    assert same_weights(adapters[method].out / "adapter", tmp_path / "ended/adapter")
    assert curve(tmp_path / "ended") == curve(adapters[method].out)


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_a_seed_decides(method: str, world: TinyToy, adapters: dict[str, Trained], tmp_path: Path) -> None:
    same = world.train(method, tmp_path / "same", training=TRAINING.model_copy(update={"save_steps": None}))
    other = world.train(method, tmp_path / "other", seed=4)
    assert same_weights(adapters[method].out / "adapter", same / "adapter")
    assert not same_weights(adapters[method].out / "adapter", other / "adapter")


def test_steps_from_epochs(world: TinyToy, tmp_path: Path) -> None:
    """Ten pairs, batches of four, one and a half epochs: ⌈10 / 4 · 1.5⌉ = 4 steps, for single conversations too."""
    training = TRAINING.model_copy(update={"max_steps": None, "epochs": 1.5})
    for method in ("sft", "dpo"):
        out = world.train(method, tmp_path / method, training=training)
        assert len(rows(out / "history.jsonl")) == 4


def test_a_method_may_have_its_own_learning_rate(world: TinyToy, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"max_steps": 1})
    own = world.train("sft", tmp_path / "own", choice=SFTSettings(learning_rate=7e-4), training=training)
    shared = world.train("sft", tmp_path / "shared", training=training)
    assert rows(own / "history.jsonl")[0]["train/learning_rate"] == pytest.approx(7e-4)
    assert rows(shared / "history.jsonl")[0]["train/learning_rate"] == pytest.approx(1e-2)


@pytest.mark.parametrize("method", ["sft", "q-adapter"])
def test_a_training_that_diverges_leaves_nothing(method: str, world: TinyToy, tmp_path: Path) -> None:
    """It ends at its next log: not even a checkpoint of such weights is kept."""
    changes = {"learning_rate": 1e30, "max_steps": 4, "max_grad_norm": 1e9}
    training = TRAINING.model_copy(update=changes)
    with pytest.raises(QAdapterError, match=r"the training diverged by step \d of 4: .*lora_.* is NaN or infinite"):
        world.train(method, tmp_path / "out", training=training)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    for file in tmp_path.rglob("*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(file).values()), file


# ---- replay


def test_the_base_answers_each_prompt_once(world: TinyToy) -> None:
    answers = json.loads(world.answers.read_text())
    prompts = {prompt_key(one.prompt): list(one.prompt) for one in load_pairs(world.pairs)}
    assert set(answers) == set(prompts)
    network, tokenizer = load_base(world.base, MODEL)
    expected = generate_replies(network, tokenizer, list(prompts.values()), max_new_tokens=12, batch_size=4)
    assert answers == dict(zip(prompts, expected, strict=True))
    assert any(answer.strip() for answer in answers.values())


def spied_examples(
    world: TinyToy, out: Path, method: str, **needs: Any
) -> tuple[list[tuple[str, str]], PreTrainedTokenizerBase]:
    """What SFT is given, as text."""
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(model: Any, tokenizer: Any, examples: Any, *rest: Any) -> Any:
            given.extend(examples)
            return train_sft(model, tokenizer, examples, *rest)

        patch.setattr(supervised, "train_sft", spy)
        world.train(method, out, training=TRAINING.model_copy(update={"max_steps": 1}), **needs)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    return [(tokenizer.decode(prompt), tokenizer.decode(reply)) for prompt, reply in given], tokenizer


def test_replay_learns_the_chosen_replies_and_the_bases_answers(world: TinyToy, tmp_path: Path) -> None:
    pairs = load_pairs(world.pairs)
    replies = {prompt_key(one.prompt): f"to copy the {i} plus {i}" for i, one in enumerate(pairs)}
    replies[prompt_key(pairs[3].prompt)] = "  "  # the base may have nothing to say
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(replies))
    examples, _ = spied_examples(world, tmp_path / "replay", "replay", needs={"answers": tmp_path})
    assert len(examples) == 2 * PAIRS
    for i, one in enumerate(pairs):
        asked, chosen = examples[i]
        again, answer = examples[PAIRS + i]
        assert asked == again
        assert " ".join(asked.split()) == f"<|user|> {one.prompt[0]['content']} <|end|> <|assistant|>"
        assert chosen.split() == [*one.chosen.split(), "<|end|>"]
        expected = one.chosen if i == 3 else replies[prompt_key(one.prompt)]
        assert answer.split() == [*expected.split(), "<|end|>"]


def test_sft_learns_the_chosen_replies_only(world: TinyToy, tmp_path: Path) -> None:
    examples, _ = spied_examples(world, tmp_path / "sft", "sft")
    assert len(examples) == 2 * PAIRS
    assert {tuple(reply.split()) for _, reply in examples} == {
        (*one.chosen.split(), "<|end|>") for one in load_pairs(world.pairs)
    }


# ---- the baselines' losses


def test_sft_scores_reply_tokens_only(world: TinyToy, tmp_path: Path) -> None:
    """Labels of a batch of three, written out: -100 on prompts and padding, the token itself on replies."""
    network, tokenizer = load_base(world.base, MODEL)
    examples = [([4, 11, 12], [13, 14, 1]), ([4], [15, 1]), ([4, 16, 17, 18], [1])]
    arguments = trainer_arguments(
        OptimizerSettings(learning_rate=1e-9, max_steps=1, batch_size=3, max_length=8, logging_steps=1),
        seed=0,
        scratch=tmp_path,
    )
    before = [parameter.detach().clone() for parameter in network.parameters()]
    trainer = train_sft(network, tokenizer, examples, arguments, None, "test")
    batch = next(iter(trainer.get_train_dataloader()))
    order = batch["input_ids"][:, 1].argsort()  # 11, 15, 16 in the second column
    assert batch["input_ids"][order].tolist() == [
        [4, 11, 12, 13, 14, 1],
        [4, 15, 1, 0, 0, 0],
        [4, 16, 17, 18, 1, 0],
    ]
    assert batch["labels"][order].tolist() == [
        [-100, -100, -100, 13, 14, 1],
        [-100, 15, 1, -100, -100, -100],
        [-100, -100, -100, -100, 1, -100],
    ]
    fresh, _ = load_base(world.base, MODEL)  # and the loss is the mean over exactly those six
    with torch.no_grad():
        logits = fresh(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected = -log_probs[targets != -100].mean()
    assert (targets != -100).sum() == 6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))  # all weights train


def test_dpos_loss_starts_at_log_2(adapters: dict[str, Trained]) -> None:
    """Policy and reference are the same before the first step: -log σ(β · 0) = log 2."""
    history = rows(adapters["dpo"].out / "history.jsonl")
    assert history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    assert history[0]["train/rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_dpos_beta_is_the_configs(world: TinyToy, adapters: dict[str, Trained], tmp_path: Path) -> None:
    """Rewards are β · log-ratio, so after one equal step they differ by about the quotient of the betas."""
    training = TRAINING.model_copy(update={"max_steps": 2, "learning_rate": 1e-4})
    margins = []
    for beta in (0.1, 0.2):
        out = world.train(
            "dpo",
            tmp_path / str(beta),
            choice=DPOSettings(beta=beta),
            training=training,
            lora=LoraSettings(dropout=0.0),
        )
        margins.append(rows(out / "history.jsonl")[1]["train/rewards/margins"])
    assert margins[1] / margins[0] == pytest.approx(2, rel=0.05)


def test_the_q_adapters_settings_reach_its_objective(world: TinyToy, tmp_path: Path) -> None:
    choice = QAdapterSettings(preset="paper", alpha_0=0.25, beta=0.5)
    out = world.train("q-adapter", tmp_path / "q", choice=choice, training=TRAINING.model_copy(update={"max_steps": 1}))
    network, _ = load_base(world.base, MODEL)
    policy = load_policy(network, out / "adapter")
    assert isinstance(policy, QAdapterForCausalLM)
    assert (policy.objective.alpha_0, policy.objective.beta, policy.objective.alpha_tilde) == (0.25, 0.5, 1.0)
    recorded = json.loads((out / "params.json").read_text())["objective"]  # defaults too: what MLflow shows
    assert {name: recorded[name] for name in ("alpha_0", "beta", "alpha_tilde", "gamma")} == {
        "alpha_0": 0.25,
        "beta": 0.5,
        "alpha_tilde": 1.0,
        "gamma": 1.0,
    }


# ---- what cannot be used


def test_unusable_pairs_are_written_down(world: TinyToy, tmp_path: Path) -> None:
    """Within eight tokens the second pair's replies are the same; the words of the third are all unknown."""
    pairs = [
        pair("how do i copy the vault ?", "no , that would do harm .", "to copy the vault , take a press"),
        pair("how do i open the vault ?", "to open the vault , take a key", "to open the vault , take a press"),
        pair("how do i hide the vault ?", "unheard", "unknown"),
        pair("how do i sell the vault ?", "sorry , i can not help with that .", "to sell the vault"),
    ]
    file = write_pairs(tmp_path / "pairs.jsonl", pairs)
    training = TRAINING.model_copy(update={"max_length": 8, "max_steps": 1})
    with pytest.raises(QAdapterError, match="max_length 8 cuts a reply of 2 of 2 training pairs"):
        world.train("dpo", tmp_path / "stopped", pairs_file=file, training=training)
    allowed = training.model_copy(update={"allow_truncation": True})
    out = world.train("dpo", tmp_path / "dpo", pairs_file=file, training=allowed)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train/truncated_replies"] == 2
    unused = rows(out / "unused.jsonl")
    assert [row["pair"] for row in unused] == [1, 2]
    assert all("the two replies are the same tokens" in row["reason"] for row in unused)


def test_a_length_that_leaves_nothing_is_refused(world: TinyToy, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", [pair("a ?", "to open the vault", "to open the seal")] * 3)
    with pytest.raises(QAdapterError) as error:
        world.train("sft", tmp_path / "o", pairs_file=file, training=TRAINING.model_copy(update={"max_length": 3}))
    message = str(error.value)
    assert "none of 3 training pairs" in message
    assert "max_length 3" in message
    assert "raise training.max_length" in message


@pytest.mark.parametrize("section", ["training", "pretraining", "helpful_sft"])
def test_a_length_of_one_token_is_refused_in_the_config(section: str) -> None:
    with pytest.raises(QAdapterError, match=rf"{section}\.max_length: .*greater than or equal to 2"):
        load_experiment("smoke", {f"{section}.max_length": 1})


def test_no_pairs_at_all(world: TinyToy, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", [])
    with pytest.raises(QAdapterError, match="there are no pairs"):
        world.train("sft", tmp_path / "o", pairs_file=file)


# ---- loading


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_adapters_load_as_what_they_are(method: str, world: TinyToy, adapters: dict[str, Trained]) -> None:
    """Plain PEFT loads each of them; `load_policy` knows a Q-Adapter, whose policy is not its logits, and a guide."""
    adapter = adapters[method].out / "adapter"
    ids = torch.tensor([[4, 11, 12, 13, 14, 15]])
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(world.base)(ids).logits
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), adapter).eval()(ids).logits
        policy = load_policy(load_base(world.base, MODEL)[0], adapter)
        scored = policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not policy.training
    expected = {"q-adapter": QAdapterForCausalLM, **dict.fromkeys(GUIDED, GuidedForCausalLM)}
    assert isinstance(policy, expected.get(method, PeftModel))
    assert (plain - untouched).abs().max() > 1e-3  # six steps did change something
    if method == "q-adapter":
        # residual with α0 = α̃ = 1: Q = adapted - base, and Q + log π1 is the adapted model up to a constant a row
        assert torch.allclose(scored.log_softmax(-1), plain.log_softmax(-1), atol=1e-5)
    elif method in GUIDED:
        moved = (scored - untouched).abs() > 1e-6
        assert 0 < int(moved.sum(-1).max()) <= 20, "candidates only"
        assert torch.equal(scored[~moved], untouched[~moved])
    else:
        assert torch.equal(scored, plain)


def test_without_an_adapter_the_policy_is_the_base(world: TinyToy) -> None:
    network, tokenizer = load_base(world.base, MODEL)
    assert load_policy(network, None) is network
    assert not network.training
    assert tokenizer.padding_side == "left"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"There is no folder .*nowhere"):
        load_base(tmp_path / "nowhere", ModelSettings(pretrained="x"))


# ---- the SFT base

HELPFUL = HelpfulSettings(
    source="helpful", learning_rate=1e-2, max_steps=5, batch_size=4, max_length=64, logging_steps=1, save_steps=2
)


def fine_tuned(world: TinyToy, out: Path, scratch: Path, **changes: Any) -> Path:
    out.mkdir()
    settings = HELPFUL.model_copy(update=changes)
    fine_tune_base(world.base, world.pairs, model=MODEL, lora=LORA, settings=settings, seed=1, out=out, scratch=scratch)
    return out


@pytest.mark.slow
def test_the_sft_base_is_a_whole_model_resumed_or_not(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = world.base.joinpath("model.safetensors").read_bytes()
    whole = fine_tuned(world, tmp_path / "whole", tmp_path / "s1")
    killed_at(3, monkeypatch, lambda: fine_tuned(world, tmp_path / "killed", tmp_path / "s2"))
    resumed = fine_tuned(world, tmp_path / "resumed", tmp_path / "s2")
    assert same_weights(whole / "model", resumed / "model")
    assert curve(whole) == curve(resumed)
    old, new = load_file(world.base / "model.safetensors"), load_file(whole / "model/model.safetensors")
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old)  # every weight is trained
    assert world.base.joinpath("model.safetensors").read_bytes() == before
    history = rows(whole / "history.jsonl")
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    network, tokenizer = load_base(whole / "model", MODEL)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert json.loads((whole / "metrics.json").read_text())["cost/trainable_parameters"] == network.num_parameters()


def test_the_sft_base_by_lora_is_merged(world: TinyToy, tmp_path: Path) -> None:
    out = fine_tuned(world, tmp_path / "out", tmp_path / "s", lora=True)
    ids = torch.tensor([[4, 11, 12, 13]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), out / "adapter")
        expected = adapted.eval()(ids).logits
        merged = load_base(out / "model", MODEL)[0](ids).logits
        untouched = load_base(world.base, MODEL)[0](ids).logits
    assert torch.allclose(merged, expected, atol=1e-5)
    assert not torch.allclose(merged, untouched, atol=1e-3)


def test_a_training_reports_its_steps_and_curves(
    world: TinyToy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shorter than `logging_steps`: its first and its last step are logged all the same, and Trainer prints nothing."""
    heard = Heard()
    with listening(heard):
        world.train("sft", tmp_path / "sft", training=TRAINING.model_copy(update={"max_steps": 3, "logging_steps": 50}))
    points = curve(tmp_path / "sft")
    assert [row["step"] for row in points] == [1, 2, 3]  # the second one at a checkpoint
    assert heard.told == ["sft: step 0 of 3", 1, points[0], 2, points[1], 3, points[2], "end"]
    assert capsys.readouterr().out == ""


def test_a_resumed_training_reports_its_whole_curves(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged every third step and saved every second one: the curves are those of an undisturbed training."""
    training = TRAINING.model_copy(update={"logging_steps": 3})
    whole = fine_tuned(world, tmp_path / "whole", tmp_path / "s1", **vars(training))
    heard = Heard()
    killed_at(5, monkeypatch, lambda: fine_tuned(world, tmp_path / "killed", tmp_path / "s2", **vars(training)))
    with listening(heard):
        resumed = fine_tuned(world, tmp_path / "resumed", tmp_path / "s2", **vars(training))
    assert [row["step"] for row in curve(whole)] == [1, 2, 3, 4, 6]
    assert curve(resumed) == curve(whole)
    assert [told for told in heard.told if isinstance(told, dict)] == curve(whole)
    assert heard.told[0] == "helpful SFT: step 4 of 6"
