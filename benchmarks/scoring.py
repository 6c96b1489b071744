"""Log-likelihoods of replies, as lm-eval asks for them: full logits of context + reply, then the reply's tokens.

python -m benchmarks.scoring                             # both shapes, batches 1 and 8
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.measure import arguments, compare, prepare, table
from benchmarks.published import PublishedPolicy
from benchmarks.shapes import SHAPES, Shape, batch, policy
from qadapter.policy.objective import Objective

PUBLISHED = "published code's way"


def sides(shape: Shape, rows: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every way to score the same rows."""
    objective = Objective.preset("published-code")
    ours = policy(shape, device, dtype, objective).eval()
    residual = policy(shape, device, dtype, Objective.preset("residual")).eval()
    published = PublishedPolicy(ours.peft_model, objective).eval()
    ids = batch(shape, rows, device)["input_ids"][:rows]

    def score(model: torch.nn.Module, **options: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                logits = model(input_ids=ids, **options).logits
                # lm-eval: log-softmax of everything, then the continuation's part
                logprobs = logits.float().log_softmax(-1)[:, shape.prompt - 1 : -1]
                return logprobs.gather(-1, ids[:, shape.prompt :, None]).sum()

        return run

    return {
        PUBLISHED: score(published),
        "plain LoRA": score(ours.peft_model),
        "this project": score(ours),
        "this project, residual, α0 = 1": score(residual, up_to_constant=True),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each shape and batch."""
    options = arguments(__doc__).parse_args(argv)
    prepare(options)
    for name in options.shapes:
        for rows in options.batches:
            made = sides(SHAPES[name], rows, options.device, getattr(torch, options.dtype))
            results = compare(made, options.rounds, options.device)
            print(table(f"scoring, {name}, batch {rows}, T = {SHAPES[name].length}", results, PUBLISHED))


if __name__ == "__main__":
    main()
