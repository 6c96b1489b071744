"""The frame of every subcommand: flags in sections, one-line errors, exit codes.

Typer reads the flags and writes help and completion. transformers requires it, so users of the library have it anyway.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from qadapter.errors import QAdapterError, did_you_mean
from qadapter.files.folders import shown_path

PROGRAM = "qadapter"
REFUSED, FAILED, INTERRUPTED = 2, 1, 130


class CommandFailedError(Exception):
    """Work that failed, as one sentence for the user; details are in the log. Exit code 1."""


class Group(TyperGroup):
    """The command with its subcommands; for an unknown name it suggests the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Typer's hook: from the first word to the subcommand.

        Raises:
            QAdapterError: there is no such subcommand.
        """
        if not ctx.resilient_parsing and args[0] not in self.commands:
            raise QAdapterError(f"unknown command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Typer's hook: the list of subcommands, a heading for each section."""
        for section, commands in _grouped(list(self.commands.values())).items():
            with formatter.section(section or "Commands"):
                formatter.write_dl([(command.name, command.get_short_help_str(90)) for command in commands])


class Command(TyperCommand):
    """A subcommand whose help has its flags in sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Typer's hook: arguments first, then the flags, a heading for each section."""
        parameters = [each for each in self.get_params(ctx) if each.get_help_record(ctx)]
        arguments = [each for each in parameters if each.param_type_name == "argument"]
        flags = _grouped([each for each in parameters if each not in arguments])
        for section, shown in {"Arguments": arguments, **flags}.items():
            if shown:
                with formatter.section(section or "Options"):
                    formatter.write_dl([each.get_help_record(ctx) for each in shown])


def _grouped(entries: list[Any]) -> dict[str | None, list[Any]]:
    """Entries by the section that they were added under; those without one come last."""
    groups: dict[str | None, list[Any]] = {}
    for entry in sorted(entries, key=lambda entry: not entry.rich_help_panel):
        groups.setdefault(entry.rich_help_panel, []).append(entry)
    return groups


def new_app() -> typer.Typer:
    """The command without subcommands; `add_command` adds them."""
    app = typer.Typer(
        cls=Group,
        name=PROGRAM,
        help="Customise a language model to new preferences without forgetting.",
        epilog="Each command has its own --help, with examples.",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
        ] = False,
    ) -> None:
        pass

    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        import qadapter

        print(f"{PROGRAM} {qadapter.__version__}")
        raise typer.Exit


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., int | None],
    *,
    summary: str,
    examples: str = "",
    section: str = "Commands",
    after_interrupt: str = "",
    passes_on: bool = False,
) -> None:
    """Add a subcommand.

    Args:
        app: the command to extend.
        name: the subcommand.
        function: does the work; its parameters, annotated as Typer reads them, are the arguments. Its result is the
            exit code, None for 0. What it raises becomes one line on stderr: `QAdapterError` with exit code 2,
            anything else with 1.
        summary: what it does, in the list of commands and at the head of its help.
        examples: lines under the help.
        section: heading in the list of commands.
        after_interrupt: what to do after Ctrl-C.
        passes_on: the rest of the command line belongs to another program; the function's parameter of type
            `typer.Context` has it in `args`.
    """
    signature = inspect.signature(function, eval_str=True)
    shown = inspect.Parameter(
        "traceback",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--traceback", help="show where an error comes from")],
    )

    @functools.wraps(function)
    def run(*, traceback: bool, **values: Any) -> int:
        return _guarded(functools.partial(function, **values), traceback, after_interrupt)

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), shown])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    app.command(
        name,
        cls=Command,
        help=f"{summary[0].upper()}{summary[1:]}.",
        short_help=summary,
        epilog=f"\b\nexamples:\n{examples}" if examples else None,
        rich_help_panel=section,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
        if passes_on
        else None,
    )(run)


def _guarded(function: Callable[[], int | None], shown: bool, after_interrupt: str) -> int:
    """The exit code of a subcommand; errors are printed on one line."""
    try:
        return function() or 0
    except QAdapterError as error:
        return _failed(str(error), REFUSED, shown)
    except CommandFailedError as error:
        return _failed(str(error), FAILED, shown)
    except KeyboardInterrupt:
        return _failed(f"stopped by Ctrl-C{after_interrupt}", INTERRUPTED, shown)
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.filename is None or error.strerror is None:
            return _failed(_unexpected(error, shown), FAILED, shown)
        files = " → ".join(shown_path(str(name)) for name in (error.filename, error.filename2) if name is not None)
        return _failed(f"{files}: {error.strerror}", FAILED, shown)
    except Exception as error:
        return _failed(_unexpected(error, shown), FAILED, shown)


def _unexpected(error: Exception, shown: bool) -> str:
    what = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {what}" + ("" if shown else "; add --traceback to see where")


def _failed(message: str, code: int, shown: bool) -> int:
    if shown:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def call(app: typer.Typer, arguments: list[str]) -> int:
    """Run the subcommand that a command line names; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        if not arguments:
            command.main(["--help"], prog_name=PROGRAM, standalone_mode=False)
            raise QAdapterError("no command was given; choose one of those above")
        return int(command.main(arguments, prog_name=PROGRAM, standalone_mode=False) or 0)
    except QAdapterError as error:
        return _failed(str(error), REFUSED, shown=False)
    except TyperException as error:
        return _failed(_explained(error), REFUSED, shown=False)
    except typer.Abort:
        return _failed("stopped", INTERRUPTED, shown=False)


def _explained(error: TyperException) -> str:
    """The message about an argument that Typer could not parse, with the nearest flag or a reference to the help."""
    context = getattr(error, "ctx", None)
    if context is not None and hasattr(error, "possibilities"):  # an unknown flag
        flags = [flag for each in context.command.get_params(context) for flag in (*each.opts, *each.secondary_opts)]
        given = str(error.option_name)  # type: ignore[attr-defined]
        return f"unknown flag {given}{did_you_mean(given, [flag for flag in flags if flag.startswith('--')])}"
    message = error.format_message().strip().rstrip(".")
    where = context.command_path if context is not None else PROGRAM
    if message.startswith("Got unexpected extra argument"):
        first = message.rpartition("(")[2].rstrip(")").split()[0]
        return f"unexpected argument {first!r}; values belong behind a flag, see {where} --help"
    return f"{message[0].lower()}{message[1:]}; see {where} --help"
