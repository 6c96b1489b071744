"""The pre-training data of a model from scratch: conversations from corpora and from preference pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json_lines
from qadapter.preferences.pair import Message, load_pairs


def read_corpus(folders: Sequence[Path]) -> list[list[Message]]:
    """Read the conversations of each folder once.

    A folder with `corpus.jsonl` (rows `{"messages": […]}`) provides those. A folder of prepared pairs provides both
    replies of its training pairs, since pre-training does not depend on preferences. Held-out pairs are never read.

    Raises:
        QAdapterError: a folder has neither file.
    """
    conversations: dict[str, list[Message]] = {}
    for folder in folders:
        if (folder / "corpus.jsonl").is_file():
            rows = read_json_lines(folder / "corpus.jsonl")
            # A toy world's corpus contains repetitions on purpose: their frequencies set the base's uncertainty.
            conversations |= {f"{folder.name}-{i}": row["messages"] for i, row in enumerate(rows)}
        elif (folder / "train.jsonl").is_file():
            for pair in load_pairs(folder / "train.jsonl"):
                for reply in (pair.chosen, pair.rejected):
                    messages = [*pair.prompt, Message(role="assistant", content=reply)]
                    conversations[json.dumps(messages)] = messages
        else:
            raise QAdapterError(f"{folder} has neither corpus.jsonl nor train.jsonl: it is not a pre-training corpus")
    return list(conversations.values())
