"""The noise of the samples, as a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from . import _routes

__all__ = ["philox_normal"]


def philox_normal(
    seed: Tensor | int,
    size: Sequence[int],
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The noise ``reparameterize`` uses: standard normals that depend on ``seed`` and position alone.

    Element i in row-major order is number ``offset + i`` of the stream: Philox4x32-10 (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and (offset + i) // 4
    as counter, then Box-Muller in float32. Device, layout, thread count and batch split do not enter;
    CPU and CUDA share the random bits and agree to 2e-6.

    Args:
        seed: an integer, or an int64 tensor of one element.
        size: shape of the result.
        offset: number of the first element, at least 0.
        dtype: float64 (float32 values, widened), float32, bfloat16 or float16.
        device: default: that of ``seed`` if it is a tensor, else torch's default device.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> whole = fgbg_cuda.philox_normal(7, (6,))
        >>> part = fgbg_cuda.philox_normal(7, (4,), offset=2)
        >>> torch.equal(part, whole[2:])
        True
    """
    seed = _checks.seed(seed)
    size = _checks.size(size)
    offset = _checks.integer("offset", offset, 0)
    if device is not None and type(device) is not torch.device:
        device = _checks.device(device)
    if not is_compiling():
        out = _routes.eager.philox_normal(seed, size, offset, dtype, device)
        if out is not None:
            return out
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    seed = _routes.seed_tensor(seed, None, device)
    op = _routes.traced_op("philox_normal", seed.device)
    return (op or reference.philox_normal)(seed, size, offset, dtype)
