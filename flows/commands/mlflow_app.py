"""The app behind `make ui`: MLflow's own app inside `guard.Guard`. MLflow loads it by its entry point (`mlflow.app`).

MLflow's server refuses foreign names, and writes that come from pages of other machines. Pages on another port of this
machine may read and write everything.
"""

from __future__ import annotations

from flows.prefect_host.guard import Guard


def create_app() -> Guard:
    """MLflow's app, for its own pages and for clients other than browsers."""
    from mlflow.server.fastapi_app import app

    return Guard(app)
