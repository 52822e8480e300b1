"""The three routes of every public function.

Eager: the namesake in _C checks the call and runs the kernel (csrc/eager.cpp), or returns None where kernels
cannot go. Compiled: the dispatcher's op, which checks while it is traced. And reference.py for the rest:
torch.func transforms, forward-mode AD, devices without a kernel.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import _checks, reference
from .._ops import _C, CUDA_MISSING, HAS_CUDA_KERNELS
from ..words import Reduction

KERNEL_DEVICES = ("cpu", "cuda") if HAS_CUDA_KERNELS else ("cpu",)
# Kernels index up to five dimensions; more are flattened first.
MAX_DIMS = 5
# Of the eager route. Tests put other kernels in its place.
eager = _C


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active; both are live while torch.compile
    traces them, so the answer is right there too, if it is asked and not traced."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


@functools.cache
def warn_without_cuda_kernels() -> None:
    """Once: every call on that GPU is slower than it could be."""
    warnings.warn(CUDA_MISSING or "fgbg_cuda was built without CUDA kernels", UserWarning, stacklevel=2)


def traced_op(name: str, device: torch.device) -> Any:
    """What to call while compiling: the op, or None where only reference.py works."""
    if device.type == "cuda" and not HAS_CUDA_KERNELS:
        if is_compiling():
            from .._while_compiling import warn_without_cuda_kernels as warn
        else:
            warn = warn_without_cuda_kernels
        warn()
    if not is_compiling() or device.type not in KERNEL_DEVICES:
        return None
    from .._while_compiling import transforming

    # Reading the level makes torch trace anew when it changes; transforms it watches by itself.
    if transforming() or forward_ad._current_level >= 0:
        return None
    return getattr(torch.ops.fgbg, name).default


def as_tensor(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number for a compiled graph, which takes other values of it without being traced anew: torch turns
    arithmetic with a number into arithmetic with a tensor, but the number itself, given to an op, into a
    constant."""
    return (torch.ones((), dtype=torch.float64, device=like.device) * value).to(dtype)


def seed_tensor(seed: Tensor | int | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(device)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device, generator=generator)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def drawn_seed(seed: Any, generator: torch.Generator | None, mu: Any) -> Any:
    """The seed; where there is a generator, drawn from it."""
    if generator is None:
        return seed if seed is None else _checks.seed(seed)
    device = mu.device if isinstance(mu, Tensor) else torch.device("cpu")
    _checks.generator(generator, seed, device)
    return seed_tensor(None, generator, device)


def widened(*operands: Any) -> tuple[Any, ...]:
    """Float tensors in the dtype of the computation. Where a function is made of several ops, their
    gradients then add up in that dtype and are rounded once, as in a single op."""
    dtype = reference.compute_dtype(*operands)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _checks.FLOATS else t for t in operands)


def traced(like: Tensor, batch_dims: int, *operands: Any) -> tuple[Any, ...]:
    """Operands that broadcast to ``like``, as a traced op takes them: numbers as tensors, and tensors of more
    dimensions than kernels index as matrices of samples and their elements."""
    dtype = reference.compute_dtype(*operands)
    made = tuple(x if x is None or isinstance(x, Tensor) else as_tensor(x, like, dtype) for x in operands)
    return as_matrices(like, batch_dims, *made)


def as_matrices(like: Tensor, batch_dims: int, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    if like.dim() <= MAX_DIMS:
        return operands
    shape = (math.prod(like.shape[:batch_dims]), math.prod(like.shape[batch_dims:]))
    dtype = reference.compute_dtype(*operands)
    return tuple(
        t if t is None or t.dim() == 0 else expanded(t, like, dtype).reshape(shape) for t in operands
    )


def expanded(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Where it is broadcast, in the dtype of the computation, in which its gradients then add up."""
    return t if t.shape == like.shape else t.to(dtype).expand_as(like)


def traced_batch_dims(like: Tensor, batch_dims: int) -> int:
    return batch_dims if like.dim() <= MAX_DIMS else 1


def unflattened(elements: Tensor, like: Tensor, reduction: Reduction, batch_dims: int) -> Tensor:
    """What an op makes of matrices, in the shape that ``like`` had."""
    if like.dim() <= MAX_DIMS or reduction not in ("none", "sample"):
        return elements
    return elements.view(like.shape if reduction == "none" else like.shape[:batch_dims])


def sum_in_order(x: Tensor) -> Tensor:
    """The sum of a vector, in the same order whatever the number of threads: torch splits one long
    sum among threads, but not a row of a matrix."""
    row = 4096
    padded = torch.nn.functional.pad(x, (0, -x.shape[0] % row))
    return padded.view(-1, row).sum(1).sum()
