"""How long a stage takes that is computed in several sittings, because earlier ones were killed or failed.

An earlier sitting counts up to the last file that it kept in the stage's scratch folder, such as a checkpoint: what it
did after that was lost and is done again.
"""

from __future__ import annotations

import time
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import list_files, read_json, write_json


def begin_sitting(note: Path, scratch: Path) -> float:
    """Note that a sitting begins. The caller holds the stage's lock.

    Args:
        note: where this is written down; deleted once the stage is finished.
        scratch: the stage's scratch folder; without one there is no earlier sitting whose work could be used.

    Returns:
        Seconds of the earlier sittings.
    """
    now, before = time.time(), 0.0
    if scratch.exists():
        try:
            earlier = read_json(note)
            kept = [path.stat().st_mtime for path in list_files(scratch).values()]
            last = min(max(kept, default=0.0), now)
            before = float(earlier["before"]) + max(0.0, last - float(earlier["began"]))
        except (QAdapterError, OSError, KeyError, TypeError, ValueError):  # a note that is damaged or gone is no time
            pass
    write_json(note, {"began": now, "before": before})
    return before
