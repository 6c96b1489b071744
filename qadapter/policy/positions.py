"""How long a sequence a base can read."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# A rope that is stretched reads `factor` times the length that it was trained on. Some configs give the stretched
# length itself as `max_position_embeddings`, and the trained one as `original_max_position_embeddings`.
_STRETCHED = ("linear", "dynamic", "yarn")
_OF_LENGTH = ("dynamic", "longrope")
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def position_limit(config: PretrainedConfig) -> int | None:
    """The longest sequence, in tokens; None where the base knows no limit (state-space models, ALiBi).

    Args:
        config: of the base, or of a policy on it.
    """
    text: Any = config.get_text_config()
    length = next((value for name in _NAMES if isinstance(value := getattr(text, name, None), int) and value > 0), None)
    if length is None:
        return None
    stretched = [
        float(one.get("factor") or 1.0) * (one.get("original_max_position_embeddings") or length)
        for one in _ropes(config)
        if (one.get("rope_type") or one.get("type")) in _STRETCHED
    ]
    return int(max([length, *stretched]))


def turns_with_length(config: PretrainedConfig) -> bool:
    """Whether a rope turns a position by the length of the whole sequence: a longer pass has other keys for it.

    Args:
        config: of the base.
    """
    return any((one.get("rope_type") or one.get("type")) in _OF_LENGTH for one in _ropes(config))


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of the rope; of each one, where kinds of layers have their own."""
    text: Any = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [rope] if "rope_type" in rope or "type" in rope else [one for one in rope.values() if isinstance(one, dict)]
