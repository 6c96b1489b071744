"""Deliveries of toy preference data, for trying the recurring pipeline without any data of one's own.

python -m qadapter.toyworld.drops --kind good --part 1 --out preferences/incoming
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json_lines
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
        text = "<html><body>502 Bad Gateway</body></html>\n"
    else:
        with tempfile.TemporaryDirectory() as scratch:
            ToyWorld(seed).write(Path(scratch, "world"), corpus_size=1)
            every = read_json_lines(Path(scratch, "world", "hh-rlhf", "harmless.jsonl"))
        rows = every[(part - 1) * len(every) // parts : part * len(every) // parts]
        if kind == "flipped":
            rows = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    temporary = file.with_name(f".{file.name}.tmp")  # hidden: no reader takes it for data
    temporary.write_text(text)
    return temporary.replace(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one file and say where; the exit code is 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m qadapter.toyworld.drops", description=__doc__)
    parser.add_argument("--kind", choices=get_args(Kind), default="good", help="what the file holds (default: good)")
    parser.add_argument("--part", type=int, default=1, help=f"which part of the data, 1 to {PARTS} (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("preferences/incoming"), help="folder that gets the file")
    given = parser.parse_args(arguments)
    try:
        file = write_drop(given.out, given.kind, given.part)
    except QAdapterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
