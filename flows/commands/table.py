"""The subcommands that a checkout adds to `qadapter` (`[tool.qadapter]` in `pyproject.toml` refers to this file)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import typer

from flows.commands import (
    alerts,
    compare,
    continual,
    drop,
    init_profile,
    recurring,
    run,
    serve,
    serve_model,
    spread,
    sweep,
)
from flows.environment import prepare_environment
from qadapter.command.app import add_command
from qadapter.errors import QAdapterError

SECTION = "Commands of the pipeline"


class PipelineCommand(NamedTuple):
    """A subcommand: its function, its description, and examples for its help."""

    function: Callable[..., int | None]
    summary: str
    examples: str


COMMANDS: dict[str, PipelineCommand] = {
    "init": PipelineCommand(
        init_profile.init,
        "write a profile for your own model, pairs and benchmarks, and one for new pairs every week",
        """\
  qadapter init                                               asks
  qadapter init --model path/or/hub-id --pairs pairs.jsonl --benchmark quiz.jsonl --name mine""",
    ),
    "run": PipelineCommand(
        run.run,
        "run the whole experiment",
        """\
  qadapter run --profile smoke
  qadapter run --profile mini --data path/to/folder training.max_steps=20""",
    ),
    "plan": PipelineCommand(
        run.plan,
        "check and estimate an experiment without running it",
        """\
  qadapter plan --profile paper""",
    ),
    "sweep": PipelineCommand(
        sweep.sweep,
        "compare many settings of every method",
        """\
  qadapter sweep --sweep smoke
  qadapter sweep --sweep mini --data path/to/folder --plan""",
    ),
    "continual": PipelineCommand(
        continual.continual,
        "take up one preference after the other in four ways, and measure all earlier ones after each",
        """\
  qadapter continual --sequence smoke
  qadapter continual --sequence small --data path/to/folder --plan""",
    ),
    "spread": PipelineCommand(
        spread.spread,
        "run an experiment over a work pool: one deployment run for each method, then the comparison",
        """\
  qadapter spread full-paper-repro/docker --profile smoke
  qadapter spread full-paper-repro/kubernetes --profile mini --data /data training.max_steps=20""",
    ),
    "compare": PipelineCommand(
        compare.compare,
        "write the report of any recorded runs",
        """\
  qadapter compare RUN RUN --output folder""",
    ),
    "customize": PipelineCommand(
        recurring.customize,
        "look for new preferences: train, judge, promote or reject",
        """\
  qadapter customize --config smoke
  qadapter customize --config smoke --force                   although nothing is new""",
    ),
    "announce": PipelineCommand(
        recurring.announce,
        "announce new preferences to the running server",
        """\
  qadapter announce --config smoke""",
    ),
    "check": PipelineCommand(
        recurring.check,
        "measure the champion again",
        """\
  qadapter check --config smoke""",
    ),
    "history": PipelineCommand(
        recurring.history,
        "show every version of a registered model and why it was promoted or rejected",
        """\
  qadapter history --config smoke""",
    ),
    "rollback": PipelineCommand(
        recurring.rollback,
        "make the previous champion serve again",
        """\
  qadapter rollback --config smoke
  qadapter rollback --config smoke --to 3""",
    ),
    "alerts": PipelineCommand(
        alerts.alerts,
        "be told in Slack, by e-mail or by a POST when a run is rejected or fails",
        """\
  qadapter alerts slack --url https://hooks.slack.com/services/…
  qadapter alerts email --url "mailtos://user:password@smtp.example.org:587?from=bot@example.org&to=me@example.org"
  qadapter alerts webhook --remove""",
    ),
    "up": PipelineCommand(
        serve.up,
        "start Prefect's server and a worker, with all deployments",
        """\
  qadapter up --limit 2""",
    ),
    "serve-model": PipelineCommand(
        serve_model.serve_model,
        "serve registered versions with OpenAI's chat API",
        """\
  qadapter serve-model policy@champion
  qadapter serve-model policy/3 --port 8001
  qadapter serve-model policy@champion policy@previous""",
    ),
    "drop": PipelineCommand(
        drop.drop,
        "write a delivery of toy preferences, to try the recurring flow without data",
        """\
  qadapter drop --kind good --part 1""",
    ),
}


def add_commands(app: typer.Typer) -> None:
    """Add the pipeline's subcommands to the library's."""
    for name, command in COMMANDS.items():
        add_command(
            app,
            name,
            _prepared(name, command.function),
            summary=command.summary,
            examples=command.examples,
            section=SECTION,
        )


def _prepared(name: str, function: Callable[..., int | None]) -> Callable[..., int | None]:
    """The function, with the process set up first.

    Raises:
        QAdapterError: the extra with Prefect and MLflow is not installed.
    """

    @functools.wraps(function)
    def prepared(**values: Any) -> int | None:
        if missing := [package for package in ("prefect", "mlflow") if find_spec(package) is None]:
            raise QAdapterError(
                f"`qadapter {name}` needs {' and '.join(missing)}; install the pipeline in its checkout: "
                'pip install -e ".[pipeline]"'
            )
        prepare_environment()
        return function(**values)

    return prepared
