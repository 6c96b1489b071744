"""The one way to load a base: its config, tokenizer and weights, from a folder, a hub id or a GGUF file.

A base is what its files say, or it is refused: its own quantisation is used, tensors that are missing, left over or of
another shape are an error, no code that comes with a checkpoint runs unless asked for, and no pickle is read.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qadapter.errors import QAdapterError, first_reason
from qadapter.policy.architectures import refuse_architecture
from qadapter.policy.checkpoint import (
    refuse_idle_options,
    refuse_other_tensors,
    refuse_own_adapter,
    refuse_token_ids,
    refuse_unknown_quantization,
    refuse_whole_numbers,
    with_adapter,
)
from qadapter.policy.fingerprint import remember
from qadapter.policy.gguf import gguf_file
from qadapter.policy.probe import refuse_misbehaviour
from qadapter.preferences.tokenize import limit_ids

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of them makes a folder that of a tokenizer."""


def load_config(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a base.

    Args:
        model: a folder, a hub id, a GGUF file or a folder that holds one.
        revision: of a base of the hub.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        QAdapterError: it cannot be reached or read, or is of an architecture that cannot be customised.
    """
    place, gguf = _located(model)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main", **gguf}
    try:
        if gguf:
            file = Path(place) / gguf["gguf_file"]
            return copy.deepcopy(_gguf_config(place, file.name, file.stat().st_mtime_ns))
        config: PretrainedConfig = AutoConfig.from_pretrained(place, **options)
    except Exception as error:  # the libraries raise almost every kind here, and all of them are about these files
        raise _unloadable(model, error) from error
    return config


@functools.lru_cache(maxsize=2)
def _gguf_config(folder: str, name: str, _written: int) -> PretrainedConfig:
    """The config in a GGUF file. Reading it takes half a minute where the vocabulary is large, and many places ask."""
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=name)
    return config


def load_tokenizer(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, padding on the left, as generation needs it.

    Args:
        model, revision, trust_remote_code: as `load_config` takes them.

    Raises:
        QAdapterError: there is none, it cannot be read, or its chat template is no template.
    """
    alone = any((Path(model).expanduser() / name).is_file() for name in TOKENIZER_FILES)  # in an adapter's folder, say
    place, gguf = (str(Path(model).expanduser()), {}) if alone else _located(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, padding_side="left", trust_remote_code=trust_remote_code, revision=revision or "main", **gguf
        )
        tokenizer("a")  # some values of its config are looked at only now
    except Exception as error:  # as in `load_config`
        raise _unloadable(model, error, "its tokenizer") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _refuse_split_tokens(tokenizer, model)
    _refuse_broken_template(tokenizer, model)
    return tokenizer


def load_network(
    model: str | Path,
    *,
    architecture: Any = AutoModelForCausalLM,
    dtype: str | torch.dtype = "auto",
    quantization: object | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The weights of a base, all of them, in eval mode.

    Args:
        model, revision, trust_remote_code: as `load_config` takes them.
        architecture: transformers' `Auto…` class. Another head than the vocabulary's starts random.
        dtype: of the weights; `auto` for what the files hold.
        quantization: a config of transformers' for weights that are not quantised yet.
        options: of `from_pretrained`, and values to set in the config. `torch_dtype` and `quantization_config` stand
            for `dtype` and `quantization`.

    Raises:
        QAdapterError: it cannot be loaded, lacks tensors or holds others, needs a package that is not installed, or
            is of an architecture that cannot be customised. The message says which.
    """
    place, gguf = _located(model)
    dtype, quantization = options.pop("torch_dtype", dtype), options.pop("quantization_config", quantization)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    causal = architecture is AutoModelForCausalLM
    if causal:
        refuse_architecture(config, str(model))
    refuse_unknown_quantization(config, model, quantization)
    if quantization is not None:  # never passed as None: that would make transformers ignore the files' own
        options["quantization_config"] = quantization
    # Tensors of another shape: so the loading report names them, and `refuse_other_tensors` refuses them
    options = {"use_safetensors": True, **options, **gguf, "ignore_mismatched_sizes": True}
    if (generation := Path(place) / "generation_config.json").is_file():
        # transformers would leave a broken one out, and its end tokens with it
        refuse_token_ids(read_json_object(generation), generation)
    try:
        network, report = architecture.from_pretrained(
            place,
            dtype=getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except QAdapterError:
        raise
    except Exception as error:  # as in `load_config`
        raise _unloadable(model, error) from error
    refuse_own_adapter(network, model)
    refuse_other_tensors(network, report, model, causal)
    refuse_whole_numbers(network, model)
    refuse_idle_options(network, options, model)
    network = network.eval()
    if gguf:
        network = _plain(network, model)
    if causal:
        head: Any = network.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_as_rows)
        refuse_misbehaviour(network, str(model))
        remember(network)
    return network


def _as_rows(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The head's input, contiguous, so that torch takes one product of all rows.

    Of prompts, generation wants the last position's logits: a slice [B, 1, H], which torch multiplies batch by batch
    with a frozen weight [V, H]. With `matmul_precision: medium` oneDNN first copies the weight B times: 5.4 GB and 21 s
    for 8 prompts of Gemma 3 270M, instead of 0.1 s.
    """
    return tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in given)


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel) -> PreTrainedTokenizerBase:
    """A tokenizer for this base: the one given, or a copy where the base has no embedding for some of its tokens.

    The copy pads with a token that the base has (padding is masked, so any will do), and texts with a token that it
    lacks have no token ids (`tokenize.text_ids`).
    """
    embeddings: Any = network.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    if max(tokenizer.get_vocab().values(), default=0) < size:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    limit_ids(tokenizer, size)
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= size:
        eos = tokenizer.eos_token_id
        other = eos if eos is not None and eos < size else 0
        log.warning(
            "The padding token %r has id %d, but the base has only %d embeddings; %r pads in its place.",
            tokenizer.pad_token,
            pad,
            size,
            tokenizer.convert_ids_to_tokens(other),
        )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    return tokenizer


# ---- files ----------------------------------------------------------------------------------------------------------


def _located(model: str | Path) -> tuple[str, dict[str, str]]:
    """What to call `from_pretrained` with: folder or hub id, and `gguf_file` if that is what the base is.

    Raises:
        QAdapterError: a folder without a model, or with several GGUF files.
    """
    path = Path(model).expanduser()
    if (file := gguf_file(path)) is not None:
        return str(file.parent), {"gguf_file": file.name}
    if path.is_file():
        raise QAdapterError(
            f"The base {path} is a file of unknown kind. Give a folder with safetensors, or a .gguf file."
        )
    if not path.is_dir():
        if path.is_absolute() or str(model).startswith((".", "~")):
            raise QAdapterError(f"There is no folder {path}. Give a folder with a model, a GGUF file or a hub id.")
        return str(model), {}
    if not (path / "config.json").is_file():
        raise QAdapterError(
            f"the folder {path} is no model: it has no config.json; give one that save_pretrained wrote"
        )
    if (path / "adapter_config.json").is_file():
        raise with_adapter(path)
    return str(path), {}


def _plain(network: PreTrainedModel, model: str | Path) -> PreTrainedModel:
    """A model out of a GGUF file as one that can be trained and saved: its weights were made plain when read."""
    config = network.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(network)(config)
    fresh.load_state_dict(network.state_dict(), assign=True)
    for name, buffer in network.named_buffers():  # those that no state dict holds
        owner, _, own = name.rpartition(".")
        fresh.get_submodule(owner)._buffers[own] = buffer
    fresh.tie_weights()
    fresh.generation_config = network.generation_config
    fresh.config.name_or_path = fresh.name_or_path = str(model)
    return fresh.eval()


# ---- refusals -------------------------------------------------------------------------------------------------------


def _unloadable(model: str | Path, error: Exception, what: str | None = None) -> QAdapterError:
    """One sentence for what the libraries raise, with its cause in their own words."""
    reason = first_reason(error)
    if isinstance(error, KeyError):
        reason = f"unknown key {reason}"
    part = f" ({what})" if what else ""
    if "trust_remote_code" in str(error):
        return QAdapterError(
            f"the model {str(model)!r} brings code of its own{part}, and none of it was run. If you trust it, turn "
            "trust_remote_code on."
        )
    lacking = "pip install" in str(error) and "does not recognize this architecture" not in str(error)
    if isinstance(error, ImportError) or lacking:
        return QAdapterError(f"the model {str(model)!r} cannot be loaded{part} without a package: {reason}")
    return QAdapterError(
        f"the model {str(model)!r} could not be loaded{part} ({reason}); give a folder with "
        "safetensors weights, a GGUF file or a hub id, and for a gated model set HF_TOKEN"
    )


def _refuse_split_tokens(tokenizer: PreTrainedTokenizerBase, model: str | Path) -> None:
    if getattr(tokenizer, "split_special_tokens", False):
        raise QAdapterError(
            f"the tokenizer of {str(model)!r} splits special tokens in texts (split_special_tokens), so that turns and "
            "their ends would be letters. Set it to false in tokenizer_config.json."
        )


def _refuse_broken_template(tokenizer: PreTrainedTokenizerBase, model: str | Path) -> None:
    templates: Any = getattr(tokenizer, "chat_template", None) or {}
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}], chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateSyntaxError as error:
            raise QAdapterError(
                f"the chat template of {str(model)!r} is broken (line {error.lineno}: {error.message}); correct it in "
                "chat_template.jinja or tokenizer_config.json"
            ) from error
        except Exception:  # it refuses this conversation, which is for each row to find out
            continue


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        QAdapterError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QAdapterError(f"{file} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise QAdapterError(f"{file} holds no JSON object.")
    return content
