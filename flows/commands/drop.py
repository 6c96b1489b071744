"""`qadapter drop`: a delivery of toy preferences (`make drop`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qadapter.errors import QAdapterError, did_you_mean

_KINDS = ("good", "flipped", "broken")


def drop(
    kind: Annotated[
        str, typer.Option(help=f"what the file holds: {', '.join(_KINDS)}", autocompletion=lambda: list(_KINDS))
    ] = "good",
    part: Annotated[int, typer.Option(help="which part of the data, 1 or 2")] = 1,
    out: Annotated[Path, typer.Option(help="folder that gets the file")] = Path("preferences/incoming"),
) -> None:
    """Write one file and print its path.

    Raises:
        QAdapterError: there is no such kind or part.
    """
    from qadapter.toyworld.drops import write_drop  # numpy and pyarrow: not for the help

    if kind not in _KINDS:
        raise QAdapterError(f"there is no kind {kind!r}{did_you_mean(kind, _KINDS)}")
    sys.stdout.write(f"{write_drop(out, kind, part)}\n")  # type: ignore[arg-type]
