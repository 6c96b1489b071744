"""What a model of the hub is for good: not the branch that was asked for, which moves on, but the commit behind it."""

from __future__ import annotations

from transformers.utils.hub import cached_file, extract_commit_hash


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit of a hub id, from the hub's cache, or the hub.

    Args:
        model: hub id.
        revision: branch, tag or commit; None: main.

    Returns:
        The commit; where it is not to be reached from here `revision`, which is all that is known then.
    """
    try:
        return extract_commit_hash(cached_file(model, "config.json", revision=revision or "main"), None) or revision
    except (OSError, ValueError):
        return revision
