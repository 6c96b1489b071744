"""Options of trainer and evaluation reach every method of the table, or are refused with the reason."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from qadapter.config.experiment import load_experiment
from qadapter.config.open_settings import _TRAINER_OWN, NO_EFFECT, TRAINER_TWINS
from qadapter.config.training import AdapterTraining
from qadapter.errors import QAdapterError
from qadapter.methods.method import Method
from qadapter.methods.table import METHODS
from qadapter.preferences.tokenize import EncodedPair
from qadapter.training import sampling
from tests.support.tiny_toy import NO_DROPOUT, TinyToy, make_tiny_toy, rows

GIVEN: dict[str, Any] = {
    "optim": "sgd",
    "max_grad_norm": 1e-9,
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "group_by_length": True,
    "torch_empty_cache_steps": 1,
    "logging_first_step": False,
    "logging_nan_inf_filter": False,
    "log_on_each_node": False,
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": True,
    "save_on_each_node": True,
    "save_total_limit": 1,
    "dataloader_pin_memory": False,
    "dataloader_in_order": False,
    "skip_memory_metrics": False,
}
ELSEWHERE = {
    # of other optimisers, of a GPU, of several processes, or another name of one above
    *("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "fp16", "tf32"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "train_sampling_strategy", "activation_checkpointing_kwargs"),
    # workers of the data loader, which need a process each
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    "dataloader_multiprocessing_context",
    # what would change the tests behind this one, or does something in a resumed training only
    *("full_determinism", "debug", "restore_callback_states_from_checkpoint", "include_num_input_tokens_seen"),
}
REFUSABLE = {
    "eval_steps": ("training.eval_steps", 2),
    "group_by_length": ("trainer.group_by_length", True),
    "include_num_input_tokens_seen": ("trainer.include_num_input_tokens_seen", "all"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("options"), steps=20)


def test_every_option_is_given_or_refused() -> None:
    """So that a field of a later transformers is looked at."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    accepted = fields - TRAINER_TWINS.keys() - NO_EFFECT.keys() - _TRAINER_OWN.keys()
    assert accepted == (GIVEN.keys() - {"group_by_length"}) | ELSEWHERE


def prompt_and_replies(row: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of a row's prompt, and of the replies that a step reads behind it."""
    pair = row[0] if isinstance(row, tuple) else row
    if isinstance(pair, EncodedPair):
        return pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids]
    if "labels" in pair:
        start = sum(label == -100 for label in pair["labels"])
        return pair["input_ids"][:start], [pair["input_ids"][start:]]
    if "chosen_labels" in pair:
        start = sum(label == -100 for label in pair["chosen_labels"])
        return pair["chosen_input_ids"][:start], [pair[f"{side}_input_ids"][start:] for side in ("chosen", "rejected")]
    return pair["prompt_ids"], [
        ids for name, ids in pair.items() if name in ("chosen_ids", "rejected_ids", "completion_ids")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_options_reach_the_method(
    method: Method[Any], world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD with a gradient clipped to 1e-9 does not move; rows come by length; pairs set aside are only evaluated."""
    given = {name: value for name, value in GIVEN.items() if name not in method.refuses}
    aside = {} if "eval_steps" in method.refuses else {"eval_steps": 2, "eval_pairs": 3}
    training = AdapterTraining(
        learning_rate=1e-2,
        max_steps=2,
        batch_size=4,
        micro_batch_size=2,
        max_length=64,
        logging_steps=1,
        gradient_checkpointing=True,
        trainer=given,
        **aside,
    )
    world.needs_of(method.name)
    seen: list[tuple[Trainer, Any]] = []
    orders: list[list[int]] = []
    step = Trainer.training_step

    def watched(trainer: Trainer, model: torch.nn.Module, inputs: Any, *rest: Any) -> Any:
        seen.append((trainer, inputs))
        return step(trainer, model, inputs, *rest)

    def longest_first(lengths: list[int], *_: Any, **__: Any) -> list[int]:
        orders.append(sorted(range(len(lengths)), key=lambda place: -lengths[place]))
        return orders[-1]

    monkeypatch.setattr(Trainer, "training_step", watched)
    monkeypatch.setattr(sampling, "get_length_grouped_indices", longest_first)
    out = world.train(method.name, tmp_path / "out", training=training, lora=NO_DROPOUT)

    trainer = seen[0][0]
    asked = {name: value for name, value in given.items() if name != "group_by_length"}
    assert {name: getattr(trainer.args, name) for name in asked} == asked
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)  # type: ignore[attr-defined]
    checkpointed = [m for m in trainer.model.modules() if getattr(m, "gradient_checkpointing", False)]  # type: ignore[union-attr]
    assert checkpointed
    file = out / "adapter" / "adapter_model.safetensors"
    moved = [float(value.abs().max()) for name, value in load_file(file).items() if "lora_B" in name]
    assert method.group == "guided" or 0 < max(moved) < 1e-10, "AdamW would move by its learning rate"

    if "group_by_length" not in method.refuses:
        data: Any = trainer.train_dataset
        lengths = trainer._get_train_sampler()._lengths  # type: ignore[union-attr]
        start = 0
        for _, inputs in seen[:2]:
            masks = [inputs[name] for name in inputs if name.endswith("attention_mask") and not name.startswith("KL_")]
            if isinstance(data[0], int):  # a number of a row; of SPIN's pairs the second reply is made anew
                read = masks[0][: len(masks[0]) // 2] if method.name == "spin" else masks[0]
                count = len(read)
                expected = sum(lengths[place] for place in orders[0][start : start + count])
            else:
                read = torch.cat([mask.flatten() for mask in masks])
                each = len(prompt_and_replies(data[0])[1])
                count = sum(len(mask) for mask in masks) // each
                taken = [prompt_and_replies(data[place]) for place in orders[0][start : start + count]]
                expected = sum(len(prompt) + len(reply) for prompt, replies in taken for reply in replies)
            assert int(read.sum()) == expected
            start += count

    if aside:
        evaluated = [row for row in rows(out / "history.jsonl") if "eval/loss" in row]
        assert [row["step"] for row in evaluated] == [0, 2]
        assert all(math.isfinite(row["eval/loss"]) for row in evaluated)
        sides: list[Any] = [trainer.train_dataset, trainer.eval_dataset]
        kept, held = ({tuple(prompt_and_replies(side[i])[0]) for i in range(len(side))} for side in sides)
        assert held
        assert not kept & held


def test_what_a_method_cannot_follow_is_refused_when_it_is_read() -> None:
    found = 0
    for method in METHODS:
        for setting, reason in method.refuses.items():
            key, value = REFUSABLE[setting]
            with pytest.raises(QAdapterError, match=re.escape(f"{method.name} cannot follow it ({reason})")):
                load_experiment("smoke", {"methods.run": ["sft", method.name], key: value})
            found += 1
    assert found == 10
    load_experiment("smoke", {"methods.run": ["grpo"], "trainer.group_by_length": False})
    load_experiment("smoke", {"methods.run": ["sft", "kto"], "trainer.group_by_length": True, "training.eval_steps": 2})


def test_idle_options_are_refused() -> None:
    for given, expected in (
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "no effect without gradient_checkpointing"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "the optimiser sgd takes no adam_beta1"),
        ({"optim_target_modules": ["q_proj"]}, "takes no optim_target_modules"),
        ({"torch_compile_mode": "default"}, "hooks that a compiled graph does not see"),
        ({"liger_kernel_config": {"rope": True}}, "the loss that each method computes itself"),
        ({"enable_jit_checkpoint": True}, "save_steps sets when a whole checkpoint is saved"),
        ({"dataloader_multiprocessing_context": "spawn"}, "expected fork"),
    ):
        with pytest.raises(QAdapterError, match=re.escape(expected)):
            load_experiment("smoke", {"training.trainer": given})
