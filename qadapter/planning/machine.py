"""How fast this machine's cores are, measured by the product that most of a training's time goes into."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

# Of the rate of a large product in float32, what a stage reaches, as `stage_costs.estimate_of` counts its operations:
# stages of the profile `small` on Gemma 3 270M, one thread each, two side by side, took 36 to 42 GFLOP/s (trainings by
# SFT, DPO, replay and the Q-Adapter; evaluations), where products alone reached 100. The rest is padding, attention and
# what is no product.
REACHED = 0.4
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
