"""Tokens a second and latency of a chat server, at one client and at several.

python -m benchmarks.serving                                       # a server of a random model of benchmarks/shapes.py
python -m benchmarks.serving --url http://127.0.0.1:8000/v1 --models harmless base
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.shapes import SHAPES, Shape, base_model, policy
from qadapter.policy.objective import Objective
from qadapter.preferences.tokenize import prompt_ids
from qadapter.serving.app import create_app
from qadapter.serving.generator import Generator
from qadapter.serving.policies import ServedPolicies

RESIDUAL = "residual"


@dataclass
class Served:
    """What a number of clients saw, in rounds of one request each.

    Attributes:
        tokens_per_second: of all clients together, one for each round.
        first: seconds to the first piece of text, one for each request.
        whole: seconds to the end of the reply, one for each request.
    """

    tokens_per_second: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def ask(client: openai.OpenAI, model: str, prompt: str, new_tokens: int) -> tuple[float, float, int]:
    """One streamed request: seconds to the first text, seconds to the end, tokens."""
    start = time.perf_counter()
    first, tokens = 0.0, 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    whole = time.perf_counter() - start
    return first or whole, whole, tokens


def load(seen: Served, url: str, key: str, model: str, clients: int, new_tokens: int) -> None:
    """One round: all clients ask at the same time.

    Args:
        seen: gets what was measured.
        url: of the API, with `/v1`.
        key: bearer token.
        model: name.
        clients: how many.
        new_tokens: longest reply.
    """

    def work(number: int) -> tuple[float, float, int]:
        with openai.OpenAI(base_url=url, api_key=key, timeout=600, max_retries=0) as client:
            return ask(client, model, f"Question {number}.", new_tokens)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(work, range(clients)))
    seconds = time.perf_counter() - start
    seen.tokens_per_second.append(sum(tokens for *_, tokens in replies) / seconds)
    seen.first += [first for first, *_ in replies]
    seen.whole += [whole for _, whole, _ in replies]


def without_server(seen: Served, policies: ServedPolicies, new_tokens: int) -> None:
    """One round of `generate` of the same policy, in this thread: what a server can reach at most."""
    model: Any = policies.policy
    ids = torch.tensor([prompt_ids(policies.tokenizer, [{"role": "user", "content": "Question 0."}])])
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    start = time.perf_counter()
    with policies.speaking(policies.blend(RESIDUAL)) as dials:
        model.generate(input_ids=ids.to(model.device), **settings, **dials)
    seconds = time.perf_counter() - start
    seen.tokens_per_second.append(new_tokens / seconds)
    seen.first.append(seconds)
    seen.whole.append(seconds)


def table(results: dict[tuple[str, int], Served]) -> str:
    """One row for each model and number of clients; ratios are to the first row."""
    base = statistics.median(next(iter(results.values())).tokens_per_second)
    head = (
        f"{'model':16}{'clients':>8}{'tokens/s':>10}{'ratio':>8}{'first p50':>11}{'p95':>8}{'whole p50':>11}{'p95':>8}"
    )
    lines = [head]
    for (model, clients), one in results.items():
        times = [_quantile(values, q) for values in (one.first, one.whole) for q in (50, 95)]
        rate = statistics.median(one.tokens_per_second)
        lines.append(
            f"{model:16}{clients:8}{rate:10.1f}{rate / base:7.2f}x"
            f"{times[0]:10.3f}s{times[1]:7.3f}s{times[2]:10.3f}s{times[3]:7.3f}s"
        )
    return "\n".join(lines)


def _quantile(values: Sequence[float], percent: int) -> float:
    """Of few values the p95 is the largest, or near it."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


@contextlib.contextmanager
def own_server(shape: Shape) -> Iterator[tuple[str, ServedPolicies]]:
    """Serve a random base with an adapter of each form; gives the URL and what is served."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="qadapter-serving-") as folder:
        adapters = {preset: Path(folder, preset) for preset in (RESIDUAL, "published-code")}
        for preset, place in adapters.items():
            policy(shape, device, torch.float32, Objective.preset(preset)).save_pretrained(place)
        served = ServedPolicies(base_model(shape, device, torch.float32), tokenizer(shape.vocabulary), adapters)
    generator = Generator(served)
    server = uvicorn.Server(uvicorn.Config(create_app(generator), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", served
    finally:
        server.should_exit = True
        thread.join()
        generator.close()


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words t0 … for a random model; everything a client writes is t0."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t1")


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server's, with /v1; its token from QADAPTER_API_KEY")
    parser.add_argument("--models", nargs="+", help="names to ask for (default: all)")
    parser.add_argument(
        "--shape", choices=SHAPES, default="body-heavy", help="of the own server (default: %(default)s)"
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of one request each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each reply (default: %(default)s)")
    options = parser.parse_args(argv)
    sides: dict[tuple[str, int], Callable[[Served], None]] = {}
    with contextlib.ExitStack() as stack:
        url = options.url
        if url is None:
            url, served = stack.enter_context(own_server(SHAPES[options.shape]))
            sides["generate()", 1] = partial(without_server, policies=served, new_tokens=options.new_tokens)
        key = os.environ.get("QADAPTER_API_KEY", "none")
        with openai.OpenAI(base_url=url, api_key=key) as client:
            names = options.models or [model.id for model in client.models.list()]
        request = partial(load, url=url, key=key, new_tokens=options.new_tokens)
        sides |= {(name, n): partial(request, model=name, clients=n) for name in names for n in options.clients}
        for side in sides.values():  # the first time loads kernels and makes what is cached
            side(Served())
        results = {name: Served() for name in sides}
        for _ in range(options.rounds):  # interleaved: a busy machine is busy for all of them
            for name, side in sides.items():
                side(results[name])
    print(f"replies of {options.new_tokens} tokens, {options.rounds} rounds, median tokens/s of a round")
    print(table(results))


if __name__ == "__main__":
    main()
