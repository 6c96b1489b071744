"""Names that MLflow takes: all metrics and parameters pass through here on their way to the store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from qadapter.files.shown import shown
from tasks.tracking.store import MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH

_REFUSED = re.compile(r"[^\w. :/-]")


def mlflow_name(name: str) -> str:
    """A metric's or parameter's name as MLflow takes it; names that it takes already are returned unchanged.

    MLflow refuses all characters but letters, digits and `_-. :/`: each becomes `_`. It also refuses names that a file
    system would read as another path (`a//b`, `../a`, `/a`): such a part becomes `_` too. A name that is too long is
    cut, and ends in a digest of the whole, so that two long names stay different.
    """
    parts = _REFUSED.sub("_", name).split("/")
    safe = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if safe.startswith(".."):  # refused even as the beginning of a longer part
        safe = f"_{safe}"
    if len(safe) <= MAX_ENTITY_KEY_LENGTH:
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{safe[: MAX_ENTITY_KEY_LENGTH - 9]}-{digest}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, lists as compact JSON, long values cut at MLflow's limit.

    User, password and query of URLs are removed.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{label}.")
            continue
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, list | tuple | dict) else str(value)
        text = shown(text)
        short = text if len(text) <= MAX_PARAM_VAL_LENGTH else text[: MAX_PARAM_VAL_LENGTH - 1] + "…"
        flat[mlflow_name(label)] = short
    return flat
