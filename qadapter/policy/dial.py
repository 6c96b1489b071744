"""A trained Q-Adapter with α0 moved: the dial between the old model and the new preference, set without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qadapter.policy.files import SETTINGS_FILE, read_settings
from qadapter.policy.ranges import check_dials


def set_alpha_0(adapter: Path, alpha_0: float, out: Path) -> None:
    """Copy an adapter's folder and set its α0; the objective that it was trained with stays on record.

    Args:
        adapter: folder that `QAdapterForCausalLM.save_pretrained` or a training wrote.
        alpha_0: at least 0.
        out: a folder that does not exist yet.

    Raises:
        QAdapterError: it is no Q-Adapter, or `alpha_0` is negative.
    """
    check_dials(alpha_0, read_settings(adapter).alpha_tilde)
    shutil.copytree(adapter, out)
    file = out / SETTINGS_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_0": alpha_0}, indent=2) + "\n")
