"""YAML from untrusted files: plain values only, each key once, and a limit on what aliases expand to.

Numbers are read as YAML 1.2 and JSON write them. YAML 1.1, which PyYAML reads, has `1e-4` as a text, `010` as 8 and
`1:30` as 90.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_NODES = 100_000
"""Largest number of values and keys in one document, with each alias counted as its expansion."""


class RepeatedKeyError(yaml.YAMLError):
    """A mapping that has a key twice; PyYAML takes the last one and drops the others without a word."""


class ExpandingYamlError(yaml.YAMLError):
    """A document whose aliases expand to too much, or that is nested too deep."""


class _Loader(yaml.SafeLoader):
    """`SafeLoader` with the numbers of YAML 1.2: what is none of them stays a text."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)",
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a YAML document, as `yaml.safe_load` gives it but for numbers (see the module).

    Raises:
        yaml.YAMLError: it is not YAML, has a tag that is not one of plain data, has a key twice in one mapping, is
            nested too deep, or its aliases expand to more than `MAX_NODES` nodes.
    """
    loader = _Loader(text)
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
