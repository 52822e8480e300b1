"""What torch.compile is to ask and not to trace. Imported where it traces and nowhere else: to mark a
function loads the compiler, which takes longer than all the rest of the package."""

from __future__ import annotations

import torch

from .functional import _routes


@torch.compiler.assume_constant_result
def transforming() -> bool:
    return _routes.transforming()


@torch.compiler.assume_constant_result
def warn_without_cuda_kernels() -> None:
    _routes.warn_without_cuda_kernels()
