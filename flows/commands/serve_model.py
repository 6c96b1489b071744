"""`qadapter serve-model`: registered versions with OpenAI's chat API (`make serve-model MODEL=policy@champion`).

The adapter answers under the registered model's name, the base beside it as `base`; several versions on one base
answer under what was given for each. A version is found when the server starts: if an alias moves on, the server says
so and goes on with what it has. docs/serving.md.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Annotated

import typer

from flows.commands.arguments import CorsOrigins, Host, Port
from qadapter.errors import QAdapterError
from qadapter.serving.server import serve

_LOOK_SECONDS = 60.0


def serve_model(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="NAME@ALIAS or NAME/VERSION; several stand on one base")
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    cors_origin: CorsOrigins = None,
) -> None:
    """Serve until Ctrl-C.

    Raises:
        QAdapterError: a version is not there or damaged, or two stand on different bases.
    """
    over = threading.Event()
    try:
        from tasks.tracking.models import find_served_model

        found = {model: find_served_model(model) for model in models}
        (first, one), *others = found.items()
        for model, other in others:
            if (other.base_digest or other.base, other.numerics) != (one.base_digest or one.base, one.numerics):
                raise QAdapterError(
                    f"{first} and {model} stand on different bases, or hold them in different precision, and one "
                    "server has one base. Serve them with two servers, each with a --port of its own."
                )
        names = {model: model if others else each.name for model, each in found.items()}
        adapters = {names[model]: each.adapter for model, each in found.items()}
        served = {model: each.version for model, each in found.items() if "@" in model}
        threading.Thread(target=watch, args=(served, over), daemon=True).start()
        serve(adapters, one.base, **one.numerics, host=host, port=port, cors_origins=cors_origin or ())
    except KeyboardInterrupt:
        pass
    finally:
        over.set()


def watch(served: Mapping[str, int], over: threading.Event, every: float = _LOOK_SECONDS) -> None:
    """Say on stderr when an alias has moved away from the version that is served, and when it has come back.

    Args:
        served: `NAME@ALIAS` to the number of the version that is in memory.
        over: set where nobody needs to know any more.
        every: seconds between two looks. A store that is away is asked again at the next one.
    """
    from tasks.tracking.models import version_of

    now = dict(served)
    while served and not over.wait(every):
        for model, number in served.items():
            try:
                found = version_of(model)
            except QAdapterError:
                continue
            if found == now[model]:
                continue
            now[model] = found
            said = f"{model} is now version {found}; this server serves version {number}: restart it"
            if found == number:
                said = f"{model} is version {number} again, which this server serves"
            sys.stderr.write(said + "\n")
            sys.stderr.flush()
