"""Fused CUDA and CPU ops for variational autoencoders that separate foreground from background."""

from __future__ import annotations

from importlib.metadata import version

from . import distributions, functional, nn
from ._ops import _C, CUDA_MISSING
from .functional import (
    ReconstructionTerms,
    bernoulli_kl,
    blended_reconstruction_loss,
    categorical_kl,
    gaussian_kl,
    gaussian_log_prob,
    importance_weighted_bound,
    masked_reconstruction_loss,
    mixture_reconstruction_loss,
    philox_normal,
    reconstruction_loss,
    reparameterize,
    sample_gaussian,
    slot_blended_loss,
    slot_mixture_loss,
)

__version__ = version("fgbg_cuda")
__all__ = [
    "ReconstructionTerms",
    "bernoulli_kl",
    "blended_reconstruction_loss",
    "build_info",
    "categorical_kl",
    "cpu_cache_bytes",
    "distributions",
    "empty_cpu_cache",
    "functional",
    "gaussian_kl",
    "gaussian_log_prob",
    "importance_weighted_bound",
    "masked_reconstruction_loss",
    "mixture_reconstruction_loss",
    "nn",
    "philox_normal",
    "reconstruction_loss",
    "reparameterize",
    "sample_gaussian",
    "slot_blended_loss",
    "slot_mixture_loss",
    "use_cpu_cache",
]


def build_info() -> dict[str, str | None]:
    """What was compiled and what runs: ``torch`` (the version built for), ``cuda`` (None for a CPU
    build), ``cuda_architectures``, ``cuda_missing`` (None, or why a torch with CUDA has no kernels here, and
    how to add them), and ``cpu_capability``, the instruction set in use."""
    return {**_C.build_info(), "cuda_missing": CUDA_MISSING}


def use_cpu_cache(enabled: bool) -> None:
    """Whether large results on the CPU come from a cache of freed ones, as they do at first.

    On Linux results of 128 KB and more are kept when they are freed, 128 MB of them at most, for the next
    results of their size: a page that the system hands out anew is a page fault when it is first written to.
    What is kept stays until ``empty_cpu_cache``.
    """
    _C.use_cpu_cache(enabled)


def cpu_cache_bytes() -> int:
    """Bytes of freed results that are kept now."""
    return _C.cpu_cache_bytes()


def empty_cpu_cache() -> None:
    """Gives the memory of freed results back."""
    _C.empty_cpu_cache()
