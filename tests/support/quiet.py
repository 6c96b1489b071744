"""What a normal run should not print: warnings of libraries about which the user can do nothing."""

from __future__ import annotations

import re

_NOISE = re.compile(r"Warning\b|Failed to|deprecat|pyfunc|Traceback|\[W\d", re.IGNORECASE)
_OURS = re.compile(r"WARNING: |[\d:.]+ \| (?:WARNING|INFO) +\| (?:Task run|Flow run|flows\.|tasks\.|qadapter\.)")


def noise(printed: str) -> list[str]:
    """The lines that look like a library's warning, without this project's own warnings."""
    return [line for line in printed.splitlines() if _NOISE.search(line) and not _OURS.match(line)]
