"""Options that would have no effect are refused by name, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from qadapter.command.options import ExportOptions, TrainOptions
from qadapter.config.base import Settings

TRAIN = {"data": "pairs", "base": "base", "output": "out"}
EXPORT = {"adapter": ["adapter"], "output": "out"}


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        (TrainOptions, {**TRAIN, "heldout": 0.2, "heldout_data": "held"}, "heldout has no effect with heldout_data"),
        (TrainOptions, {**TRAIN, "heldout": 0, "heldout_split": "test"}, "heldout has no effect with heldout_split"),
        (ExportOptions, {**EXPORT, "data": "pairs"}, "data has no effect without approximate"),
        (ExportOptions, {**EXPORT, "limit": 64}, "limit has no effect without approximate"),
        (ExportOptions, {**EXPORT, "max_length": 64}, "max_length has no effect without approximate"),
        (
            ExportOptions,
            {**EXPORT, "approximate": True, "format": "adapter"},
            "approximate has no effect on the format",
        ),
        (ExportOptions, {**EXPORT, "public": True}, "public has no effect without push_to_hub"),
    ],
)
def test_an_option_without_effect_is_refused(options: type[Settings], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(**given)


def test_options_that_have_an_effect_are_taken() -> None:
    TrainOptions(**TRAIN, heldout=0.2)
    TrainOptions(**TRAIN, heldout_data="held")
    ExportOptions(**EXPORT, approximate=True, data="pairs", limit=3)
    ExportOptions(**EXPORT, public=True, push_to_hub="owner/name")
