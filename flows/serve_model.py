"""Serve a version of MLflow's model registry with OpenAI's chat API; behind `make serve-model MODEL=policy@champion`.

python -m flows.serve_model --model policy@champion
python -m flows.serve_model --model policy/3 --port 8001

The adapter answers under the registered model's name, the base beside it as `base`; docs/serving.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qadapter.errors import QAdapterError
from qadapter.serving.__main__ import add_address, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and serve; returns the exit code: 0 after Ctrl-C, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="NAME@ALIAS", help="or NAME/VERSION")
    add_address(parser)
    given = parser.parse_args(arguments)
    try:
        from tasks.served_model import find_served_model

        found = find_served_model(given.model)
        serve({found.name: found.adapter}, found.base, **found.numerics, host=given.host, port=given.port)
    except QAdapterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
