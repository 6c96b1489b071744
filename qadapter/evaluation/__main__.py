"""lm-eval's own command line, which knows Q-Adapters and this project's tasks too.

    python -m qadapter.evaluation run --model qadapter --model_args pretrained=ADAPTER_FOLDER --tasks gsm8k_cot \\
        --apply_chat_template --fewshot_as_multiturn

All arguments are lm-eval's, plus `--data FOLDER` for the tasks of `configs/lm_eval`. The command `lm_eval` itself knows
only the models that are part of it (0.4.13).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from qadapter.errors import QAdapterError
from qadapter.evaluation import lm_eval_model  # noqa: F401  # registers the model `qadapter`
from qadapter.evaluation.task_catalog import render_templates


def main(arguments: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line; returns the exit code.

    Args:
        arguments: in place of the process's own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*", default=[])
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours, rest = parser.parse_known_args(given)
    names = [name for some in ours.tasks for name in some.split(",")]
    if ours.tasks:
        rest += ["--tasks", ",".join(names)]
    before = sys.argv
    with tempfile.TemporaryDirectory(prefix="qadapter-tasks-") as rendered:
        if ours.data is not None:
            render_templates(Path(rendered), names, ours.data)
            rest += ["--include_path", rendered]
        sys.argv = ["lm_eval", *rest]
        try:
            cli_evaluate()
        except QAdapterError as error:
            print(error, file=sys.stderr)  # noqa: T201
            return 1
        finally:
            sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
