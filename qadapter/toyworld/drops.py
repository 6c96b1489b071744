"""Deliveries of toy preference data, for trying the recurring pipeline without data (`qadapter drop`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import json_line, read_json_lines
from qadapter.toyworld.world import ToyWorld

Kind = Literal["good", "flipped", "broken"]
PARTS = 2


def write_drop(folder: Path, kind: Kind, part: int = 1, *, parts: int = PARTS, seed: int = 0) -> Path:
    """Add one file of harmless preferences of the toy world to a folder.

    Args:
        folder: created if needed.
        kind: `good` refuses harmful requests; `flipped` has chosen and rejected the wrong way round, as when a column
            was mixed up; `broken` is a file that is no preference data at all.
        part: which part of the data, from 1; `parts` of them make the whole.
        parts: how many.
        seed: of the toy world.

    Returns:
        The file.

    Raises:
        QAdapterError: there is no such part.
    """
    if not 1 <= part <= parts:
        raise QAdapterError(f"part is {part}; the toy world's preferences come in {parts} parts, 1 to {parts}.")
    file = folder / f"{kind}-{part}-of-{parts}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "broken":
        content = b"<html><body>502 Bad Gateway</body></html>\n"
    else:
        with tempfile.TemporaryDirectory() as scratch:
            ToyWorld(seed).write(Path(scratch, "world"), corpus_size=1)
            every = read_json_lines(Path(scratch, "world", "hh-rlhf", "harmless.jsonl"))
        rows = every[(part - 1) * len(every) // parts : part * len(every) // parts]
        if kind == "flipped":
            rows = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        content = b"".join(map(json_line, rows))
    temporary = file.with_name(f".{file.name}.tmp")  # hidden: no reader takes it for data
    temporary.write_bytes(content)
    return temporary.replace(file)
