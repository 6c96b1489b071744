"""How fast this machine's cores are, measured by the product that most of a training's time goes into."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

# Of the rate of a large product in float32, what a step reaches, as `estimate.training_flops` counts its operations: a
# step of Gemma 3 270M, 8 pairs of 58 tokens a sequence, took 24 s (Q-Adapter) and 25 s (DPO) of CPU time on one thread
# beside other work: 50 GFLOP/s, where products alone reached 101.
REACHED = 0.5
_SECONDS = 0.4
_ROWS = 256
_LARGEST_WEIGHTS = 2**24  # elements: out of any cache, as a head or the layers of a model are


def measured_flops(width: int, stages: int, threads: int, precision: str = "highest") -> float:
    """Operations per second that `stages` trainings side by side reach together on this machine's cores.

    Args:
        width: of the model's hidden states.
        stages: how many run at the same time.
        threads: of each.
        precision: of products (`ModelSettings.matmul_precision`).
    """
    import torch

    before, precise = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    weights = torch.randn(_LARGEST_WEIGHTS // width, width)
    hidden = torch.randn(_ROWS, width)

    def rate(_: int) -> float:
        product = torch.mm(hidden, weights.t())  # the first is slower: memory has to be found
        start, times = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < _SECONDS:
            torch.mm(hidden, weights.t(), out=product)
            times += 1
        return 2 * hidden.numel() * len(weights) * times / seconds

    try:
        with ThreadPoolExecutor(stages) as side_by_side:
            return REACHED * sum(side_by_side.map(rate, range(stages)))
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precise)
