"""The view of an experiment that MLflow's page opens with our link: adaptation against retention, and what matters.

MLflow 3 keeps a shared view of its table and charts in a tag of the experiment, `mlflow.sharedViewState.<key>`: JSON of
the page's own state. It opens the view where the address ends with `viewStateShareKey=<key>`. Read from the scripts of
MLflow 3.17's page; a page that does not know the format shows its own default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KEY = "qadapter"
VIEW_TAG = f"mlflow.sharedViewState.{KEY}"
NOTE_TAG = "mlflow.note.content"
FRESH_TAG = "fresh"
"""Tag of a run of which a stage was computed in its flow run; a run of found stages alone repeats an earlier one."""

_LEARNT, _KEPT = "adaptation/score", "retention/mean"
_METRICS = (
    _LEARNT,
    _KEPT,
    "forgetting/mean",
    "forgetting/kl_per_token",
    "adaptation/implied_reward_accuracy",
    "adaptation/win_rate",
    "adaptation/judge_accuracy",
    "adaptation/speaks",
    "cost/train_seconds",
)
_SECTION = "adaptation-against-retention"


def view_tags(experiment_id: str, known: Mapping[str, str]) -> dict[str, str]:
    """The tags of an experiment that are missing or of an older version of this view.

    Args:
        experiment_id: for the link in the experiment's description.
        known: the experiment's tags; a description of the user's stays.
    """
    wanted = {VIEW_TAG: json.dumps(view_state(), separators=(",", ":"))}
    if NOTE_TAG not in known:
        wanted[NOTE_TAG] = f"[Adaptation against retention, without repeated rows](#{view_path(experiment_id)})"
    return {name: value for name, value in wanted.items() if known.get(name) != value}


def view_path(experiment_id: str) -> str:
    """The path of the view behind the `#` of MLflow's address, beside the side bar of model training."""
    page = f"/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={KEY}"
    return f"{page}&workflowType=machine_learning"


def view_state() -> dict[str, Any]:
    """The page's state: which runs, which columns, which charts."""
    return {
        "searchFilter": f"tags.stage = 'customise' and tags.{FRESH_TAG} = 'True'",
        "orderByKey": _column("metrics", _LEARNT),
        "orderByAsc": False,
        "selectedColumns": [
            _column("tags", "domain"),
            _column("tags", "method"),
            *(_column("metrics", name) for name in _METRICS),
        ],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [
            {
                "uuid": _SECTION,
                "name": "Adaptation against retention",
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
            }
        ],
        "compareRunCharts": [
            {
                **_chart("scatter", "SCATTER"),
                "displayName": "learnt (right) against kept (up)",
                "xaxis": {"key": _LEARNT, "type": "METRIC"},
                "yaxis": {"key": _KEPT, "type": "METRIC"},
                "runsCountToCompare": 100,
            },
            {**_chart("learnt", "BAR"), "metricKey": _LEARNT, "displayName": "learnt", "runsCountToCompare": 100},
            {**_chart("kept", "BAR"), "metricKey": _KEPT, "displayName": "kept", "runsCountToCompare": 100},
        ],
        "isAccordionReordered": True,
    }


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _chart(name: str, kind: str) -> dict[str, Any]:
    return {
        "uuid": f"{KEY}-{name}",
        "type": kind,
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
    }
