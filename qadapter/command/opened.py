"""From the flags that name a policy to the policy: base, one or several adapters, dials."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.command.sections import RENDERING, BaseOptions, PolicyOptions
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.policy.adapters import adapter_place, base_of
from qadapter.policy.base import fit_tokenizer
from qadapter.policy.files import GUIDE_FILE, SETTINGS_FILE, read_settings, refuse_guide
from qadapter.policy.gguf import gguf_file
from qadapter.policy.guided import GuidedForCausalLM, guide_weight
from qadapter.policy.loading import load_base
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.ranges import check_dials, check_weights
from qadapter.policy.tokenizer import RECORD, difference, policy_tokenizer, training_record, unreadable_record
from qadapter.preferences.template_settings import configured

if TYPE_CHECKING:
    from qadapter.command.options import DialOptions

__all__ = ["RECORD", "as_base", "dials", "note", "open_adapters", "open_base", "open_policy", "training_record"]


def note(text: str) -> None:
    """Say something that is no result: on stderr."""
    print(text, file=sys.stderr, flush=True)


Policy = QAdapterForCausalLM | GuidedForCausalLM


def open_policy(options: PolicyOptions) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy of any method, ready to score and to generate, and its tokenizer.

    Args:
        options: as in `open_adapters`.

    Raises:
        QAdapterError: as there; flags that an adapter which guides its base's decoding (VAS, PITA) cannot follow.
    """
    first = Path(options.adapter[0]).expanduser()
    if not (first / GUIDE_FILE).is_file():
        return open_adapters(options)
    flags = {"--weights": options.weights, "--alpha-0": options.alpha_0, "--alpha-tilde": options.alpha_tilde}
    asked = [flag for flag, value in flags.items() if value is not None]
    if len(options.adapter) > 1 or asked:
        raise QAdapterError(
            f"{first} guides its base's decoding ({GUIDE_FILE}) and is used alone, without "
            f"{', '.join(asked) or 'a second --adapter'}; its dial is --dial q-weight=0.5"
        )
    if options.dial is not None:
        guide_weight(options.dial)  # before a large base is read
    network, tokenizer = _base_and_tokenizer(options, first)
    policy = GuidedForCausalLM.from_pretrained(first, network, allow_base_mismatch=options.allow_base_mismatch)
    policy.dial = options.dial or policy.dial
    return policy, tokenizer


def open_adapters(options: PolicyOptions) -> tuple[QAdapterForCausalLM, PreTrainedTokenizerBase]:
    """The policy of one or several adapters that are it themselves, and its tokenizer.

    Args:
        options: folders, weights, dials, base. What is not given of the base's numerics is as in training.

    Returns:
        A `QAdapterForCausalLM`; `plain` for a folder with a plain PEFT adapter (SFT, DPO, replay).

    Raises:
        QAdapterError: no adapter there, no base found, or flags that do not fit the adapters.
    """
    first, *others = (Path(folder).expanduser() for folder in options.adapter)
    for folder in (first, *others):
        require_adapter(folder)
        refuse_guide(folder)
    weights = options.weights or (1 / len(options.adapter),) * len(options.adapter)
    if len(weights) != len(options.adapter):
        raise QAdapterError(
            f"--weights has {len(weights)} numbers for {len(options.adapter)} adapters; give one for each adapter"
        )
    if options.alpha_0 is not None or options.alpha_tilde is not None:  # before a large base is read
        check_dials(options.alpha_0 or 0.0, 1.0 if options.alpha_tilde is None else options.alpha_tilde)
    check_weights(dict(zip(map(str, options.adapter), weights, strict=True)))
    network, tokenizer = _base_and_tokenizer(options, first)
    policy = QAdapterForCausalLM.from_pretrained(first, network, allow_base_mismatch=options.allow_base_mismatch)
    if policy.plain and (options.alpha_0 is not None or options.alpha_tilde is not None):
        raise QAdapterError(
            f"{first} is a plain PEFT adapter (it has no {SETTINGS_FILE}); --alpha-0 and --alpha-tilde are for "
            "Q-Adapters. Its dial is --dial: scale=0.5 or q-weight=0.5"
        )
    _compose(policy, others, weights, options.allow_base_mismatch)
    _turn(policy, options)
    return policy, tokenizer


def _base_and_tokenizer(options: PolicyOptions, first: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base = base_place(options)
    network, of_base = open_base(base, base_settings(options, base, first), say=False)
    return network, _tokenizer(options, of_base, network)


def base_settings(options: PolicyOptions | DialOptions, base: str, adapter: Path) -> ModelSettings:
    """How to load the base of an adapter: what flags do not say is as in its training.

    Raises:
        QAdapterError: the training's record says no such thing.
    """
    record = training_record(adapter)
    if options.base:
        record.pop("revision", None)  # of another base
    # Never trust_remote_code: a folder from elsewhere must not turn it on.
    numerics = {name: getattr(options, name) or record.get(name) for name in ("dtype", "quantization", "revision")}
    try:
        return ModelSettings(
            pretrained=base,
            trust_remote_code=options.trust_remote_code,
            **{name: value for name, value in numerics.items() if value is not None},
            **(options.model or record.get("model") or {}),
        )
    except (ValidationError, TypeError) as error:
        raise unreadable_record(adapter, error) from error


def base_place(options: PolicyOptions) -> str:
    """Folder or hub id of the base.

    Raises:
        QAdapterError: the first adapter names none, or one that is not there any more.
    """
    return options.base or base_of_adapter(Path(options.adapter[0]).expanduser())


def as_base(policy: Any) -> AbstractContextManager[Any]:
    """Within the block a policy of `open_policy` is its base."""
    return policy.disable_adapter()


def open_base(
    base: str, settings: ModelSettings, *, say: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base and its tokenizer; if asked to, says how conversations are written where it has no chat template.

    Raises:
        QAdapterError: no model there.
    """
    if gguf_file(base) is not None:
        note(f"reading {base}; a GGUF file is unpacked each time, which takes a minute or more for a large vocabulary")
    network, tokenizer = load_base(base, settings)
    if say:
        _say_without_template(tokenizer)
    return network, tokenizer


def _say_without_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        note(
            "note: the base has no chat template; conversations are written as plain transcripts, "
            r'"\n\nHuman: …\n\nAssistant: …", and the end-of-sequence token closes a reply'
        )


def _tokenizer(
    options: PolicyOptions, of_base: PreTrainedTokenizerBase, network: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer that the first adapter was trained with, with what the flags say of thinking and the template."""
    first, *others = (Path(folder).expanduser() for folder in options.adapter)
    own = fit_tokenizer(policy_tokenizer(first, of_base), network)
    if (other := difference(own, of_base)) is not None:
        note(f"note: the adapter brings its own tokenizer, with {other}; it is used for the base's replies too")
    for folder in others:
        if (other := difference(policy_tokenizer(folder, of_base), own)) is not None:
            note(f"note: {folder} was trained with {other}; prompts are written as for {first}")
    _say_without_template(own)
    return rendering_as_asked(options, own)


def rendering_as_asked(options: BaseOptions, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with what the flags say of thinking and the template."""
    rendering = options.model_dump(include=set(RENDERING))
    return configured(
        tokenizer,
        thinking=rendering["thinking"],
        thoughts=rendering["thoughts"],
        template=rendering["chat_template_kwargs"],
    )


def dials(policy: Policy) -> str:
    """Where a policy's dials stand, for people to read."""
    turned = "" if policy.dial.as_trained else f", dial {policy.dial}"
    if isinstance(policy, GuidedForCausalLM):
        guide = policy.guide
        return f"guided base ({guide.kind}), strength {guide.strength:g}, {guide.top_k} candidates{turned}"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in policy.adapter_weights.items())
    if policy.plain:
        return f"plain PEFT adapter{'' if len(policy.adapter_weights) == 1 else f', weights: {weights}'}{turned}"
    own = f"alpha_0 {policy.config.alpha_0:g}, alpha_tilde {policy.config.alpha_tilde:g}"
    return f"{own}, weights: {weights}{turned}"


def require_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter.

    Raises:
        QAdapterError: it holds none, or a training that is not finished.
    """
    if (folder / SETTINGS_FILE).is_file() or (folder / "adapter_config.json").is_file():
        return
    if (folder / RECORD).is_file():
        raise QAdapterError(
            f"the training in {folder} is not finished; resume it: qadapter train --config {folder / RECORD} --resume"
        )
    adapter_place(folder)


def base_of_adapter(folder: Path) -> str:
    """The base that an adapter's own files name.

    Raises:
        QAdapterError: they name none, or one that is not there any more.
    """
    named = folder  # PEFT keeps an adapter that is not called `default` below it
    if (folder / SETTINGS_FILE).is_file() and not (folder / "adapter_config.json").is_file():
        named = folder / next(iter(read_settings(folder).adapter_weights))
    base = base_of(named)
    if not base:
        raise QAdapterError(f"the adapter in {folder} does not say which base it belongs to; give --base")
    if Path(base).is_absolute() and not Path(base).exists():
        raise QAdapterError(f"the base of {folder} is not at {base} any more; give its folder with --base")
    return str(base)


def _compose(policy: QAdapterForCausalLM, others: list[Path], weights: tuple[float, ...], mismatch: bool) -> None:
    """Load the other adapters and weigh all of them; a folder's own weights count within its share."""
    if not others and weights == (1.0,):
        return
    shares = {name: own * weights[0] for name, own in policy.adapter_weights.items()}
    for place, (folder, weight) in enumerate(zip(others, weights[1:], strict=True), start=2):
        policy.attach(folder, f"adapter_{place}", allow_base_mismatch=mismatch)
        shares[f"adapter_{place}"] = weight
    policy.set_adapter_weights(shares)


def _turn(policy: QAdapterForCausalLM, options: PolicyOptions) -> None:
    alpha_0 = policy.config.alpha_0 if options.alpha_0 is None else options.alpha_0
    alpha_tilde = policy.config.alpha_tilde if options.alpha_tilde is None else options.alpha_tilde
    check_dials(alpha_0, alpha_tilde)
    policy.config.alpha_0, policy.config.alpha_tilde = alpha_0, alpha_tilde
    policy.dial = options.dial or policy.dial
