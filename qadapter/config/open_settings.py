"""Open settings: fields of TrainingArguments, of PEFT's LoraConfig and of `from_pretrained`, by their own names.

The libraries' own classes check them when a config is read, before anything runs. What could have no effect here, and
what the project sets itself, is refused with the reason. The libraries are imported only if a config has such a field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from tempfile import gettempdir
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from qadapter.errors import did_you_mean

TRAINER_TWINS = {
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_steps": "max_steps",
    "num_train_epochs": "epochs",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "bf16": "bf16",
    "activation_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing": "gradient_checkpointing",
}
"""Field of TrainingArguments → the same setting under the project's name."""

LORA_TWINS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Field of LoraConfig → the same setting under the project's name."""

NO_EFFECT = {
    "neftune_noise_alpha": "NEFTune adds noise to the embeddings of the frozen base, so that log π1 would be a sample",
    "label_smoothing_factor": "preference objectives have no labels to smooth",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "Liger's kernels replace the loss that each method computes itself",
    ),
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "rows choose their adapter by hooks that a compiled graph does not see",
    ),
    "include_for_metrics": "the measures are computed from the loss, not from logits",
    "batch_eval_metrics": "the measures are computed from the loss, not from logits",
}
"""Fields of TrainingArguments that none of the methods can follow, with the reason."""

_STEPS = "every method takes the same steps on the same tokens; set batch_size and micro_batch_size"
_EVALUATION = (
    "held-out pairs are measured after the training, and eval_steps, not within trainer, evaluates while it runs"
)
_TRACKING = "the run is tracked by the project itself"
_PLACES = "launch decides how a training is spread over processes"
_TRAINER_OWN = {
    **dict.fromkeys(("output_dir", "resume_from_checkpoint", "ignore_data_skip"), "checkpoints have their own folder"),
    **dict.fromkeys(
        ("save_strategy", "save_only_model", "enable_jit_checkpoint"),
        "save_steps sets when a whole checkpoint is saved",
    ),
    **dict.fromkeys(("seed", "data_seed"), "set the seed of the experiment or the command"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "dataloader_drop_last"),
        _STEPS,
    ),
    "average_tokens_across_devices": "losses are means over the whole step already",
    **dict.fromkeys(
        (
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
            *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "prediction_loss_only"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "do_train", "do_eval"),
            *("do_predict", "bf16_full_eval", "fp16_full_eval"),
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        (
            *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            *("hub_revision", "logging_strategy"),
        ),
        _TRACKING,
    ),
    **dict.fromkeys(
        ("use_cpu", "fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config", "local_rank"),
        _PLACES,
    ),
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), "rows are token ids already"),
    "use_cache": "a training needs no cache",
}
_SAMPLING = ("random", "group_by_length")
_WORKERS = ("fork",)  # what some methods make of their rows cannot be sent to a process that is started anew
_OF_OPTIMISERS = ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")

_LORA_OWN = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version"), "the kind of adapter is LoRA"),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "the base is that of the section model"),
    "inference_mode": "the adapter is trained",
}

LOADING = ("attn_implementation", "experts_implementation")
"""Arguments of `from_pretrained` that a config can give under their own names."""
_LATER = "an adapter names its base by folder or hub id only, so later loads would read other weights"
_LOADING_OWN = {
    **dict.fromkeys(("torch_dtype",), "the precision is set by dtype"),
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), "set quantization to int8 or nf4"),
    **dict.fromkeys(
        ("device_map", "max_memory", "offload_folder", "offload_buffers", "tp_plan", "tp_size", "device_mesh"), _PLACES
    ),
    **dict.fromkeys(("subfolder", "variant", "key_mapping"), f"{_LATER}; give a folder with just these weights"),
    "gguf_file": "give the GGUF file itself as pretrained",
    "token": "set HF_TOKEN in the environment",
    **dict.fromkeys(("cache_dir", "proxies"), "set HF_HOME or HTTPS_PROXY in the environment"),
    **dict.fromkeys(("local_files_only", "force_download"), "set HF_HUB_OFFLINE=1 in the environment"),
    **dict.fromkeys(
        ("use_kernels", "allow_all_kernels", "kernel_config"), "kernels of the hub are code that would run"
    ),
    **dict.fromkeys(("use_safetensors", "weights_only"), "only safetensors and GGUF are read"),
    "ignore_mismatched_sizes": "layers without their weights would be random",
    **dict.fromkeys(
        ("config", "state_dict", "generation_config", "adapter_kwargs", "adapter_name", "output_loading_info"),
        "the base is what its files say",
    ),
    "low_cpu_mem_usage": "transformers always loads this way",
}


def with_twins(data: Any, twins: Mapping[str, str], within: str | None = None) -> Any:
    """A section's values with each twin under the project's name.

    Args:
        data: the values as given.
        twins: library's name → project's name.
        within: the key under which the library's names stand; None: beside the project's own.

    Raises:
        ValueError: a setting is given under both names.
    """
    inner = data.get(within) if isinstance(data, Mapping) and within else data
    if not isinstance(inner, Mapping):
        return data
    own = dict(data)
    rest = dict(inner)
    for theirs, ours in twins.items():
        if theirs not in inner or (within is None and theirs == ours):
            continue
        if own.get(ours) is not None:
            name = f"{within}.{theirs}" if within else theirs
            raise ValueError(f"{name} and {ours} are the same setting; give one of them")
        own[ours] = rest.pop(theirs)
    if within is None:
        return {name: value for name, value in own.items() if name not in twins or name in twins.values()}
    return {**own, within: rest}


def trainer_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of `TrainingArguments`, checked.

    Raises:
        ValidationError: unknown names, fields that are refused, or values that the class or its optimiser refuses.
    """
    if not given:
        return given
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)} | {"group_by_length"}
    hints = {**typing.get_type_hints(TrainingArguments), "group_by_length": bool}
    refused = {**NO_EFFECT, **_TRAINER_OWN}
    _refuse(given, fields - TRAINER_TWINS.keys(), refused, "it is no field of TrainingArguments")
    given = _of_types(given, hints)
    negative = [name for name, value in given.items() if isinstance(value, int | float) and value < 0]
    _raise(dict.fromkeys(negative, "expected a number from 0"), given)
    if given.get("train_sampling_strategy", "random") not in _SAMPLING:
        _raise({"train_sampling_strategy": f"expected {', '.join(_SAMPLING)}"}, given)
    if given.get("dataloader_multiprocessing_context", _WORKERS[0]) not in _WORKERS:
        _raise({"dataloader_multiprocessing_context": f"expected {', '.join(_WORKERS)}"}, given)
    _ask(given, _refuse_arguments)
    return given


def lora_fields(shape: Mapping[str, Any], given: dict[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Further fields of `LoraConfig`, checked.

    Args:
        shape: the fields that the project's own settings give.
        given: the further ones.
        own: the project's own names, for the suggestion.

    Raises:
        ValidationError: unknown names, fields that are refused, or values that the class refuses.
    """
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    _refuse(given, fields, _LORA_OWN, "it is no field of peft's LoraConfig either", own)
    given = _of_types(given, typing.get_type_hints(LoraConfig))
    if given.get("init_lora_weights") is False:
        _raise({"init_lora_weights": "a new adapter has to start as the base: expected true or gaussian"}, given)
    _ask(given, lambda values: LoraConfig(**shape, **values))
    return given


def loading_fields(given: dict[str, Any], own: Iterable[str], *, from_scratch: bool) -> dict[str, Any]:
    """Further arguments of `from_pretrained`, checked.

    Args:
        given: the arguments.
        own: the project's own names, for the suggestion.
        from_scratch: whether the base will be a Llama of the project's own making.

    Raises:
        ValidationError: unknown names, arguments that are refused, or values that no model takes.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    beside = (
        f"of from_pretrained's arguments {' and '.join(LOADING)} can be given; a value of the base's config is changed "
        "in its config.json, where every later load finds it"
    )
    _refuse(given, set(LOADING), _LOADING_OWN, beside, own)
    given = _of_types(given, {"attn_implementation": str | dict[str, str], "experts_implementation": str})
    for name, value in given.items():
        if any("/" in one for one in (value.values() if isinstance(value, dict) else [value])):
            _raise({name: "kernels of the hub are code that would run; give one that is installed"}, given)
    if from_scratch and "experts_implementation" in given:
        _raise({"experts_implementation": "a model from scratch has no experts"}, given)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config: Any = MixtralConfig if "experts_implementation" in given else LlamaConfig
    with torch.device("meta"):
        _ask(given, lambda values: AutoModelForCausalLM.from_config(config(vocab_size=8, **sizes), **values))
    return given


def for_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a `TrainingArguments` of the installed transformers takes them: `group_by_length` got another name."""
    values = dict(given)
    if values.pop("group_by_length", False):
        values["train_sampling_strategy"] = "group_by_length"
    return values


def _refuse_arguments(values: Mapping[str, Any]) -> None:
    """Make the arguments, and the optimiser and the schedule that they name, as a training would."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments, get_scheduler

    cpu = not torch.cuda.is_available()
    if cpu and values.get("fp16"):
        raise ValueError("half precision needs a GPU; bf16 works without one")
    arguments = TrainingArguments(output_dir=gettempdir(), report_to="none", use_cpu=cpu, **for_arguments(values))
    model: Any = torch.nn.Linear(2, 2)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    defaults: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(arguments)}
    for name in _OF_OPTIMISERS:
        if getattr(arguments, name) == defaults[name]:
            continue
        try:
            without = Trainer.get_optimizer_cls_and_kwargs(
                dataclasses.replace(arguments, **{name: defaults[name]}), model
            )
        except Exception:
            continue
        if without == (kind, options):
            raise ValueError(f"the optimiser {getattr(arguments.optim, 'value', arguments.optim)} takes no {name}")
    workers = arguments.dataloader_num_workers
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        persistent_workers=arguments.dataloader_persistent_workers,
        multiprocessing_context=arguments.dataloader_multiprocessing_context if workers else None,
    )
    if arguments.optim_target_modules is None and not any(name in options for name in ("params", "model")):
        optimizer = kind(model.parameters(), **options)
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )


def _refuse(
    given: Mapping[str, Any],
    known: set[str],
    refused: Mapping[str, str],
    otherwise: str,
    own: Iterable[str] = (),
) -> None:
    problems = {}
    for name in given:
        if name in refused:
            problems[name] = f"cannot be set: {refused[name]}"
        elif name not in known:
            own = list(own)
            near = did_you_mean(name, [*own, *sorted(known - refused.keys())])
            if not near.endswith("?"):
                near = (f"; known: {', '.join(own)}" if own else "") + f"; {otherwise}"
            problems[name] = f"unknown key{near}"
    _raise(problems, given)


def _of_types(given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the types of their fields; YAML reads `1e-8` as text."""
    found, problems = {}, {}
    for name, value in given.items():
        adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        try:
            found[name] = adapter.validate_python(value)
        except ValidationError as error:
            problems[name] = error.errors()[0]["msg"]
    _raise(problems, given)
    return found


def _ask(given: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> None:
    """Let the library's own class judge; of several fields, name the one without which it agrees."""
    reason = _complaint(build, given)
    if reason is None:
        return
    guilty = [name for name in given if _complaint(build, {k: v for k, v in given.items() if k != name}) is None]
    _raise({guilty[0] if guilty else next(iter(given)): reason}, given)


def _complaint(build: Callable[[dict[str, Any]], Any], values: dict[str, Any]) -> str | None:
    try:
        with _quiet():
            build(values)
    except Exception as error:  # the libraries raise almost every kind here, and all of them are about these values
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def located(key: str) -> Iterator[None]:
    """Within the block problems are those of this key."""
    try:
        yield
    except ValidationError as error:
        details = [
            InitErrorDetails(
                type=PydanticCustomError("open_setting", "{text}", {"text": each["msg"]}),
                loc=(key, *each["loc"]),
                input=each["input"],
            )
            for each in error.errors()
        ]
        raise ValidationError.from_exception_data("open settings", details) from None


def _raise(problems: Mapping[str, str], given: Mapping[str, Any]) -> None:
    if problems:
        details = [
            InitErrorDetails(
                type=PydanticCustomError("open_setting", "{text}", {"text": text}), loc=(name,), input=given[name]
            )
            for name, text in problems.items()
        ]
        raise ValidationError.from_exception_data("open settings", details)
