"""`qadapter serve-model`: registered versions with OpenAI's chat API (`make serve-model MODEL=policy@champion`).

The adapter is served under the registered model's name, its base as `base`; with several versions, each is served under
the name given for it. Versions are resolved when the server starts: if an alias moves later, the server logs that and
keeps its version (docs/serving.md).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Annotated, Any

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
                    f"{first} and {model} have different bases, or bases in different precision, and one server has "
                    "one base. Serve them with two servers, each with its own --port."
                )
        names = {model: model if others else each.name for model, each in found.items()}
        adapters = {names[model]: each.adapter for model, each in found.items()}
        served = {model: each.version for model, each in found.items() if "@" in model}
        threading.Thread(target=watch, args=(served, over), daemon=True).start()
        numerics: dict[str, Any] = dict(one.numerics)
        serve(adapters, one.base, **numerics, host=host, port=port, cors_origins=cors_origin or ())
    except KeyboardInterrupt:
        pass
    finally:
        over.set()


def watch(served: Mapping[str, int], over: threading.Event, every: float = _LOOK_SECONDS) -> None:
    """Print on stderr when an alias moves away from the served version, and when it moves back.

    Args:
        served: `NAME@ALIAS` → number of the served version.
        over: set to stop watching.
        every: seconds between two checks. An unavailable store is skipped until the next check.
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
