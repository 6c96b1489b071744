"""How long a stage takes that is computed in several sittings, because earlier ones were killed or failed.

An earlier sitting counts up to the last file that it kept in the stage's scratch folder, such as a checkpoint: what it
did after that was lost and is done again.
"""

from __future__ import annotations

import time
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import list_files, read_json, write_json

_SITTING = ".sitting.json"


def begin_sitting(scratch: Path) -> float:
    """Note that a sitting begins.

    Args:
        scratch: the stage's scratch folder; no other process uses it.

    Returns:
        Seconds of the earlier sittings.
    """
    file, now = scratch / _SITTING, time.time()
    before = 0.0
    try:
        earlier = read_json(file)
        kept = [path.stat().st_mtime for path in list_files(scratch, exclude={_SITTING}).values()]
        last = min(max(kept, default=0.0), now)
        before = float(earlier["before"]) + max(0.0, last - float(earlier["began"]))
    except (QAdapterError, OSError, KeyError, TypeError, ValueError):  # the first sitting, or one whose note is damaged
        pass
    write_json(file, {"began": now, "before": before})
    return before
