"""Peak memory of one call, counted allocation by allocation."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Bytes of tensors alive at the worst moment of a call, beyond those before it. The results count."""
    return _cuda_peak(function) if device == "cuda" else _cpu_peak(function)


def _cuda_peak(function: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(function: Callable[[], Any]) -> int:
    """The running sum of what the CPU allocator gave and took back, as the profiler logged it: exact, unlike
    a resident set size, which holds what the C library keeps for later."""
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        function()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "trace.json")
        log.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    now = peak = 0
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library announces each start and stop on the file descriptor itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
