"""Arguments that several of the pipeline's commands take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from qadapter.config.folder import CONFIGS


def _names(folder: str, incomplete: str) -> list[str]:
    """The names of config files that start with the typed text."""
    return sorted(file.stem for file in (CONFIGS / folder).glob("*.yaml") if file.stem.startswith(incomplete))


def names_in(folder: str) -> Callable[[str], list[str]]:
    """Completion of the names in a folder of `configs/`."""

    def complete(incomplete: str) -> list[str]:
        return _names(folder, incomplete)

    return complete


Profile = Annotated[str, typer.Option(help="a name in configs/, or a YAML file", autocompletion=names_in("."))]
Data = Annotated[str | None, typer.Option(help="folder with the data, where the profile's paths say {data}")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings to change: training.max_steps=20", show_default=False),
]
Config = Annotated[
    str, typer.Option(help="a name in configs/customize/, or a YAML file", autocompletion=names_in("customize"))
]
Host = Annotated[
    str,
    typer.Option(
        help="address to listen on; on loopback, only requests to this machine's own names are answered, and to those "
        "in QADAPTER_ALLOWED_HOSTS=name,other"
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 picks a free one")]
CorsOrigins = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        help="origin of a page that may send requests from a browser, as http://localhost:3000; may be repeated",
    ),
]
