"""A peer that computes something else is not a peer: results and gradients against the plain version in
float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .cases import Case
from .peers import Step, step_of

# Roundings on the way to one result: about a dozen operations, on numbers that are at times a few times as
# large as the result they cancel to.
OPERATIONS = 32


class Disagreement(AssertionError):
    """A peer's results are further off than its dtype explains."""


def tolerance(expected: Tensor, dtype: torch.dtype, least: float = 0.0) -> float:
    """What roundings of dtype may change: eps each, relative to the largest number in play, which is the
    largest expected one or ``least``."""
    return OPERATIONS * torch.finfo(dtype).eps * max(least, expected.abs().max().item())


def assert_near(
    what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], bounds: Sequence[float]
) -> None:
    for i, (a, e, bound) in enumerate(zip(actual, expected, bounds, strict=True)):
        if a.shape != e.shape:
            raise Disagreement(f"{what} {i} has shape {list(a.shape)}, expected {list(e.shape)}")
        error = (a.detach().double() - e).abs().max().item()
        if not error <= bound:  # NaN too
            raise Disagreement(f"{what} {i} is off by {error:.3g}, more than {bound:.3g}")


def _exact(case: Case, eps: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the plain version in float64, with the noise given."""
    inputs = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in case.inputs)
    upstream = tuple(None if g is None else g.double() for g in case.upstream)
    double = replace(case, inputs=inputs, upstream=upstream, dtype=torch.float64)
    noise = () if eps is None else (eps,)
    results, grads = step_of(double, lambda *x: case.plain(*x, *noise))()
    return [r.detach() for r in results], list(grads)


def _noise_of(case: Case, z: Tensor) -> Tensor:
    """The noise that made a sample, after a look at its first two moments."""
    eps = z.detach().double()
    if case.inputs:
        mu, spread = (t.detach().double() for t in case.inputs)
        eps = (eps - mu) / (spread if case.op.endswith(" std") else torch.exp(0.5 * spread))
    # Six standard errors; rounding z moves its noise by a few eps.
    slack = 4 * torch.finfo(case.dtype).eps
    mean, second, n = eps.mean().item(), eps.square().mean().item(), eps.numel()
    if not (abs(mean) <= 6 / n**0.5 + slack and abs(second - 1) <= 6 * (2 / n) ** 0.5 + slack):  # NaN too
        raise Disagreement(f"the noise has mean {mean:.3g} and mean square {second:.3g}")
    return eps


def checker(case: Case) -> Callable[[str, Step], None]:
    """A function that runs a peer's step and raises :class:`Disagreement` if its numbers are wrong."""
    fixed = cache(lambda: _exact(case))

    def check(name: str, step: Step) -> None:
        results, grads = step()
        try:
            eps = _noise_of(case, results[0]) if case.noise else None
            if not case.inputs:
                return  # pure noise: its moments are all there is to check
            expected = fixed() if eps is None else _exact(case, eps)
            # A loss is a sum, per sample, of terms of order 1 whose signs may differ.
            terms = max(t.numel() // t.shape[0] for t in case.inputs)
            bounds = [tolerance(e, case.dtype, 1 if e.dim() else terms) for e in expected[0]]
            assert_near("result", results, expected[0], bounds)
            assert_near("gradient", grads, expected[1], [tolerance(e, case.dtype) for e in expected[1]])
        except Disagreement as error:
            raise Disagreement(f"{name} does not compute {case.op} at {list(case.size)}: {error}") from None

    return check
