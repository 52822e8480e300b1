"""The cost of determinism: what a user pays for the same bits every time, and who gives them at all.

Each peer runs as it is and under ``torch.use_deterministic_algorithms(True)``. Its results and gradients are
compared bit for bit between repeated runs and between thread counts. On CUDA a Triton kernel is timed with
both ways to end a sum over blocks: atomic additions, whose order is up to the scheduler, and a second pass
over partial sums.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .cases import Case
from .checking import checker
from .comparison import checked_steps, describe
from .peers import Step, step_of
from .timing import Effort, measure

REPEATS = 10
THREADS = (1, 2, 3)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_deterministic_mode(step: Step) -> Step:
    def strict() -> tuple:
        torch.use_deterministic_algorithms(True)
        try:
            return step()
        finally:
            torch.use_deterministic_algorithms(False)

    return strict


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Equal for equal bits."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _repeated(step: Step) -> int:
    """How many different results a number of runs gave."""

    def once() -> str:
        results, grads = step()
        return fingerprint([*results, *grads])

    return len({once() for _ in range(REPEATS)})


def _across_threads(step: Step) -> int:
    """How many different results several thread counts gave. (Compiled code is compiled again for each.)"""
    prints = set()
    for number in THREADS:
        with threads(number):
            results, grads = step()
            prints.add(fingerprint([*results, *grads]))
    return len(prints)


def determinism(case: Case, names: Iterable[str], effort: Effort) -> dict:
    """A row: per peer the time as it is and in torch's deterministic mode, and how many results it gave."""
    steps = checked_steps(case, names)
    if case.device == "cuda":
        from . import triton_peer

        atomics = step_of(case, triton_peer.ATOMIC_FUNCTIONS[case.op])
        checker(case)("triton, atomics", atomics)
        steps["triton, atomics"] = atomics
    strict = {f"{name} (strict)": in_deterministic_mode(step) for name, step in steps.items()}
    times = measure(steps | strict, case.device, effort)
    peers = {
        name: {
            **times[name],
            "deterministic_mode": times[f"{name} (strict)"],
            "distinct_repeated": _repeated(step),
            "distinct_across_threads": _across_threads(step) if case.device == "cpu" else None,
        }
        for name, step in steps.items()
    }
    return {**describe(case), "peers": peers}
