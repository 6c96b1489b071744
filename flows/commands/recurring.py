"""`qadapter customize`, `announce`, `check`, `history`, `rollback`: the commands of a recurring customization."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from flows.commands.arguments import Config
from flows.prefect_host.server import prefect_server
from qadapter.files.shown import visible


def customize(
    config: Config = "smoke",
    force: Annotated[bool, typer.Option("--force", help="train and judge although nothing is new")] = False,
) -> int:
    """Look for new preferences; returns the exit code of `flows.running.outcomes`."""
    from flows.customize import customize_on_new_preferences

    return _run_flow(customize_on_new_preferences, config, force=force)


def check(config: Config = "smoke") -> int:
    """Measure the champion again; returns the exit code of `flows.running.outcomes`."""
    from flows.check_champion import check_champion

    return _run_flow(check_champion, config)


def _run_flow(flow: Any, config: str, **parameters: Any) -> int:
    """Run a flow on the available server or a temporary one, and print its final state."""
    from flows.running.outcomes import exit_code
    from flows.running.run_request import check_workspace
    from qadapter.config.customization import load_customization
    from tasks.stages.context import workspace

    load_customization(config).experiment()  # refuse what cannot work before Prefect starts anything
    check_workspace(workspace())
    with prefect_server():
        state = flow(config, **parameters, return_state=True)
    code = exit_code(state)
    (sys.stderr if code else sys.stdout).write(f"{state.name}: {state.message}\n")
    return code


def announce(config: Config = "smoke") -> None:
    """Send the event that starts the customization's deployment.

    Raises:
        QAdapterError: no Prefect server answers.
    """
    from flows.prefect_host.server import server_access
    from qadapter.config.customization import load_customization

    customization = load_customization(config)
    with server_access("Without a server: `make customize`.") as url:
        from flows.watch_preferences import ANNOUNCED
        from flows.watch_preferences import announce as emit

        emit(customization)
    sys.stdout.write(f"{ANNOUNCED} for {customization.name} sent to {url}\n")


def history(config: Config = "smoke") -> None:
    """Print every version of the registered model."""
    from qadapter.config.customization import load_customization
    from tasks.candidate import registry_of

    customization = load_customization(config)
    versions = registry_of(customization).versions()
    if not versions:
        sys.stdout.write(f"{customization.model_name}: no version yet\n")
    for version in versions:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created))
        verdict = "rejected" if version.rejected else "promoted" if "promoted_at" in version.tags else "to be promoted"
        if "superseded_at" in version.tags and "promoted_at" not in version.tags:
            verdict = "rolled back to" if "rolled_back_to_at" in version.tags else "superseded"
        parent = f"from {version.tags['parent']}" if version.tags.get("parent") else "from the base"
        names = ", ".join(version.aliases)
        shown = {
            name: value
            for name, value in version.metrics.items()
            if name in ("adaptation/implied_reward_accuracy", "adaptation/score", "retention/mean", "forgetting/mean")
        }
        lines = [
            f"{version.number:>4}  {when}  {verdict:<14} {parent:<14} {names}",
            f"      data {version.tags.get('data_digest', '')[:12]}, {version.tags.get('data_pairs', '?')} pairs; "
            f"config {version.tags.get('config_digest', '')[:12]}; MLflow run {version.run_id}",
            "      " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()),
            *(f"      {reason}" for reason in version.tags.get("reasons", "").splitlines()),
        ]
        if "rolled_back_to_at" in version.tags:
            lines.append(f"      rolled back to, {version.tags['rolled_back_to_at']}")
        sys.stdout.write(visible("\n".join(lines)) + "\n")


def rollback(
    config: Config = "smoke",
    to: Annotated[int | None, typer.Option(metavar="VERSION", help="which version (default: the previous one)")] = None,
    even_rejected: Annotated[bool, typer.Option("--even-rejected", help="--to may name a rejected version")] = False,
) -> None:
    """Make the previous champion, or a version of the user's choice, the champion.

    Raises:
        QAdapterError: there is no such version, or it was rejected.
    """
    from qadapter.config.customization import load_customization
    from tasks.candidate import registry_of

    registry = registry_of(load_customization(config))
    before, now = registry.roll_back(to, even_rejected=even_rejected)
    sys.stdout.write(f"{registry.name}: version {now.number} is the champion again, after version {before.number}\n")
