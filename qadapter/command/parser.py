"""The command line: subcommands, help, errors."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from qadapter.command import options
from qadapter.command.flags import Parser, add_flags, read_options, refuse_unknown
from qadapter.config.base import Settings
from qadapter.errors import QAdapterError

# Named like the modules whose `run` does the work. They import torch; nothing that `--help` needs does.
COMMANDS: dict[str, tuple[type[Settings], str, str]] = {
    "train": (
        options.TrainOptions,
        "train a Q-Adapter on preference pairs",
        """\
  python -m qadapter train --base base --data pairs.jsonl --output out --preset residual --epochs 3
  python -m qadapter train --config train.yaml --learning-rate 1e-3     the flag wins
  python -m qadapter train --config train.yaml --resume                 after it was stopped""",
    ),
    "generate": (
        options.GenerateOptions,
        "answer prompts",
        """\
  python -m qadapter generate --adapter out --prompt "How are you?" --compare-base
  python -m qadapter generate --adapter out --prompts prompts.txt --output answers.jsonl --temperature 0.7
  python -m qadapter generate --adapter out --adapter other --weights 0.5,0.5 --prompt "How are you?" """,
    ),
    "score": (
        options.ScoreOptions,
        "score held-out preference pairs: accuracy, margins, calibration",
        """\
  python -m qadapter score --adapter out --data out/data/heldout.jsonl
  python -m qadapter score --adapter out --data pairs.jsonl --output scores.jsonl""",
    ),
    "chat": (
        options.ChatOptions,
        "talk to a policy",
        """\
  python -m qadapter chat --adapter out
  python -m qadapter chat --adapter out --alpha-0 0.5 --temperature 0.7 --show-base""",
    ),
}
_OTHERS = {
    "--config": "YAML file with the same keys as the flags (batch_size: 8); flags win",
    "--debug": "show where an error comes from",
}


def build_parser() -> Parser:
    """The parser of `python -m qadapter`."""
    parser = Parser(
        prog="python -m qadapter",
        description="Q-Adapter without the pipeline: train an adapter on preferences and use it.",
        epilog="Each command has its own --help with examples. The guide is docs/command.md.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|generate|score|chat")
    for name, (choices, summary, examples) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"python -m qadapter {name} [flags]",
            allow_abbrev=False,
        )
        add_flags(command, choices)
        command.add_argument("--config", metavar="FILE", help=_OTHERS["--config"])
        command.add_argument("--debug", action="store_true", help=_OTHERS["--debug"])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    Args:
        arguments: in place of the process's own.

    Returns:
        0 done, 2 refused (one line on stderr says why), 1 failed in a way nobody foresaw, 130 stopped by Ctrl-C.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PEFT and TRL use names that transformers deprecates; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    debug, command = False, ""
    try:
        given, unknown = build_parser().parse_known_args(arguments)
        values = vars(given)
        command, config, debug = values.pop("command"), values.pop("config"), values.pop("debug")
        choices = COMMANDS[command][0]
        refuse_unknown(unknown, choices, _OTHERS)
        read = read_options(choices, values, config)
        importlib.import_module(f"qadapter.command.{command}").run(read)
    except QAdapterError as error:
        return _failed(str(error), 2, debug)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from the last checkpoint" if command == "train" else ""
        return _failed(f"stopped by Ctrl-C{hint}", 130, debug)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        what = " ".join(str(error).split()) or "no message"
        hint = "" if debug else "; add --debug to see where"
        return _failed(f"{type(error).__name__}: {what}{hint}", 1, debug)
    return 0


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code
