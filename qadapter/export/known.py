"""The facts of an adapter, read from the files that trainings write beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from qadapter.export.facts import FACTS, NOT_STATED, DataFile, Facts
from qadapter.files.artifacts import digest_file, digest_tree, read_json
from qadapter.files.shown import visible
from qadapter.files.yaml_text import read_yaml
from qadapter.policy.adapters import CONFIG_FILE, adapter_place
from qadapter.policy.base import read_json_object
from qadapter.policy.dial import Dial
from qadapter.policy.files import SETTINGS_FILE, read_policy
from qadapter.policy.tokenizer import training_record

_LARGEST_CARD = 2**20


def read_facts(adapter: Path, base: str, dial: Dial | None = None) -> Facts:
    """The facts of an adapter's folder.

    Args:
        adapter: folder that a training wrote.
        base: folder or hub id of its base, as it is loaded now.
        dial: where the dial stands now; as saved with the adapter without it. What was measured at another dial is left
            out.

    Raises:
        QAdapterError: a file in it cannot be read.
    """
    policy = read_policy(adapter)
    known = Facts.from_json(read_json(adapter / FACTS)) if (adapter / FACTS).is_file() else Facts("")
    record, stands = training_record(adapter), str(dial or policy.dial)
    measured = known.learnt or known.forgotten
    if measured and known.dial != stands:
        known = replace(known, learnt=(), forgotten=(), split=f"not measured at {stands} but at {known.dial}")
    settings = dict(known.settings)
    if (adapter / SETTINGS_FILE).is_file():
        settings |= {f"objective.{name}": value for name, value in asdict(policy.objective).items()}
        settings |= {"alpha_0": policy.alpha_0, "alpha_tilde": policy.alpha_tilde}
    names = ("learning_rate", "epochs", "max_steps", "batch_size", "max_length", "seed", "dtype", "quantization")
    settings |= {name: record[name] for name in names if record.get(name) is not None}
    config = read_json_object(adapter_place(adapter) / CONFIG_FILE) if policy.plain else _first_config(adapter, policy)
    shape = {f"adapter.{name}": config[name] for name in ("peft_type", "r", "lora_alpha") if config.get(name)}
    folder = Path(base)
    return Facts(
        base=folder.name if folder.is_dir() else base,
        base_digest=known.base_digest or (digest_tree(folder) if folder.is_dir() else ""),
        base_licence=licence_of(base),
        method=known.method or ("" if policy.plain else "q-adapter"),
        settings={**shape, **settings},
        dial=stands,
        data=known.data or tuple(_data_of(adapter, record)),
        learnt=known.learnt,
        forgotten=known.forgotten,
        split=known.split,
    )


def _first_config(adapter: Path, policy: Any) -> dict[str, Any]:
    name = next(iter(policy.adapter_weights))
    return read_json_object((adapter if name == "default" else adapter / name) / CONFIG_FILE)


def _data_of(adapter: Path, record: Mapping[str, Any]) -> list[DataFile]:
    found = []
    for part in ("train", "heldout"):
        file = adapter / "data" / f"{part}.jsonl"
        if file.is_file() and file.stat().st_size:
            source = str(record.get("data", ""))
            name = Path(source).name if Path(source).exists() else source
            found.append(DataFile(f"{name or 'pairs'}, {part}", digest_file(file), licence_of(source, "dataset")))
    return found


def licence_of(place: str, kind: str = "model") -> str:
    """The licence that a model's or data set's own card states, or the name of its licence file.

    Args:
        place: a folder, a file in one, or a hub id (its card is looked up in the local cache only).
        kind: `model` or `dataset`.
    """
    path = Path(place).expanduser() if place else Path("nowhere")
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    card: Path | None = folder / "README.md" if folder else None
    name = place.removeprefix("hub:")
    if folder is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        cached = try_to_load_from_cache(name, "README.md", repo_type=kind)
        card = Path(cached) if isinstance(cached, str) else None
    stated = _front_matter(card).get("license") if card and card.is_file() else None
    if stated:
        stated = stated if isinstance(stated, list) else [stated]
        return visible(", ".join(str(one) for one in stated))[:200]
    files = sorted(file.name for file in folder.glob("LICEN[CS]E*")) if folder and folder == path else []
    return f"see {files[0]} of it" if files else NOT_STATED


def _front_matter(card: Path) -> dict[str, Any]:
    if card.stat().st_size > _LARGEST_CARD:
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    if not text.startswith("---"):
        return {}
    try:
        found = read_yaml(text.removeprefix("---").split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
