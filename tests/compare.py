"""How results are compared: one rule for tolerances, one way to take gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A result is a chain of at most so many roundings: a handful of elementary functions of 2 ulp each,
# products of up to four factors, and sums whose lanes hold at most 512 / 16 terms.
OPERATIONS = 64


def tolerance(expected: Tensor, dtype: torch.dtype, operations: int = OPERATIONS) -> float:
    """What `operations` roundings of dtype may change: eps each, relative to the largest number in
    play (inputs are of order 1, so 1 bounds from below what an element is computed from)."""
    finite = expected.detach().abs().double()
    finite = finite[finite.isfinite()]
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    return operations * torch.finfo(dtype).eps * largest


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype | None = None,
    operations: int = OPERATIONS,
    note: str = "",
) -> None:
    """Equal up to :func:`tolerance` in dtype (by default that of `actual`), same shape, same NaNs."""
    assert actual.shape == expected.shape, f"{note}: {actual.shape} is not {expected.shape}"
    atol = tolerance(expected, dtype or actual.dtype, operations)
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=0,
        atol=atol,
        equal_nan=True,
        msg=lambda text: f"{note}: {text}",
    )


def assert_same(actual: Tensor, expected: Tensor, note: str = "") -> None:
    """The same numbers, bit for bit but for the layout (and NaN equals NaN)."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{note}: {text}"
    )


# Whose kernels run: cpu, cuda or emulated. The `device` fixture says so.
kernels = "cpu"


def assert_same_of_any_kernel(actual: Tensor, expected: Tensor, note: str = "") -> None:
    """The same numbers, computed from other layouts. On CUDA a layout that allows no vectors takes another
    kernel, which deals the terms of a sum to its threads in another order."""
    (assert_same if kernels == "cpu" else assert_close)(actual, expected, note=note)


def assert_rounded(actual: Tensor, exact: Tensor, note: str = "", roundings: int = 1) -> None:
    """`actual`, of half precision, is `exact`, computed in float32, rounded: half an ulp away, and
    what float32 roundings may shift a tie. (Twice: before and after it met an upstream gradient.)"""
    info = torch.finfo(actual.dtype)
    exact = exact.detach().double()
    overflow = exact.abs() >= info.max
    assert torch.equal(actual[overflow].double(), exact[overflow].to(actual.dtype).double()), note
    bound = 0.5 * roundings * (info.eps * exact.abs() * (1 + info.eps) + info.smallest_normal * info.eps)
    bound = bound + tolerance(exact[~overflow], torch.float32)
    error = (actual.detach().double() - exact).abs()
    assert bool(((error <= bound) | overflow).all()), f"{note}: off by {(error - bound).max()}"


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed numbers of order 1, one for each element of each output, different in each."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.device, o.dtype) for o in outputs
    ]


def gradients(outputs: Sequence[Tensor], inputs: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    """The derivative of <outputs, cotangents> for every input that requires one."""
    names = [name for name, t in inputs.items() if t.requires_grad]
    pairs = [(o, c) for o, c in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    live, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(live, [inputs[n] for n in names], upstream, **options)
    return dict(zip(names, grads, strict=True))
