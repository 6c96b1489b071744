"""Where the project's own config files lie: `configs/` of a checkout, or the copy that a wheel carries."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)
"""Profiles (`*.yaml`) and the folders `accelerate`, `customize`, `lm_eval`, `sweep`, `work_pools`."""
