"""A base with a smaller vocabulary: it keeps the tokens that some texts need, and reads those texts as before.

python examples/trim_vocabulary.py gemma-3-270m-q4_k_m.gguf gemma-3-270m-trimmed --texts path/to/folder

Two thirds of Gemma 3 270M's weights are the embeddings of 262,144 tokens, and on a CPU half of a step goes into
their logits. The English texts of an experiment need a quarter of them. What is left is another base: a token that is
gone has probability 0, and the others share what it had. Measure that base like any other.

Kept are the special tokens and bytes, the first tokens of the vocabulary (in a BPE vocabulary the most frequent ones),
and every token that a string of the texts needs, with the tokens that it can be merged from. Texts are JSON, JSON
Lines, Parquet or plain text in UTF-8, not packed.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.policy.base import load_network, load_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the smaller base into a folder and say how much of it is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder, GGUF file or hub id")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument(
        "--texts", type=Path, nargs="+", required=True, help="files or folders whose strings stay as they are"
    )
    parser.add_argument(
        "--tokens", type=int, default=8_192, help="so many first tokens of the vocabulary are kept anyway"
    )
    given = parser.parse_args(arguments)
    if given.output.exists():
        raise SystemExit(f"{given.output} exists. Name a new folder.")

    texts = sorted(set(strings(given.texts)))
    if not any(texts):
        raise SystemExit(f"There is no text in {', '.join(map(str, given.texts))}. Name the texts to keep.")
    tokenizer = load_tokenizer(given.base)
    network = load_network(given.base, dtype=torch.float32)
    kept = kept_tokens(tokenizer, texts, given.tokens, [old for *_, ids in token_ids(network) for old in ids])
    before = len(tokenizer)
    smaller = trim_tokenizer(tokenizer, kept)
    check(tokenizer, smaller, kept, texts)
    trim_network(network, kept)
    network.save_pretrained(given.output)
    smaller.save_pretrained(given.output)
    sizes = f"{len(kept):,} of {before:,} tokens, {network.num_parameters():,} parameters"
    print(f"{given.output}: {sizes}, {len(texts):,} texts checked")


def strings(places: Sequence[Path]) -> Iterator[str]:
    """Every string in the files: values of JSON, JSON Lines and Parquet, the lines of other texts."""
    for place in places:
        if not place.exists():
            raise SystemExit(f"There is no {place}. Name files or folders of texts.")
        for file in sorted(one for one in place.rglob("*") if one.is_file()) if place.is_dir() else [place]:
            try:
                yield from of_file(file)
            except ValueError as error:  # not UTF-8, or not JSON
                raise SystemExit(f"{file} cannot be read as text: {error}. Unpack it, or leave it out.") from error


def of_file(file: Path) -> Iterator[str]:
    """Every string in one file; see `strings`."""
    if file.suffix == ".parquet":
        yield from inside([dict(row) for row in Dataset.from_parquet(str(file), keep_in_memory=True)])
        return
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        yield from inside(json.loads(text))
    elif file.suffix == ".jsonl":
        # Not `splitlines`: it also cuts at the line separators that a JSON string may hold.
        yield from inside([json.loads(line) for line in text.split("\n") if line.strip()])
    else:
        yield from text.splitlines()


def inside(value: Any) -> Iterator[str]:
    """The strings of a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from inside(part)


def in_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text alone, after a space or a line as it stands in prompts, and as a question in the chat template."""
    found = [text, " " + text, "\n" + text]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": text}]
        found.append(str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
    return found


def kept_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], first: int, ends: Sequence[int] = ()
) -> list[int]:
    """The ids to keep, in order: `ends` and all that the module's description names."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise SystemExit(f"The tokenizer's model is {model['type']}. Only BPE can be trimmed here.")
    vocabulary: dict[str, int] = model["vocab"]
    merged_from: defaultdict[str, set[str]] = defaultdict(set)
    for left, right in model["merges"]:
        merged_from[left + right] |= {left, right}
    kept = set(range(min(first, len(tokenizer)))) | set(tokenizer.all_special_ids) | set(ends)
    # A chat template may end the assistant's turn with a special token that no name such as `eos_token` stands for.
    template = str(tokenizer.chat_template or "")
    kept |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.content in template}
    # Bytes, as GPT-2 and as Gemma write them
    kept |= {id_ for token, id_ in vocabulary.items() if len(token) == 1 and ord(token) < 0x180}
    kept |= {id_ for token, id_ in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token)}
    for text in texts:
        for ids in tokenizer(in_context(tokenizer, text))["input_ids"]:
            kept.update(ids)
    names = {id_: token for token, id_ in vocabulary.items()}
    waiting = list(kept)
    while waiting:
        for part in merged_from.get(names.get(waiting.pop(), ""), set()):
            if vocabulary[part] not in kept:
                kept.add(vocabulary[part])
                waiting.append(vocabulary[part])
    return sorted(kept)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with the kept tokens only, numbered in their old order."""
    new = {old: place for place, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder, "tokenizer.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content["model"]
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
        model["merges"] = [
            pair for pair in model["merges"] if all(part in model["vocab"] for part in (*pair, "".join(pair)))
        ]
        content["added_tokens"] = [{**t, "id": new[t["id"]]} for t in content["added_tokens"] if t["id"] in new]
        post_processor = content.get("post_processor") or {}
        for step in [post_processor, *post_processor.get("processors", [])]:  # one, or several in a row
            for token in step.get("special_tokens", {}).values():
                token["ids"] = [new[old] for old in token["ids"]]
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(folder)


def check(
    tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, kept: Sequence[int], texts: Sequence[str]
) -> None:
    """Stop unless the smaller tokenizer reads every text as the whole one does."""
    for text in texts:
        given = in_context(tokenizer, text)
        for ids, new in zip(tokenizer(given)["input_ids"], smaller(given)["input_ids"], strict=True):
            if ids != [kept[token] for token in new]:
                raise SystemExit(f"The smaller vocabulary would read {text[:80]!r} otherwise. Keep more --tokens.")


def trim_network(network: PreTrainedModel, kept: Sequence[int]) -> None:
    """Keep the kept tokens' rows of the embeddings and the head, and renumber the config's token ids."""
    new = {old: place for place, old in enumerate(kept)}
    with torch.no_grad():
        layers = {
            id(layer.weight): layer for layer in (network.get_input_embeddings(), network.get_output_embeddings())
        }
        for layer in layers.values():  # one where they are tied
            layer.weight[: len(kept)] = layer.weight[list(kept)]
            if getattr(layer, "bias", None) is not None:
                layer.bias[: len(kept)] = layer.bias[list(kept)]
    network.resize_token_embeddings(len(kept), mean_resizing=False)
    for config, name, ids in token_ids(network):
        renumbered = [new[old] for old in ids]
        setattr(config, name, renumbered if isinstance(getattr(config, name), list) else renumbered[0])


def token_ids(network: PreTrainedModel) -> list[tuple[Any, str, list[int]]]:
    """The settings of its configs that are token ids: config, name and ids."""
    return [
        (config, name, value if isinstance(value, list) else [value])
        for config in (network.config, network.generation_config)
        for name, value in vars(config).items()
        if name.endswith("_token_id") and isinstance(value, int | list)
    ]


if __name__ == "__main__":
    main()
