"""Fields of TrainingArguments, LoraConfig and from_pretrained by their own names: taken, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from qadapter.command.flags import read_options
from qadapter.command.options import GenerateOptions, TrainOptions
from qadapter.config.experiment import Experiment, load_experiment
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.planning.preflight import check_experiment
from qadapter.policy.loading import lora_config
from tasks.train import keyed

PLAIN = load_experiment("smoke")


def refused(overrides: dict[str, Any]) -> str:
    with pytest.raises(QAdapterError) as error:
        load_experiment("smoke", overrides)
    (line,) = str(error.value).splitlines()[1:]
    return line.strip()


def test_a_config_takes_fields_of_the_three_classes() -> None:
    found = load_experiment(
        "smoke",
        {
            "trainer": {"optim": "adamw_torch", "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_epsilon": "1e-7"},
            "training.trainer": {"max_grad_norm": 0.25},
            "lora.use_rslora": True,
            "lora.rank_pattern": {"q_proj": 4},
            "model.attn_implementation": "eager",
        },
    )
    # the section's own value wins; a twin goes to the project's own field; YAML's text is a number
    assert found.training.trainer == {"optim": "adamw_torch", "max_grad_norm": 0.25, "adam_epsilon": 1e-7}
    assert found.training.weight_decay == 0.1
    config = lora_config(found.lora)
    assert (config.use_rslora, config.rank_pattern, config.r) == (True, {"q_proj": 4}, 8)
    assert found.model.loading() == {"attn_implementation": "eager"}
    again = Experiment.model_validate(found.model_dump(mode="json", by_alias=True))
    assert again == found


def test_only_what_is_set_is_part_of_a_key() -> None:
    def keys(found: Experiment) -> list[set[str]]:
        return [set(keyed(found.training)), set(found.lora.model_dump()), set(found.model.key())]

    plain = keys(PLAIN)
    assert not any("trainer" in found for found in plain)
    assert plain[1:] == [{"rank", "alpha", "dropout", "target_modules"}, {"quantization", "dtype", "revision"}]
    given = {"trainer.optim": "sgd", "lora.use_dora": True, "model.attn_implementation": "sdpa"}
    found = keys(load_experiment("smoke", given))
    assert [new - old for new, old in zip(found, plain, strict=True)] == [
        {"trainer"},
        {"use_dora"},
        {"attn_implementation"},
    ]
    pretrained = ModelSettings(pretrained="base")
    rounded = ModelSettings(pretrained="base", matmul_precision="medium")
    assert set(rounded.key()) - set(pretrained.key()) == {"matmul_precision"}
    twin = load_experiment("smoke", {"trainer.weight_decay": 0.5})
    assert keyed(twin.training) == keyed(load_experiment("smoke", {"training.weight_decay": 0.5}).training)
    assert keyed(PLAIN.training) == keyed(load_experiment("smoke", {"trainer": {}}).training)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.optm", "sgd", "training.trainer.optm: unknown key, did you mean 'optim'?"),
        ("trainer.xxyyzz", 1, "training.trainer.xxyyzz: unknown key; it is no field of TrainingArguments"),
        ("trainer.optim", "sdg", "training.trainer.optim: sdg is not a valid OptimizerNames"),
        ("trainer.optim", "galore_adamw", "training.trainer.optim: You need to install `galore_torch`"),
        ("trainer.max_grad_norm", "abc", "training.trainer.max_grad_norm: Input should be a valid number"),
        ("trainer.max_grad_norm", float("nan"), "Input should be a finite number"),
        ("trainer.max_grad_norm", -1.0, "expected a number from 0"),
        ("trainer.adam_beta1", 2.0, "training.trainer.adam_beta1: Invalid beta parameter"),
        ("trainer.lr_scheduler_kwargs", {"cycles": 2}, "training.trainer.lr_scheduler_kwargs: "),
        ("trainer.optim_args", "a=1", "takes no optim_args"),
        ("trainer.dataloader_prefetch_factor", 2, "can only be set when data is loaded in a different process"),
        ("trainer.train_sampling_strategy", "batch_rebalance", "expected random, group_by_length"),
        ("trainer.neftune_noise_alpha", 5, "NEFTune adds noise to the embeddings of the frozen base"),
        ("trainer.label_smoothing_factor", 0.1, "preference objectives have no labels to smooth"),
        ("trainer.output_dir", "x", "checkpoints have their own folder"),
        ("trainer.seed", 3, "set the seed of the experiment"),
        ("trainer.per_device_train_batch_size", 3, "set batch_size and micro_batch_size"),
        ("trainer.hub_model_id", "x", "the run is tracked by the project itself"),
        ("trainer.hub_token", "x", "its name is that of a secret"),
        ("trainer.eval_strategy", "steps", "held-out pairs are measured after the training"),
        ("trainer.learning_rate", 1.0, "trainer.learning_rate and learning_rate are the same setting"),
        ("trainer.learning_rate", "x", "trainer.learning_rate and learning_rate are the same setting"),
        ("trainer", 3, "trainer: Input should be a valid dictionary"),
        ("lora.use_rslor", True, "lora.use_rslor: unknown key, did you mean 'use_rslora'?"),
        ("lora.use_rslora", "maybe", "lora.use_rslora: Input should be a valid boolean"),
        ("lora.layers_to_transform", [0], "lora.layers_to_transform: `layers_to_transform` cannot be used"),
        ("lora.init_lora_weights", False, "a new adapter has to start as the base"),
        ("lora.r", 4, "r and rank are the same setting"),
        ("lora.task_type", "SEQ_CLS", "the kind of adapter is LoRA"),
        ("model.attn_implementation", "fast", 'model.attn_implementation: Specified `attn_implementation="fast"`'),
        ("model.attn_implementation", "flash_attention_2", "FlashAttention2"),
        ("model.attn_implementation", "someone/kernel", "kernels of the hub are code that would run"),
        ("model.experts_implementation", "eager", "a model from scratch has no experts"),
        ("model.max_memory", "9GB", "launch decides how a training is spread"),
        ("model.token", "x", "its name is that of a secret"),
        ("model.token", True, "set HF_TOKEN in the environment"),
        ("model.rope_parameters", {"factor": 2}, "a value of the base's config is changed in its config.json"),
    ],
)
def test_what_is_refused_and_why(key: str, value: Any, expected: str) -> None:
    assert expected in refused({key: value})


def test_an_adapter_that_changes_the_base_is_refused_before_a_run(tmp_path: Any) -> None:
    for field, value in {"bias": "all", "init_lora_weights": "pissa", "use_qalora": True}.items():
        experiment = load_experiment("smoke", {f"lora.{field}": value})
        with pytest.raises(QAdapterError, match=f"lora has {field}="):
            check_experiment(experiment, tmp_path, fixed={}, rows=1, downloads=tmp_path)


# ---- the command -------------------------------------------------------------------------------------------------


REQUIRED = {"base": "b", "data": "d", "output": "o"}


def test_the_command_takes_them_as_mapping_or_as_assignments() -> None:
    given = {**REQUIRED, "trainer": "optim=adafactor,weight_decay=0.1", "lora": "{use_rslora: true, r: 4}"}
    found = read_options(TrainOptions, {**given, "model": "attn_implementation=eager"}, None)
    assert (found.trainer, found.weight_decay) == ({"optim": "adafactor"}, 0.1)
    assert (found.lora, found.lora_rank) == ({"use_rslora": True}, 4)
    assert found.lora_settings().fields()["use_rslora"] is True
    assert found.model_settings().loading() == {"attn_implementation": "eager"}
    written = found.model_dump(mode="json")  # what train.yaml holds is its own --config
    assert read_options(TrainOptions, written, None) == found
    assert "trainer" not in read_options(TrainOptions, REQUIRED, None).model_dump()
    assert read_options(GenerateOptions, {"adapter": ["a"], "model": "attn_implementation=eager"}, None).model


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"trainer": "optm=sgd"}, "--trainer.optm: unknown key, did you mean 'optim'?"),
        ({"trainer": "{optim: [}"}, "is not YAML"),
        ({"trainer": "optim=[a"}, "is not YAML"),
        ({"trainer": "optim"}, "a mapping such as"),
        ({"trainer": "weight_decay=0.1", "weight_decay": "0.2"}, "trainer.weight_decay and weight_decay are the same"),
        ({"lora": "r=4", "lora_rank": "8"}, "lora.r and lora_rank are the same setting"),
        ({"lora": "use_rslor=true"}, "--lora.use_rslor: unknown key, did you mean 'use_rslora'?"),
        ({"lora": "layers_to_transform=[0]"}, "--lora.layers_to_transform: `layers_to_transform` cannot be used"),
        ({"model": "attn_implementation=fast"}, "--model.attn_implementation: Specified"),
        ({"model": "attn_implementation=3"}, "--model.attn_implementation: Input should be a valid string"),
    ],
)
def test_the_command_refuses_them_by_name(given: dict[str, str], expected: str) -> None:
    with pytest.raises(QAdapterError) as error:
        read_options(TrainOptions, {**REQUIRED, **given}, None)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
