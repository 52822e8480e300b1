"""What torch.compile is to ask and not to trace. Imported where it traces and nowhere else: to mark a
function loads the compiler, which takes longer than all the rest of the package."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .functional import _routes


@torch.compiler.assume_constant_result
def transforming() -> bool:
    return _routes.transforming()


def is_always_zero(number: float) -> bool:
    """Whether it is the constant 0; of a number that changes it is not known, nor asked."""
    return statically_known_true(number == 0)


@torch.compiler.assume_constant_result
def warn_without_cuda_kernels() -> None:
    _routes.warn_without_cuda_kernels()
