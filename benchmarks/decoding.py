"""Greedy decoding: the published way, plain LoRA of the same model, and this project.

python -m benchmarks.decoding                            # both shapes, batches 1 and 8
python -m benchmarks.decoding --new-tokens 64 --batches 1 2 4 8
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import arguments, compare, prepare, table
from benchmarks.published import PublishedPolicy
from benchmarks.shapes import SHAPES, Shape, batch, policy
from qadapter.policy.objective import Objective

PUBLISHED = "published code's way"


def sides(shape: Shape, rows: int, new_tokens: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every way to continue the same prompts."""
    objective = Objective.preset("published-code")
    ours = policy(shape, device, dtype, objective).eval()
    residual = policy(shape, device, dtype, Objective.preset("residual")).eval()
    published = PublishedPolicy(ours.peft_model, objective).eval()
    prompts = batch(shape, rows, device)["input_ids"][:rows, : shape.prompt]
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(model: Any) -> Callable[[], Tensor]:
        return lambda: model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **settings)

    return {
        PUBLISHED: generate(published),
        "plain LoRA": generate(ours.peft_model),
        "this project": generate(ours),
        "this project, residual, α0 = 1": generate(residual),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each shape and batch."""
    parser = arguments(__doc__)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args(argv)
    prepare(options)
    for name in options.shapes:
        for rows in options.batches:
            shape = SHAPES[name]
            made = sides(shape, rows, options.new_tokens, options.device, getattr(torch, options.dtype))
            results = compare(made, options.rounds, options.device)
            title = f"decoding {options.new_tokens} tokens, {name}, batch {rows}, prompt of {shape.prompt}"
            print(table(title, results, PUBLISHED))


if __name__ == "__main__":
    main()
