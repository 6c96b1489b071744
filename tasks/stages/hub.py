"""The immutable identity of a model on the hub: the commit behind a branch, since branches move."""

from __future__ import annotations

from transformers.utils.hub import cached_file, extract_commit_hash


def commit_of(model: str, revision: str | None) -> str | None:
    """Look up the commit of a hub id, in the local cache or on the hub.

    Args:
        model: hub id.
        revision: branch, tag or commit; None: main.

    Returns:
        The commit; `revision` if the hub cannot be reached.
    """
    try:
        return extract_commit_hash(cached_file(model, "config.json", revision=revision or "main"), None) or revision
    except (OSError, ValueError):
        return revision
