"""Serve a version of MLflow's model registry with OpenAI's chat API; behind `make serve-model MODEL=policy@champion`.

python -m flows.commands.serve_model --model policy@champion
python -m flows.commands.serve_model --model policy/3 --port 8001
python -m flows.commands.serve_model --model policy@champion --model policy@previous

The adapter answers under the registered model's name, the base beside it as `base`; several versions on one base
answer under what was given for each. A version is found when the server starts: if an alias moves on, the server says
so and goes on with what it has. docs/serving.md.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Mapping, Sequence

from qadapter.errors import QAdapterError
from qadapter.serving.__main__ import add_address, serve

_LOOK_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and serve; returns the exit code: 0 after Ctrl-C, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.commands.serve_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME@ALIAS",
        help="or NAME/VERSION; can be given several times for versions on one base",
    )
    add_address(parser)
    given = parser.parse_args(arguments)
    over = threading.Event()
    try:
        from tasks.tracking.models import find_served_model

        found = {model: find_served_model(model) for model in given.model}
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
        serve(adapters, one.base, **one.numerics, host=given.host, port=given.port)
    except QAdapterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        pass
    finally:
        over.set()
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
