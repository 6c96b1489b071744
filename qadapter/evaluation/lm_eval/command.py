"""lm-eval's own command line, which knows Q-Adapters and this project's tasks and suites too.

    qadapter eval run --model qadapter --model_args pretrained=ADAPTER_FOLDER \\
        --tasks gsm8k_cot --apply_chat_template --fewshot_as_multiturn

All arguments are lm-eval's, plus

    --data FOLDER            its benchmarks/ has the items of the project's own tasks, and of lm-eval's own
    --official_data FOLDER   has the items of lm-eval's own tasks (see qadapter.evaluation.lm_eval.official_files)
    --plain_tasks TASK …     those of the tasks that --apply_chat_template does not apply to

`--model_args` of the model `qadapter` are those of `PolicyLM`: load_in_8bit=True or revision=COMMIT is of the adapter's
base, and what would make no difference is refused.

Tasks with and without chat template are two runs of lm-eval, one after the other: it knows one setting for all of its
tasks. `--tasks paper_suite` needs that: MMLU is asked without. The command `lm_eval` itself knows only the models that
are part of it (0.4.13).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval import model as lm_eval_model  # noqa: F401  # registers the model `qadapter`
from qadapter.evaluation.lm_eval.catalog import expand_suites, find_tasks
from qadapter.evaluation.lm_eval.definitions import needs_data
from qadapter.evaluation.lm_eval.official_files import write_definitions

_TEMPLATE_FLAGS = ("--apply_chat_template", "--fewshot_as_multiturn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line; returns the exit code: 0, or 2 where something was refused.

    Args:
        arguments: in place of the process's own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--official_data", type=Path)
    parser.add_argument("--plain_tasks", nargs="+", default=[])
    parser.add_argument("--tasks", nargs="*", default=[])
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours, rest = parser.parse_known_args(given)
    try:
        with tempfile.TemporaryDirectory(prefix="qadapter-tasks-") as rendered:
            names, plain = expand_suites(_names(ours.tasks), _names(ours.plain_tasks))
            _check_data_flags(ours, rest)
            if names and not _given("--include_path", rest):
                _render(names, ours.data, ours.official_data, Path(rendered))
                rest += ["--include_path", rendered]
            for command in _commands(rest, names, plain):
                _lm_eval(command)
    except QAdapterError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _names(given: Sequence[str]) -> list[str]:
    return [name for some in given for name in some.split(",") if name]


def _given(flag: str, arguments: Sequence[str]) -> bool:
    return any(one.partition("=")[0] == flag for one in arguments)


def _check_data_flags(ours: argparse.Namespace, rest: Sequence[str]) -> None:
    folders = {"--data": ours.data, "--official_data": ours.official_data}
    for flag, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise QAdapterError(f"{flag}: there is no folder {folder}.")
        if folder is not None and _given("--include_path", rest):
            raise QAdapterError(
                f"{flag} and --include_path were both given, and lm-eval searches one folder of tasks besides its own. "
                f"Leave one of them out."
            )


def _render(names: Sequence[str], data: Path | None, official_data: Path | None, into: Path) -> None:
    """Write the definitions that lm-eval does not have, or that read local files.

    Raises:
        QAdapterError: an unknown task (with the nearest names), or one that needs a data folder, and none was given.
    """
    listed = [name for name in names if not name.endswith(".yaml") and "*" not in name]  # lm-eval resolves the others
    if not listed:
        return
    found = find_tasks(listed)
    if data is None and (without := needs_data(found.local)):
        raise QAdapterError(f"Task {without[0]} reads its items from a data folder, and none was given. Give --data.")
    write_definitions(found, listed, data, official_data, into)


def _commands(rest: Sequence[str], names: Sequence[str], plain: Sequence[str]) -> list[list[str]]:
    """lm-eval's arguments: one command, or two where some tasks are asked without the chat template."""
    if not names:
        return [list(rest)]
    if not _given(_TEMPLATE_FLAGS[0], rest):
        return [[*rest, "--tasks", ",".join(names)]]
    # First those with template: where the tokenizer has none, that is said before anything long has run.
    parts = [
        (list(rest), [name for name in names if name not in plain]),
        (_without_template(rest), [name for name in names if name in plain]),
    ]
    return [[*some, "--tasks", ",".join(tasks)] for some, tasks in parts if tasks]


def _without_template(arguments: Sequence[str]) -> list[str]:
    """The arguments less the template's flags and the value that may follow each."""
    kept: list[str] = []
    dropping = False
    for one in arguments:
        dropping = one in _TEMPLATE_FLAGS or (dropping and not one.startswith("-"))
        if not dropping and one.partition("=")[0] not in _TEMPLATE_FLAGS:
            kept.append(one)
    return kept


def _lm_eval(arguments: Sequence[str]) -> None:
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
