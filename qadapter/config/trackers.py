"""Trackers beside MLflow: whether each can be used, which is more than whether it is installed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any, Literal

from qadapter.errors import QAdapterError, first_reason

Tracker = Literal["tensorboard", "wandb", "trackio"]

# What the libraries import of each
_IMPORTED = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio.context_vars"}
# Those that TRL imports wherever they are installed, asked for or not
_OF_TRL = ("wandb", "trackio", "comet_ml")


def why_unusable(name: str) -> str | None:
    """Why an installed tracker cannot be imported; None where it can."""
    try:
        import_module(name)
        import_module(_IMPORTED.get(name, name))
    except Exception as error:  # of any kind: it is another project's package
        return f"{type(error).__name__}: {first_reason(error)}"
    if name == "wandb" and not hasattr(sys.modules[name], "run"):  # a folder that an uninstallation left
        return "it has no wandb.run"
    return None


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers of `report_to` that are not installed, or that are and cannot be imported.

    Raises:
        QAdapterError: naming them, with the reason.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise QAdapterError(
            f"report_to names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"install it (pip install {' '.join(missing)}) or leave it out"
        )
    for name in names:
        if (reason := why_unusable(name)) is not None:
            raise QAdapterError(
                f"report_to names {name}, which is installed but cannot be imported ({reason}); repair it "
                f"(pip install --upgrade {name}) or leave it out"
            )


def leave_out_unusable() -> None:
    """Make trackers that TRL would import and fail on look as if they were not installed."""
    for name in _OF_TRL:
        if name not in sys.modules and find_spec(name) is not None and (reason := why_unusable(name)) is not None:
            for module in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
                del sys.modules[module]
            sys.modules[name] = None  # type: ignore[assignment]  # "not found", for `import` and for `find_spec`
            logging.getLogger(__name__).warning(
                "%s is installed but cannot be imported (%s); trainings go on without it.", name, reason
            )


class _BeforeTrl(MetaPathFinder):
    """Finds nothing; looks at the trackers when TRL is about to be imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Python's hook: a module is imported for the first time."""
        if fullname == "trl" and self in sys.meta_path:
            sys.meta_path.remove(self)
            leave_out_unusable()
        return None


def look_before_trl() -> None:
    """Call `leave_out_unusable` as soon as TRL is imported: not before, since some trackers take seconds to import."""
    if "trl" not in sys.modules and not any(isinstance(one, _BeforeTrl) for one in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTrl())
