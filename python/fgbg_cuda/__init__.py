"""Fused CUDA and CPU ops for variational autoencoders that separate foreground from background."""

from __future__ import annotations

from . import functional, nn
from ._ops import _C, CUDA_MISSING
from .functional import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [*functional.__all__, "build_info", "functional", "nn"]


def build_info() -> dict[str, str | None]:
    """What was compiled and what runs: ``torch`` (the version built for), ``cuda`` (None for a CPU
    build), ``cuda_architectures``, ``cuda_missing`` (None, or why a torch with CUDA has no kernels here, and
    how to add them), and ``cpu_capability``, the instruction set in use."""
    return {**_C.build_info(), "cuda_missing": CUDA_MISSING}
