"""Who is compared. A peer is a function of a case that gives its step, or None where it has none.

A step runs the op forward and backward and returns (results, gradients); when it is timed they are dropped at
once, as training frees the gradients of one step before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fgbg_cuda

from .cases import Case

Step = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
PEERS: dict[str, Callable[[Case], Step | None]] = {}


def peer(name: str) -> Callable:
    def register(build: Callable[[Case], Step | None]) -> Callable:
        PEERS[name] = build
        return build

    return register


def step_of(case: Case, function: Callable[..., Any]) -> Step:
    wanted, upstream, inputs = case.wanted, case.upstream, case.inputs

    def forward() -> Sequence[Tensor]:
        results = function(*inputs)
        return (results,) if isinstance(results, Tensor) else results

    @torch.no_grad()
    def forward_only() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return forward(), ()

    def forward_and_backward() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        results = forward()
        return results, torch.autograd.grad(results, wanted, upstream)

    return forward_and_backward if case.backward else forward_only


def graph_of(step: Step) -> Step:
    """The step as one captured CUDA graph; its replay writes the same results again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compilation and the allocator's first blocks stay out of the graph
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results, grads = step()

    def replay() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        graph.replay()
        return results, grads

    return replay


def without_cache(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step with results from torch's allocator: what is left is the kernels."""

    def without() -> Any:
        fgbg_cuda.use_cpu_cache(False)
        try:
            return step()
        finally:
            fgbg_cuda.use_cpu_cache(True)

    return without


@peer("ours")
def _ours(case: Case) -> Step:
    return step_of(case, case.ours)


@peer("ours, no cache")
def _ours_without_cache(case: Case) -> Step | None:
    return without_cache(_ours(case)) if case.device == "cpu" else None


@peer("eager")
def _eager(case: Case) -> Step:
    return step_of(case, case.plain)


@peer("compile")
def _compile(case: Case) -> Step:
    # Compiled for the case's shapes alone; fullgraph fails rather than fall back to eager.
    return step_of(case, torch.compile(case.plain, fullgraph=True, dynamic=False))


@peer("triton")
def _triton(case: Case) -> Step | None:
    if case.device != "cuda":
        return None
    from . import triton_peer

    function = triton_peer.FUNCTIONS.get(case.op)
    return function and step_of(case, function)


@peer("ours, graph")
def _ours_graph(case: Case) -> Step | None:
    return graph_of(_ours(case)) if case.device == "cuda" else None


@peer("compile, graph")
def _compile_graph(case: Case) -> Step | None:
    return graph_of(_compile(case)) if case.device == "cuda" else None
