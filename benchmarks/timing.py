"""Seconds per call, interleaved, and the speed of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Effort:
    seconds: float  # of timing per function
    rounds: int  # blocks it is split into


FULL = Effort(0.35, 7)
QUICK = Effort(0.004, 2)


def _cuda_clock() -> Callable[[], float]:
    """Seconds on the GPU's own clock: events in the stream, so no synchronisation of the host is timed."""
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return origin.elapsed_time(event) / 1e3

    return now


def _timer(function: Callable[[], Any], device: str) -> Timer:
    options = {"timer": _cuda_clock()} if device == "cuda" else {}
    return Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads(), **options)


def measure(functions: dict[str, Callable[[], Any]], device: str, effort: Effort) -> dict[str, dict]:
    """Median, lowest and highest seconds per call over the rounds; in each round every function has one block
    in turn, so that drift of the machine meets all."""
    numbers = {}
    for name, function in functions.items():
        timer = _timer(function, device)
        timer.timeit(1)  # warm-up: first touch, or another mode's or thread count's compilation
        once = timer.timeit(2).mean
        numbers[name] = max(1, int(effort.seconds / effort.rounds / once))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(effort.rounds):
        for name, function in functions.items():
            times[name].append(_timer(function, device).timeit(numbers[name]).mean)
    return {
        name: {
            "median": statistics.median(t),
            "low": min(t),
            "high": max(t),
            "rounds": len(t),
            "calls": numbers[name],
        }
        for name, t in times.items()
    }


def copy_speed(device: str, effort: Effort, mebibytes: int = 256) -> dict:
    """Seconds of a large copy, and bytes per second, counting what is read and what is written."""
    source = torch.rand(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, device, effort)["copy"]
    moved = 2 * source.numel() * source.element_size()
    return {"bytes": moved, "seconds": seconds, "bytes_per_second": moved / seconds["median"]}


class Deadline:
    """When to start nothing new."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def passed(self) -> bool:
        return self._end is not None and time.monotonic() > self._end
