"""What every stage needs, found or computed: imported once, by the process that worker processes are forked from."""

from __future__ import annotations

from importlib import import_module

from flows.environment import prepare_environment
from qadapter.files.imports import importing
from tasks.stages.code_version import code_digest

prepare_environment()
with importing():
    for _module in ("flows.full_paper_repro", "prefect.task_engine", "pandas"):
        import_module(_module)
    import_module("tasks.tracking.store").import_for_database()
code_digest("qadapter.evaluation.measure")  # reads and keeps nearly all that any stage's digest is made of
