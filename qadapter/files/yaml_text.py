"""YAML from untrusted files: plain values only, each key once, and a limit on what aliases expand to."""

from __future__ import annotations

from typing import Any

import yaml

MAX_NODES = 100_000
"""Largest number of values and keys in one document, with each alias counted as its expansion."""


class RepeatedKeyError(yaml.YAMLError):
    """A mapping that has a key twice; PyYAML takes the last one and drops the others without a word."""


class ExpandingYamlError(yaml.YAMLError):
    """A document whose aliases expand to too much, or that is nested too deep."""


def read_yaml(text: str) -> Any:
    """The value of a YAML document, as `yaml.safe_load` gives it.

    Raises:
        yaml.YAMLError: it is not YAML, has a tag that is not one of plain data, has a key twice in one mapping, is
            nested too deep, or its aliases expand to more than `MAX_NODES` nodes.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise ExpandingYamlError(f"the document's aliases expand to more than {MAX_NODES:,} values")
        return loader.construct_document(node)
    except RecursionError as error:
        raise ExpandingYamlError("the document is nested too deep, or contains itself") from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a tree has if every alias is written out. Each node is visited once."""
    if id(node) not in known:
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(_size(inner, known) for inner in node.value)
        elif isinstance(node, yaml.MappingNode):
            _refuse_repeated(node)
            size += sum(_size(inner, known) for pair in node.value for inner in pair)
        known[id(node)] = size
    return known[id(node)]


def _refuse_repeated(mapping: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise RepeatedKeyError(f"the key {key.value!r} stands twice, in line {lines[name]} and in line {line}")
        lines[name] = line
