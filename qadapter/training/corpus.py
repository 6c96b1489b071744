"""What a model from scratch reads: conversations, out of corpora and out of preference pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json_lines
from qadapter.preferences.pair import Message, load_pairs


def read_corpus(folders: Sequence[Path]) -> list[list[Message]]:
    """Conversations of each folder, every one once.

    A folder with `corpus.jsonl` (rows `{"messages": […]}`) gives those. A folder of prepared pairs gives its training
    pairs, both replies of each: pre-training has no opinion. Held-out pairs are never read.

    Raises:
        QAdapterError: a folder holds neither.
    """
    conversations: dict[str, list[Message]] = {}
    for folder in folders:
        if (folder / "corpus.jsonl").is_file():
            rows = read_json_lines(folder / "corpus.jsonl")
            # A toy world's corpus repeats itself on purpose: its frequencies are what the base is unsure about.
            conversations |= {f"{folder.name}-{i}": row["messages"] for i, row in enumerate(rows)}
        elif (folder / "train.jsonl").is_file():
            for pair in load_pairs(folder / "train.jsonl"):
                for reply in (pair.chosen, pair.rejected):
                    messages = [*pair.prompt, Message(role="assistant", content=reply)]
                    conversations[json.dumps(messages)] = messages
        else:
            raise QAdapterError(f"{folder} holds neither corpus.jsonl nor train.jsonl: it is no corpus to pre-train on")
    return list(conversations.values())
