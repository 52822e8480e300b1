"""What torch.compile is to ask and not to trace. Imported where it traces and nowhere else: to mark a
function loads the compiler, which takes longer than all the rest of the package."""

from __future__ import annotations

import torch

from .functional import _transforming, _warn_without_cuda_kernels


@torch.compiler.assume_constant_result
def transforming() -> bool:
    return _transforming()


@torch.compiler.assume_constant_result
def warn_without_cuda_kernels() -> None:
    _warn_without_cuda_kernels()
