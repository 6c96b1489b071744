"""Where a report's cards lie: for a run that finds its report, apart from what writes them."""

from __future__ import annotations

import re
from pathlib import Path

from qadapter.export.card import CARD

CARDS = "cards"


def card_file(folder: Path, domain: str, method: str) -> Path:
    """Where the card of a domain's method lies in a report's folder."""
    parts = [re.sub(r"[^\w.+=-]+", "-", part) for part in (domain, method)]  # labels of compared runs hold anything
    return folder.joinpath(CARDS, *parts, CARD)
