"""One row: every peer of a case, checked, measured for memory, then timed side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .cases import Case
from .checking import checker
from .memory import peak_bytes
from .peers import PEERS, Step
from .timing import Effort, measure


def checked_steps(case: Case, names: Iterable[str]) -> dict[str, Step]:
    """The steps of those peers that have something to say about the case, each with its numbers checked."""
    torch._dynamo.reset()  # of what was compiled for other cases, nothing is left to search
    check = checker(case)
    steps = {}
    for name in names:
        step = PEERS[name](case)
        if step is not None:
            check(name, step)  # compiles, too
            steps[name] = step
    return steps


def describe(case: Case) -> dict:
    return {
        "op": case.op,
        "size": list(case.size),
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "perfect_bytes": case.perfect_bytes,
    }


def compare(case: Case, names: Iterable[str], effort: Effort) -> dict:
    steps = checked_steps(case, names)
    # A graph's replay allocates nothing: its memory was taken at capture.
    peaks = {n: None if n.endswith("graph") else peak_bytes(s, case.device) for n, s in steps.items()}
    times = measure(steps, case.device, effort)
    return {**describe(case), "peers": {n: {**times[n], "peak_bytes": peaks[n]} for n in steps}}
