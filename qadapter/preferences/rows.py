"""Convert rows of a data set in Python into plain records for the reader, with the same values as in files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qadapter.errors import QAdapterError


def iter_rows(data: Any, name: str) -> Iterator[Any]:
    """The rows of a list, a `datasets.Dataset` or a pandas DataFrame.

    Args:
        data: what the caller gave.
        name: what to call it in messages.

    Raises:
        QAdapterError: several splits at once, columns without rows, or no rows at all.
    """
    if hasattr(data, "to_dict") and hasattr(data, "itertuples"):  # a DataFrame: iterating it gives its columns' names
        return iter(data.to_dict("records"))
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, list(data)[:8]))
        raise QAdapterError(
            f"The {name} data are a {type(data).__name__} with the keys {splits}. One data set was expected; "
            f"give one of its splits, such as data[{next(iter(data), 'train')!r}]."
        )
    if isinstance(data, str | bytes) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise QAdapterError(
            f"The {name} data are {type(data).__name__}, no rows. Give a list of rows, a datasets.Dataset or a "
            "DataFrame; for a file use qadapter.preferences.stream.parse_files."
        )
    return iter(data)


def plain(value: Any) -> Any:
    """A value as JSON would have it: tuples and arrays as lists, numpy's numbers as Python's, NaN as null."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return plain(value.tolist())
    return value
