"""Whether an experiment measures anything on text of the old distribution, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qadapter.config.budget import HOWTOS


def unmeasured_on_old_text(config: Mapping[str, Any]) -> list[str]:
    """A sentence where no source of old text is named: what is not measured for that, and what to set.

    Args:
        config: an experiment's settings; nothing is said of any other mapping.
    """
    if "evaluation" not in config or config.get("helpful_sft"):
        return []
    lacking = ["the KL to the base", "the share of the base's own answers that stay the same"]
    if HOWTOS not in config["evaluation"]["retention"]["tasks"]:  # its refusals are counted without old text, too
        lacking.append("the share of harmless requests that are refused")
    return [
        f"Nothing is measured on old text ({', '.join(lacking)}), because no source of it is named: add a helpful_sft "
        "section whose source holds such conversations. It trains a base only for domains with base: helpful."
    ]
