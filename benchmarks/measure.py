"""Time and peak memory of several ways to do one thing, on the same inputs in one run, as one table."""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.shapes import SHAPES


@dataclass(frozen=True)
class Measured:
    """Seconds of the median round, and bytes over the start at the peak."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class TooLarge:
    """A side that this machine has no room for: the bytes it would need, by what a smaller batch took."""

    expected_bytes: float


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark's command line takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    heavy = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=heavy, help="models (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all sides; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None, help="torch threads on CPU")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Set threads and say what machine this is."""
    if options.threads:
        torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, {options.dtype}, torch {torch.__version__}")
    products, bandwidth = rates(options.device, getattr(torch, options.dtype))
    print(f"matrix products {products:.0f} GFlop/s, copies {bandwidth:.1f} GB/s")
    print("each side runs twice before it is timed\n")


def rates(device: str, dtype: torch.dtype, size: int = 1024, copied: int = 2**26) -> tuple[float, float]:
    """What this machine does: 10⁹ floating-point operations a second in matrix products, 10⁹ bytes a second in copies.

    A side that computes much and one that moves much memory change places with these two numbers.

    Args:
        device: `cpu` or `cuda`.
        dtype: of the numbers.
        size: of the square matrices.
        copied: numbers in the copied array.
    """
    left, right = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(copied, device=device, dtype=dtype)
    target = torch.empty_like(source)
    out = torch.empty_like(left)

    def typical(work: Callable[[], object]) -> float:
        found = [_seconds(work, device) for _ in range(6)]
        return statistics.median(found[1:])  # the first one loads kernels and touches the pages

    products = 2 * size**3 / typical(lambda: torch.mm(left, right, out=out)) / 1e9
    return products, 2 * source.nbytes / typical(lambda: target.copy_(source)) / 1e9


def compare(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    expected_bytes: Mapping[str, float] | None = None,
) -> dict[str, Measured | TooLarge]:
    """Measure every side: peak memory in a first run each, then time in rounds over all sides.

    Args:
        sides: name to something that does the work once.
        rounds: how often; interleaved, so that a busy machine is busy for all of them.
        device: `cpu` or `cuda`.
        expected_bytes: how much a side is going to need; one that does not fit is not run.
    """
    expected = expected_bytes or {}
    room = 0.85 * _free_bytes(device)
    fitting = {name: work for name, work in sides.items() if expected.get(name, 0) < room}
    peaks = {name: _peak(work, device) for name, work in fitting.items()}
    seconds: dict[str, list[float]] = {name: [] for name in fitting}
    for _ in range(rounds):
        for name, work in fitting.items():
            seconds[name].append(_seconds(work, device))
    return {
        name: Measured(statistics.median(seconds[name]), peaks[name]) if name in fitting else TooLarge(expected[name])
        for name in sides
    }


def table(title: str, results: Mapping[str, Measured | TooLarge], reference: str) -> str:
    """A table with, for each side, its numbers and how many times better than `reference` it is.

    Where the reference does not fit, the first side that does takes its place.
    """
    measured = {name: one for name, one in results.items() if isinstance(one, Measured)}
    base = measured.get(reference) or next(iter(measured.values()))
    lines = [title, f"{'':34}{'seconds':>10}{'speed-up':>10}{'peak MB':>10}{'memory':>9}"]
    for name, one in results.items():
        if isinstance(one, TooLarge):
            lines.append(f"{name:34}  does not fit, it would need about {one.expected_bytes / 1e9:.0f} GB")
            continue
        memory = one.peak_bytes / base.peak_bytes if base.peak_bytes else float("nan")
        lines.append(
            f"{name:34}{one.seconds:10.3f}{base.seconds / one.seconds:9.2f}x{one.peak_bytes / 1e6:10.0f}{memory:8.2f}x"
        )
    return "\n".join(lines) + "\n"


def _free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of the work alone: what is pending is done before, and collecting garbage is no part of it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(work: Callable[[], object], device: str) -> int:
    """Bytes at the peak over the start, of a second run: the first one loads kernels and makes what is cached."""
    work()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier sides left in the heap
    with _Sampler() as sampler:
        work()
    return sampler.peak - sampler.start


class _Sampler:
    """The process's largest resident size, from the kernel's own mark where it can be reset, else sampled."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._mark = Path("/proc/self/clear_refs")
        self._stop = threading.Event()
        self.start = self.peak = 0

    def __enter__(self) -> _Sampler:
        self.start = self.peak = self._process.memory_info().rss
        try:
            self._mark.write_text("5")
            self._thread = None
        except OSError:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            return
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        self.peak = int(line.split()[1]) * 1024
