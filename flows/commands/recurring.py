"""The commands of a recurring customisation.

python -m flows.commands.recurring customize --config smoke     look for new preferences: train, judge, promote, reject
                                                       (--force: also if nothing is new)
python -m flows.commands.recurring announce --config smoke      tell a running server that there are some
python -m flows.commands.recurring check --config smoke         measure the champion again
python -m flows.commands.recurring history --config smoke       every version, from the registry alone
python -m flows.commands.recurring rollback --config smoke      the previous champion serves again (--to 3: version 3)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from flows.environment import prepare_environment
from flows.prefect_host.server import prefect_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the flow failed, 2 refused."""
    prepare_environment()
    from qadapter.config.customization import customizations
    from qadapter.errors import QAdapterError

    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "customize": _customize,
        "announce": _announce,
        "check": _check,
        "history": _history,
        "rollback": _roll_back,
    }
    parser = argparse.ArgumentParser(
        prog="python -m flows.commands.recurring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands)
    known = ", ".join(customizations())
    parser.add_argument("--config", default="smoke", help=f"one of {known}, or a YAML file (default: smoke)")
    parser.add_argument("--to", type=int, metavar="VERSION", help="rollback: which version (default: the previous one)")
    parser.add_argument("--even-rejected", action="store_true", help="rollback: --to may name a rejected version")
    parser.add_argument("--force", action="store_true", help="customize: train and judge although nothing is new")
    given = parser.parse_args(arguments)
    try:
        return commands[given.command](given)
    except QAdapterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _customize(given: argparse.Namespace) -> int:
    from flows.customize import customize_on_new_preferences

    return _run_flow(customize_on_new_preferences, given.config, force=given.force)


def _check(given: argparse.Namespace) -> int:
    from flows.check_champion import check_champion

    return _run_flow(check_champion, given.config)


def _run_flow(flow: Any, config: str, **parameters: Any) -> int:
    """Call a flow, with the server that answers or one of its own; say how it ended."""
    from flows.running.launch import check_workspace
    from qadapter.config.customization import load_customization
    from tasks.stages.context import workspace

    load_customization(config).experiment()  # refuse what cannot work before Prefect starts anything
    check_workspace(workspace())
    with prefect_server():
        state = flow(config, **parameters, return_state=True)
    done = state.is_completed()  # not merely "did not fail": it may have crashed or been cancelled
    (sys.stdout if done else sys.stderr).write(f"{state.name}: {state.message}\n")
    return 0 if done else 1


def _announce(given: argparse.Namespace) -> int:
    from flows.prefect_host.server import server_access
    from qadapter.config.customization import load_customization

    customization = load_customization(given.config)
    with server_access("Without a server: `make customize`.") as url:
        from flows.watch_preferences import ANNOUNCED, announce

        announce(customization)
    sys.stdout.write(f"{ANNOUNCED} for {customization.name} sent to {url}\n")
    return 0


def _history(given: argparse.Namespace) -> int:
    from qadapter.config.customization import load_customization
    from tasks.candidate import registry_of

    customization = load_customization(given.config)
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
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _roll_back(given: argparse.Namespace) -> int:
    from qadapter.config.customization import load_customization
    from tasks.candidate import registry_of

    registry = registry_of(load_customization(given.config))
    before, now = registry.roll_back(given.to, even_rejected=given.even_rejected)
    sys.stdout.write(f"{registry.name}: version {now.number} is the champion again, after version {before.number}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
