"""Which base an adapter was trained on: a fingerprint of the base's weights, kept beside the adapter.

On another base of the same shapes an adapter loads without an error, and its numbers are plausible and wrong. The
fingerprint is the largest absolute value of a few rows of each weight. It is independent of the folder's name, of
sharding and of the file format, and it survives rounding and quantisation: rounding does not change which of two
values is larger, int8 of bitsandbytes keeps the largest value of each row as its scale, and nf4 that of each block of
64. Fine-tuning changes it: a LoRA that was merged moves a largest value as it moves any other.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import json_line

FINGERPRINT_FILE = "base_fingerprint.json"

Fingerprint = Mapping[str, Mapping[int, float]]
"""Name of a weight → row → largest absolute value in it."""

_FORMAT = 1
_BLOCK = 64  # values that nf4 scales together; a "row" here is as many rows as fill whole blocks
_ROWS = (1, 9, 73, 585)  # the same ones of a table of embeddings that was lengthened
_PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)
_ONE_STEP = 2**-7  # of bfloat16, relative: what rounding to float16 first can add
_CHANCE = 1_000  # of so many rows, one may differ
_REMEMBERED = "_base_fingerprint"
_OF_ADAPTERS = tuple(filter(None, PEFT_TYPE_TO_PREFIX_MAPPING.values()))


def remember(base: nn.Module) -> None:
    """Take a base's fingerprint as soon as it is loaded: sharding and packing hide weights later."""
    setattr(base, _REMEMBERED, fingerprint_of(base, sharded=False))


def write_fingerprint(base: nn.Module, folder: Path) -> None:
    """Write the base's fingerprint beside an adapter; nothing where no weight can be read.

    Args:
        base: with or without adapters on it.
        folder: of the adapter's own files.
    """
    found = {**getattr(base, _REMEMBERED, {}), **fingerprint_of(base)}
    if not found:
        return
    rows = {
        name: {str(row): float(str(np.float32(value))) for row, value in rows.items()} for name, rows in found.items()
    }
    (folder / FINGERPRINT_FILE).write_bytes(json_line({"format": _FORMAT, "rows": rows}))


def refuse_mismatch(base: nn.Module, folder: Path) -> None:
    """Compare a base with the one that an adapter was trained on.

    An adapter without a fingerprint is taken as it is, and so is a base of whose weights none can be compared.

    Args:
        base: with or without adapters on it.
        folder: of the adapter's own files.

    Raises:
        QAdapterError: it is another base.
    """
    trained = _read(folder / FINGERPRINT_FILE)
    if not trained:
        return
    found = fingerprint_of(base)
    compared, other = 0, dict[str, int]()
    for name in trained.keys() & found.keys():
        count, differing = _differing(trained[name], found[name])
        compared += count
        if differing:
            other[name] = differing
    if sum(other.values()) > compared // _CHANCE:
        where = str(getattr(base, "name_or_path", "") or type(base).__name__)
        first = min(other)
        raise QAdapterError(
            f"The adapter in {folder} was trained on another base than {where}: {len(other)} of "
            f"{len(trained.keys() & found.keys())} weights differ (such as {first}), so that its numbers would be "
            "wrong. Give the base that it was trained on, or, if you mean this one, allow it: --allow-base-mismatch "
            "(in Python and lm-eval: allow_base_mismatch=True)."
        )


def fingerprint_of(base: nn.Module, sharded: bool | None = None) -> dict[str, dict[int, float]]:
    """The fingerprint of what can be read of a base now.

    Weights are left out where they are sharded, not in memory, or packed in a way whose largest values are not kept.

    Args:
        base: with or without adapters on it, which do not count.
        sharded: whether weights are spread over processes; asked of the launcher's environment by default.
    """
    if sharded is None:
        sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if sharded:
        return {}
    found = {name: peaks for name, module, weight in _weights(base) if (peaks := _peaks(module, weight)) is not None}
    names = [(name, row) for name, peaks in found.items() for row in peaks]
    with torch.no_grad():
        values = [value for peaks in found.values() for value in peaks.values()]
        by_place: dict[torch.device, list[int]] = {}
        for i, value in enumerate(values):
            by_place.setdefault(value.device, []).append(i)
        numbers = [0.0] * len(values)
        for places in by_place.values():  # one transfer per device
            for i, number in zip(places, torch.stack([values[i].float() for i in places]).tolist(), strict=True):
                numbers[i] = number
    read: dict[str, dict[int, float]] = {}
    for (name, row), number in zip(names, numbers, strict=True):
        read.setdefault(name, {})[row] = number
    return read


def _weights(base: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The base's own weights, by the names that they have without adapters."""
    for path, module in base.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            parts = name.split(".")
            if any(part.startswith(_OF_ADAPTERS) or part in ("modules_to_save", "original_module") for part in parts):
                continue
            yield re.sub(r"\bbase_layer\.", "", name), module, weight


def _peaks(module: nn.Module, weight: Tensor) -> dict[int, Tensor] | None:
    """Row → largest absolute value [] of a weight; None where that is not known."""
    if weight.is_meta or not weight.numel():
        return None
    if type(weight).__name__ == "Int8Params":
        scale: Any = getattr(weight, "SCB", None)
        scale = getattr(getattr(module, "state", None), "SCB", None) if scale is None else scale
        if scale is None or weight.dtype != torch.int8:
            return None
        group = _group(int(weight.shape[-1]))
        return {row: part.max() for row, part in _chosen(scale.flatten(), group)}
    if type(weight).__name__ == "Params4bit":
        return _peaks_of_blocks(getattr(weight, "quant_state", None) or getattr(module, "quant_state", None))
    plain = type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor
    if not plain or weight.dtype not in (*_PRECISIONS, torch.float64):
        return None
    held = weight.detach()
    if held.ndim < 2:
        return {0: held.abs().max()}
    rows = held.flatten(0, -2)
    return {row: part.abs().max() for row, part in _chosen(rows, _group(int(rows.shape[-1])))}


def _peaks_of_blocks(state: Any) -> dict[int, Tensor] | None:
    """As `_peaks`, of a weight in 4 bits: the scale of a block is its largest absolute value."""
    if state is None or state.nested or getattr(state, "packing_format_for_cpu", False) or len(state.shape) != 2:
        return None
    width, blocks = int(state.shape[-1]), state.absmax.flatten()
    if state.blocksize > _BLOCK or _BLOCK % state.blocksize or len(blocks) * state.blocksize < math.prod(state.shape):
        return None
    whole = math.prod(state.shape) // _BLOCK * (_BLOCK // state.blocksize)
    group = _group(width)
    if math.prod(state.shape) // width < group:
        return {0: blocks.max()}
    each = group * width // state.blocksize
    return {row: part.max() for row, part in _chosen(blocks[:whole], each)}


def _group(width: int) -> int:
    """Rows of this width that fill whole blocks together."""
    return _BLOCK // math.gcd(_BLOCK, width)


def _chosen(values: Tensor, group: int) -> Iterator[tuple[int, Tensor]]:
    """Some groups of a tensor's entries along its first axis, by number; everything as one where there is no group."""
    count = len(values) // group
    if not count:
        yield 0, values
        return
    for row in [row for row in _ROWS if row < count] or [0]:
        yield row, values[row * group : (row + 1) * group]


class _Held(NamedTuple):
    values: Tensor
    precision: torch.dtype


def _held(rows: Mapping[int, float], shared: list[int]) -> _Held:
    """Values with the coarsest precision that holds all of them: that of a load is not always what was asked for."""
    values = torch.tensor([rows[row] for row in shared], dtype=torch.float32)
    fits = (precision for precision in _PRECISIONS if torch.equal(values.to(precision).float(), values))
    return _Held(values, next(fits, torch.float32))


def _differing(trained: Mapping[int, float], found: Mapping[int, float]) -> tuple[int, int]:
    """How many rows two fingerprints of a weight share, and in how many of them they differ beyond rounding."""
    shared = sorted(trained.keys() & found.keys())
    one, two = _held(trained, shared), _held(found, shared)
    if {one.precision, two.precision} == {torch.bfloat16, torch.float16}:
        larger = torch.maximum(one.values.abs(), two.values.abs())
        return len(shared), int(((one.values - two.values).abs() > _ONE_STEP * larger).sum())
    coarser = one.precision if _PRECISIONS.index(one.precision) < _PRECISIONS.index(two.precision) else two.precision
    return len(shared), int((one.values.to(coarser) != two.values.to(coarser)).sum())


def _read(file: Path) -> dict[str, dict[int, float]]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:  # of a later version: nothing is known
            return {}
        return {
            str(name): {int(row): float(value) for row, value in rows.items()} for name, rows in content["rows"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise QAdapterError(f"{file} cannot be read ({error!r}); remove it to load the adapter unchecked.") from error
