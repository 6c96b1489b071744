"""`qadapter init`: a commented profile for the user's own model, pairs and benchmarks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from qadapter.errors import QAdapterError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def init(
    model: Annotated[
        str | None, typer.Option(help="folder or hub id of a causal language model", show_default=False)
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="preference pairs: file, folder, URL or hub:owner/name", show_default=False),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="what the model should keep: a file of your own questions (FILE or NAME=FILE), or a task of lm-eval "
            "(gsm8k_cot); may be repeated",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the experiment and of the registered model (default: that of the pairs)")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for the files", show_default=False)] = Path(),
) -> None:
    """Write the profile and the customization; asks on a terminal for what is not given.

    Raises:
        QAdapterError: something is missing and there is no terminal, cannot be used, or a file already exists.
    """
    given = {"--model": model, "--pairs": pairs, "--benchmark": benchmark}
    missing = [flag for flag, value in given.items() if not value]
    if missing and not sys.stdin.isatty():
        raise QAdapterError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required without a terminal")
    model = model or str(typer.prompt("Model (folder or hub id)"))
    pairs = pairs or str(typer.prompt("Preference pairs (file, folder, URL or hub:owner/name)"))
    benchmarks = benchmark or str(typer.prompt("What should it keep (file of questions, or a task of lm-eval)")).split()
    suggested = re.sub(r"[^a-z0-9_-]+", "-", Path(pairs.rpartition(":")[2]).stem.lower()).strip("-_") or "mine"
    if name is None:
        name = str(typer.prompt("Name", default=suggested)) if missing else suggested
    if not _NAME.fullmatch(name):
        raise QAdapterError(f"--name {name!r}: expected lower-case letters, digits, - and _, for example {suggested!r}")
    profile, weekly = output / f"{name}.yaml", output / f"{name}-weekly.yaml"
    if there := [str(file) for file in (profile, weekly) if file.exists()]:
        raise QAdapterError(f"{there[0]} already exists; give another --name or --output, or remove it")

    from qadapter.config.customization import load_customization
    from qadapter.planning.own_profile import look_at, profile_text, weekly_text

    found = look_at(model, pairs, benchmarks)
    output.mkdir(parents=True, exist_ok=True)
    deliveries = (output / f"{name}-deliveries").absolute()
    profile.write_text(profile_text(name, str(profile), found), encoding="utf-8")
    weekly.write_text(weekly_text(name, str(weekly), profile.absolute(), deliveries, found), encoding="utf-8")
    load_customization(str(weekly)).experiment()  # both are valid
    read = "not read yet" if found.usable is None else f"{found.usable} usable on {found.prompts} prompts"
    sys.stdout.write(
        f"{profile}: model {found.model}; pairs {read}; keeps {', '.join([*found.tasks, *found.own])}\n"
        f"{weekly}: new pairs from {deliveries}\n"
        f"next: qadapter plan --profile {profile}\n"
    )
