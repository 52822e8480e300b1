"""Fused CUDA and CPU ops for variational autoencoders that separate foreground from background."""

from __future__ import annotations

from . import functional, nn
from ._ops import _C
from .functional import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [*functional.__all__, "build_info", "functional", "nn"]


def build_info() -> dict[str, str | None]:
    """What was compiled and what runs: ``torch`` (the version built for), ``cuda`` (None for a CPU
    build), ``cuda_architectures``, and ``cpu_capability``, the instruction set in use."""
    return dict(_C.build_info())
