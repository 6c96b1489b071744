"""The app behind `make ui`: MLflow's own app inside `guard.Guard`. MLflow loads it by its entry point (`mlflow.app`).

MLflow's server refuses foreign names, and writes that come from pages of other machines. Pages on another port of this
machine may read and write everything.

MLflow 3's pages open in the view of GenAI apps, whatever an experiment's kind says: the view is the browser's own
choice (`localStorage`), or that of an address with `workflowType`. The app's page chooses model training where the
browser has not chosen yet.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from flows.prefect_host.guard import App, Guard, Receive, Scope, Send

# Read from the scripts of MLflow 3.17's page: the key with its version, and the value as JSON.
_CHOOSE = (
    b"<script>try{const k='mlflow.workflowType_v1';"
    b"if(localStorage.getItem(k)===null)localStorage.setItem(k,JSON.stringify('machine_learning'))}catch{}</script>"
)
_BEFORE = b"</title>"


def create_app() -> Guard:
    """MLflow's app, for its own pages and for clients other than browsers."""
    from mlflow.server.fastapi_app import app

    return Guard(opened_on_training(app))


def opened_on_training(app: App) -> App:
    """The same app, whose start page opens in the view of model training unless the browser has chosen another."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await app(scope, receive, send)
            return
        head: MutableMapping[str, Any] = {}
        body = b""

        async def collected(message: MutableMapping[str, Any]) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                head.update(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                page = body.replace(_BEFORE, _BEFORE + _CHOOSE, 1)
                await send({**head, "headers": _of_length(head, len(page))})
                await send({"type": "http.response.body", "body": page})

        # The whole page each time: a part of it, or "not modified", is not what the script was put into.
        whole = [(name, value) for name, value in scope["headers"] if name not in _CONDITIONS]
        await app({**scope, "headers": whole}, receive, collected)

    return answer


_CONDITIONS = (b"range", b"if-none-match", b"if-modified-since", b"accept-encoding")


def _of_length(head: MutableMapping[str, Any], length: int) -> list[tuple[bytes, bytes]]:
    """A response's headers with another length, and without the digest of the page that was replaced."""
    kept = [(name, value) for name, value in head["headers"] if name.lower() not in (b"content-length", b"etag")]
    return [*kept, (b"content-length", str(length).encode())]
