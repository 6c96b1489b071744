"""The command line: which subcommands there are, and the process around them."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from qadapter.command import options
from qadapter.command.app import add_command, call, new_app
from qadapter.command.flags import from_flags
from qadapter.config.base import Settings
from qadapter.files.shown import guard_logs, quiet_libraries

_DISTRIBUTION = "qadapter-pipeline"


@dataclass(frozen=True)
class LibraryCommand:
    """A subcommand of the library.

    Attributes:
        options: its flags, which are its config file's keys too.
        summary: what it does.
        examples: lines of its help.
        after_interrupt: what to do after Ctrl-C.
    """

    options: type[Settings]
    summary: str
    examples: str
    after_interrupt: str = ""


# Named like the modules whose `run` does the work. They import torch; nothing that `--help` needs does.
COMMANDS: dict[str, LibraryCommand] = {
    "train": LibraryCommand(
        options.TrainOptions,
        "train a Q-Adapter on preference pairs",
        """\
  qadapter train --base base --data pairs.jsonl --output out --epochs 3
  qadapter train --config train.yaml --learning-rate 1e-3     the flag wins
  qadapter train --config train.yaml --resume                 after it was stopped""",
        "; the same command with --resume continues from the last checkpoint",
    ),
    "generate": LibraryCommand(
        options.GenerateOptions,
        "answer prompts",
        """\
  qadapter generate --adapter out --prompt "How are you?" --compare-base
  qadapter generate --adapter out --prompts prompts.txt --output answers.jsonl --temperature 0.7
  qadapter generate --adapter out --adapter other --weights 0.5,0.5 --prompt "How are you?" """,
    ),
    "score": LibraryCommand(
        options.ScoreOptions,
        "score held-out preference pairs: accuracy, margins, calibration",
        """\
  qadapter score --adapter out --data out/data/heldout.jsonl
  qadapter score --adapter out --data pairs.jsonl --output scores.jsonl""",
    ),
    "data": LibraryCommand(
        options.ShowDataOptions,
        "show what is recognised in preference data, before anything is trained",
        """\
  qadapter data pairs.jsonl
  qadapter data votes.csv --fields '{prompt: question, responses: {A: answer_a, B: answer_b}, preferred: vote}'""",
    ),
    "chat": LibraryCommand(
        options.ChatOptions,
        "talk to a policy in the terminal",
        """\
  qadapter chat --adapter out
  qadapter chat --adapter out --alpha-0 2 --alpha-tilde 2 --temperature 0.7 --show-base""",
    ),
    "export": LibraryCommand(
        options.ExportOptions,
        "write a policy as an ordinary checkpoint, a LoRA folder or a GGUF file, with a model card",
        """\
  qadapter export out --output merged
  qadapter export out --dial scale=0.5 --format lora --output half
  qadapter export out --dial q-weight=0.75 --approximate --output near
  qadapter export out --output merged --push-to-hub owner/name""",
    ),
    "dial": LibraryCommand(
        options.DialOptions,
        "choose how far an adapter goes from its base, under a forgetting budget",
        """\
  qadapter dial out --budget 0.01 --tasks hellaswag,blimp
  qadapter dial out --budget 0.02 --per-task 0.05 --tasks toy_facts,toy_sums --benchmarks world --save""",
    ),
    "serve": LibraryCommand(
        options.ServeOptions,
        "serve a base and its adapters with OpenAI's chat API",
        """\
  qadapter serve --adapter out
  qadapter serve --adapter harmless=out --adapter academy=other --base base --port 8000""",
    ),
}


def evaluate(context: typer.Context) -> int:
    """Run lm-eval's command line with what follows `qadapter eval`."""
    from qadapter.evaluation.lm_eval.command import main as lm_eval

    return lm_eval(context.args)


def build_app() -> typer.Typer:
    """The command `qadapter` with all subcommands that are there: the library's, and a checkout's own."""
    app = new_app()
    for name, command in COMMANDS.items():
        add_command(
            app,
            name,
            from_flags(command.options, _lazily(name)),
            summary=command.summary,
            examples=command.examples,
            after_interrupt=command.after_interrupt,
        )
    add_command(
        app,
        "eval",
        evaluate,
        summary="measure a model or an adapter with lm-eval's benchmarks; what follows is lm-eval's command line",
        examples="""\
  qadapter eval run --model qadapter --model_args pretrained=out --tasks gsm8k_cot --apply_chat_template
  qadapter eval run --help                                    lm-eval's own flags""",
        passes_on=True,
    )
    for add in _checkout_commands():
        add(app)
    return app


def _lazily(name: str) -> Callable[[Any], None]:
    """The work of a library's command, imported when it is done."""

    def run(read: Any) -> None:
        importlib.import_module(f"qadapter.command.{name}").run(read)

    return run


@cache
def _checkout_commands() -> tuple[Callable[[typer.Typer], None], ...]:
    """What adds further commands: the `pyproject.toml` beside the library names it, so a checkout only.

    Not an entry point: a wheel has the library alone, and an environment may have been installed from another checkout.
    """
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        return ()
    settings = tomllib.loads(file.read_text(encoding="utf-8"))
    if settings.get("project", {}).get("name") != _DISTRIBUTION:
        return ()
    module, _, function = settings["tool"]["qadapter"]["commands"].partition(":")
    package = find_spec(module.partition(".")[0])
    if package is None or not Path(str(package.origin)).is_relative_to(file.parent):
        return ()  # a package of the user's that has the same name
    return (getattr(importlib.import_module(module), function),)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    Args:
        arguments: in place of the process's own.

    Returns:
        0 done, 2 refused (one line on stderr says why), 1 failed, 130 stopped by Ctrl-C.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    quiet_libraries()
    guard_logs()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # or the end of the process searches all that was imported for cycles: 1.1 s after a run
    return call(build_app(), list(sys.argv[1:] if arguments is None else arguments))
