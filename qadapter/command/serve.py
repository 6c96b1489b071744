"""`qadapter serve`: a base and its adapters behind OpenAI's chat API."""

from __future__ import annotations

import contextlib

from qadapter.command.options import ServeOptions
from qadapter.serving.server import serve


def run(options: ServeOptions) -> None:
    """Answer until Ctrl-C.

    Raises:
        QAdapterError: something cannot be loaded, the address is taken, or the key in the environment is empty.
    """
    with contextlib.suppress(KeyboardInterrupt):
        serve(
            dict(options.adapter),
            options.base,
            dtype=options.dtype,
            quantization=options.quantization,
            revision=options.revision,
            host=options.host,
            port=options.port,
            cors_origins=options.cors_origin,
            allow_base_mismatch=options.allow_base_mismatch,
        )
