"""Files of a folder that are parts of a whole, by their names (`train-00000-of-00007.parquet`)."""

from __future__ import annotations

import re

_PART = re.compile(r"(.*?)(?:\d{5}-of-\d{5}(?:-[0-9a-f]+)?|(?:part|shard|chunk)[-_.]?\d+|\A\d{3,})(.*)", re.IGNORECASE)


def part_of(name: str) -> tuple[str, str] | None:
    """What a file's name has before and behind its number, which the parts of a whole share; None: it is no part."""
    part = _PART.fullmatch(name)
    return (part.group(1), part.group(2)) if part else None
