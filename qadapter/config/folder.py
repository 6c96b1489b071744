"""The folder of the project's config files: `configs/` in a checkout, or its copy in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)
"""Profiles (`*.yaml`) and the folders `accelerate`, `alerts`, `customize`, `lm_eval`, `sweep`, `work_pools`."""
