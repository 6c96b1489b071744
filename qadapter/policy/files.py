"""A policy on disk: a standard PEFT adapter folder with `q_adapter.json` beside the adapter's own files.

A plain PEFT adapter has no such file; where its dial stands is in `dial.json`, if it was moved.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.errors import QAdapterError
from qadapter.policy.adapters import ADAPTER_FILE, adapter_place, base_of, load_adapter, set_adapter_tensors
from qadapter.policy.base import load_network, read_json_object
from qadapter.policy.dial import AS_TRAINED, Dial
from qadapter.policy.fingerprint import refuse_mismatch, write_fingerprint
from qadapter.policy.objective import Objective
from qadapter.policy.probe import can_be_probed, logits_of, probe_ids
from qadapter.policy.ranges import check_dials, check_weights

SETTINGS_FILE = "q_adapter.json"
DIAL_FILE = "dial.json"
GUIDE_FILE = "guide.json"
_FORMAT, _WITH_DIAL = 1, 2  # versions that read 1 only must refuse a dial that was moved, not serve the policy without
_PREFIX = "peft_model."


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What `q_adapter.json` holds.

    Attributes:
        objective: what the adapters were trained with.
        alpha_0: where the dial stood when the policy was saved.
        alpha_tilde: the same.
        adapter_weights: weight of each adapter in Q, by name.
        dial: the dial.
        plain: whether these are the settings of a plain PEFT adapter, which has no `q_adapter.json`.
    """

    objective: Objective
    alpha_0: float
    alpha_tilde: float
    adapter_weights: dict[str, float]
    dial: Dial = AS_TRAINED
    plain: bool = False


def save(
    peft_model: PeftModel,
    settings: PolicySettings,
    folder: Path,
    *,
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """Write the folder; see `QAdapterForCausalLM.save_pretrained`."""
    own = None
    if state_dict is not None:
        own = {key.removeprefix(_PREFIX): value for key, value in state_dict.items() if key.startswith(_PREFIX)}
    options: dict[str, Any] = {} if own is None else {"state_dict": own}
    # The embeddings are never resized here, and "auto" would ask the hub for the base's vocabulary size.
    peft_model.save_pretrained(
        str(folder), safe_serialization=True, is_main_process=is_main_process, save_embedding_layers=False, **options
    )
    if not is_main_process:
        return
    for name in settings.adapter_weights:
        write_fingerprint(peft_model.get_base_model(), _place(folder, name))
    forget_kind(folder)
    if settings.plain:
        write_dial(folder, settings.dial)
        return
    content = asdict(settings)
    del content["plain"], content["dial"]
    (folder / SETTINGS_FILE).write_text(_text({"format": _FORMAT, **content}))
    if not settings.dial.as_trained:
        write_dial(folder, settings.dial)


def forget_kind(folder: Path) -> None:
    """Delete what says which kind of policy a folder holds: the one that is saved there next may be of another."""
    for name in (SETTINGS_FILE, DIAL_FILE, GUIDE_FILE):
        (folder / name).unlink(missing_ok=True)


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def write_dial(folder: Path, dial: Dial) -> None:
    """Set the dial of an adapter's folder.

    Args:
        folder: what `save_pretrained` or a training wrote; a plain PEFT adapter too.
        dial: where it stands from now on.

    Raises:
        QAdapterError: there is no adapter.
    """
    if (folder / SETTINGS_FILE).is_file():
        file, content = folder / SETTINGS_FILE, read_json_object(folder / SETTINGS_FILE)
        content.pop("dial", None)
        moved = {} if dial.as_trained else {"dial": asdict(dial)}
        file.write_text(_text({**content, "format": _WITH_DIAL if moved else _FORMAT, **moved}))
        return
    plain_place(folder)
    if dial.as_trained:
        (folder / DIAL_FILE).unlink(missing_ok=True)
    else:
        (folder / DIAL_FILE).write_text(_text({"format": _FORMAT, **asdict(dial)}))


def saved_dial(folder: Path) -> Dial:
    """Where the dial of an adapter's folder stands.

    Raises:
        QAdapterError: its file cannot be read.
    """
    if (folder / SETTINGS_FILE).is_file():
        return read_settings(folder).dial
    file = folder / DIAL_FILE
    if not file.is_file():
        return AS_TRAINED
    content = read_json_object(file)
    if content.pop("format", None) != _FORMAT:
        raise QAdapterError(f"{file} cannot be read: expected format {_FORMAT}. Save the dial again.")
    try:
        dial = Dial.of(content)
    except QAdapterError as error:
        raise QAdapterError(f"{file} cannot be read: {error}") from error
    assert dial is not None
    return dial


def copy_turned(
    adapter: Path,
    out: Path,
    *,
    alpha_0: float | None = None,
    alpha_tilde: float | None = None,
    dial: Dial | None = None,
) -> None:
    """Copy an adapter's folder and turn its dials; the objective that it was trained with stays on record.

    Args:
        adapter: folder that `QAdapterForCausalLM.save_pretrained` or a training wrote.
        out: a folder that does not exist yet.
        alpha_0, alpha_tilde: of a Q-Adapter, at least 0 and above 0; as they are without.
        dial: of any adapter; as it is without.

    Raises:
        QAdapterError: no adapter there, α0 or α̃ for one that has none, or a number that is out of range.
    """
    own = {name: value for name, value in (("alpha_0", alpha_0), ("alpha_tilde", alpha_tilde)) if value is not None}
    if own:
        settings = read_settings(adapter)
        check_dials(own.get("alpha_0", settings.alpha_0), own.get("alpha_tilde", settings.alpha_tilde))
    else:
        read_policy(adapter)
    shutil.copytree(adapter, out)
    if own:
        file = out / SETTINGS_FILE
        file.write_text(_text({**read_json_object(file), **own}))
    if dial is not None:
        write_dial(out, dial)


def read_settings(folder: Path) -> PolicySettings:
    """`q_adapter.json` of a folder.

    Raises:
        QAdapterError: there is none, or it holds something else.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise QAdapterError(
            f"{folder} is no Q-Adapter: it has no {SETTINGS_FILE}. Give a folder that "
            "QAdapterForCausalLM.save_pretrained or the trainer wrote."
        )
    try:
        content = json.loads(file.read_text())
        if content["format"] not in (_FORMAT, _WITH_DIAL):
            raise ValueError(f"format is {content['format']}; this version reads {_FORMAT} and {_WITH_DIAL}")
        settings = PolicySettings(
            objective=Objective(**content["objective"]),
            alpha_0=float(content["alpha_0"]),
            alpha_tilde=float(content["alpha_tilde"]),
            adapter_weights={_name(name): float(weight) for name, weight in content["adapter_weights"].items()},
            dial=Dial.of(content.get("dial")) or AS_TRAINED,
        )
        if not settings.adapter_weights:
            raise ValueError("adapter_weights names no adapter")
        check_dials(settings.alpha_0, settings.alpha_tilde)
        check_weights(settings.adapter_weights)
        return settings
    except (QAdapterError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise QAdapterError(f"{file} cannot be read: {error!r}. Save the policy again.") from error


def plain_place(folder: Path) -> Path:
    """Where the files of a plain PEFT adapter lie, as `adapter_place`.

    Raises:
        QAdapterError: there is none, or it is a Q-Adapter, whose policy is not its adapted model.
    """
    place = adapter_place(folder)
    if (place / SETTINGS_FILE).is_file():
        raise QAdapterError(f"The Q-Adapter is not in {folder} but in {place}. Give that folder.")
    return place


def read_policy(folder: Path) -> PolicySettings:
    """As `read_settings`; a plain PEFT adapter is one of the residual form with α0 = α̃ = 1.

    Raises:
        QAdapterError: there is no adapter, or a file cannot be read.
    """
    if (folder / SETTINGS_FILE).is_file():
        return read_settings(folder)
    place = plain_place(folder)
    name = "default" if place == folder else _name(place.name)
    return PolicySettings(Objective.preset("residual"), 1.0, 1.0, {name: 1.0}, saved_dial(folder), plain=True)


def refuse_guide(folder: Path) -> None:
    """Raise QAdapterError if an adapter guides its base's decoding: its LoRA alone is the value network, no policy."""
    if (folder / GUIDE_FILE).is_file():
        raise QAdapterError(
            f"The adapter in {folder} guides the base's decoding ({GUIDE_FILE}, of the methods vas and pita) and is no "
            "Q-Adapter and no plain adapter. Use it alone, by load_policy or by any command but `qadapter export`."
        )


def load(
    folder: Path,
    base_model: str | Path | PreTrainedModel | None,
    *,
    is_trainable: bool,
    allow_base_mismatch: bool = False,
    **base_options: Any,
) -> tuple[PeftModel, PolicySettings, Tensor | None]:
    """Base with adapters, the settings, and the base's logits of `probe.probe_ids` from before it had adapters.

    The rest is as in `QAdapterForCausalLM.from_pretrained`.
    """
    refuse_guide(folder)
    # A plain adapter has no objective that training could go on with
    settings = read_settings(folder) if is_trainable else read_policy(folder)
    for name in settings.adapter_weights:
        if not (_place(folder, name) / ADAPTER_FILE).is_file():
            raise QAdapterError(
                f"{_place(folder, name)} has no {ADAPTER_FILE}, and no other kind of weight file is loaded. "
                "Save the policy again."
            )
    if isinstance(base_model, PreTrainedModel):
        if base_options:
            raise QAdapterError(f"{', '.join(base_options)} only matter for a base that is loaded; one was given.")
        base = base_model
    else:
        base = load_base_of(folder, base_model, base_options)
    expected = logits_of(base, probe_ids(base)) if can_be_probed(base) else None
    first, *others = settings.adapter_weights
    allowed = {"allow_base_mismatch": allow_base_mismatch}
    peft_model = load_adapter(base, _place(folder, first), first, is_trainable=is_trainable, **allowed)
    for name in others:
        load_adapter(peft_model, _place(folder, name), name, **allowed)
    return peft_model, settings, expected


def only_adapter(folder: Path, settings: PolicySettings) -> Path:
    """The folder of a saved policy's only adapter, independent of its name.

    Raises:
        QAdapterError: it was saved with several.
    """
    if len(settings.adapter_weights) > 1:
        names = ", ".join(settings.adapter_weights)
        raise QAdapterError(f"The policy in {folder} is made of several adapters ({names}). Give the folder of one.")
    return _place(folder, next(iter(settings.adapter_weights)))


def load_adapter_weights(peft_model: PeftModel, folder: Path, name: str) -> None:
    """Put the weights that `save` wrote into an adapter that is there already.

    Raises:
        QAdapterError: no weights in the folder, or weights of another adapter or of one on another base.
    """
    refuse_mismatch(peft_model.get_base_model(), _place(folder, name))
    set_adapter_tensors(peft_model, _place(folder, name) / ADAPTER_FILE, name)


def _name(name: str) -> str:
    """An adapter's name is that of its folder: it must not lead elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise ValueError(f"{name!r} is no adapter's name")
    return name


def _place(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name  # PEFT's layout


def load_base_of(folder: Path, base_model: str | Path | None, options: dict[str, Any]) -> PreTrainedModel:
    """The base of an adapter, from where `base_model` or the adapter's own files say.

    Raises:
        QAdapterError: neither says it, or there is no base.
    """
    named = next(iter(read_policy(folder).adapter_weights))
    place = base_model or base_of(_place(folder, named))
    if not place:
        raise QAdapterError(
            f"The adapter in {folder} does not say which base it belongs to. Give base_model (a path or a model)."
        )
    try:
        return load_network(place, **options)
    except QAdapterError as error:
        raise QAdapterError(
            f"The base model {place} of the adapter in {folder} cannot be loaded: {str(error).rstrip('.')}. "
            "Or give base_model: the path where it lies now, or the model itself."
        ) from error
