"""What csrc/bindings.cpp and csrc/eager.cpp give Python. Each call returns None where kernels cannot run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .words import Composition, Likelihood, Parameterization, Reduction

def build_info() -> dict[str, str | None]: ...
def use_cpu_cache(enabled: bool, /) -> None: ...
def cpu_cache_bytes() -> int: ...
def empty_cpu_cache() -> None: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def philox_normal(
    seed: Tensor | int,
    size: tuple[int, ...],
    offset: int,
    dtype: torch.dtype,
    device: torch.device | None,
    /,
) -> Tensor | None: ...
def reparameterize(
    mu: Tensor,
    spread: Tensor,
    parameterization: Parameterization,
    num_samples: int | None,
    seed: Tensor | int | None,
    offset: int,
    /,
) -> Tensor | None: ...
def gaussian_kl(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Tensor | float | None,
    prior_spread: Tensor | float | None,
    parameterization: Parameterization,
    reduction: Reduction,
    batch_dims: int,
    /,
) -> Tensor | None: ...
def check_gaussian_kl(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Tensor | float | None,
    prior_spread: Tensor | float | None,
    parameterization: Parameterization,
    reduction: Reduction,
    batch_dims: int,
    /,
) -> None: ...
def sample_gaussian(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Tensor | float | None,
    prior_spread: Tensor | float | None,
    parameterization: Parameterization,
    num_samples: int | None,
    seed: Tensor | int | None,
    offset: int,
    reduction: Reduction,
    batch_dims: int,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def gaussian_log_prob(
    z: Tensor,
    mu: Tensor | float,
    spread: Tensor | float | None,
    parameterization: Parameterization,
    reduction: Reduction,
    batch_dims: int,
    /,
) -> Tensor | None: ...
def bernoulli_kl(
    logits: Tensor, prior_logits: Tensor | float, reduction: Reduction, batch_dims: int, /
) -> Tensor | None: ...
def categorical_kl(
    logits: Tensor, prior_logits: Tensor | None, dim: int, reduction: Reduction, batch_dims: int, /
) -> Tensor | None: ...

# The loss, or (loss, terms) where return_terms.
def reconstruction_loss(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    fg_scale: Tensor | float,
    bg_scale: Tensor | float,
    weight: Tensor | None,
    composition: Composition,
    likelihood: Likelihood,
    fg_weight: float,
    bg_weight: float,
    normalize_area: bool,
    reduction: Reduction,
    return_terms: bool,
    /,
) -> Any: ...

# The loss, or (loss, responsibilities) where return_responsibilities.
def slot_loss(
    slots: Tensor,
    target: Tensor,
    mask_logits: Tensor | None,
    log_mask: Tensor | None,
    scale: Tensor | float,
    weight: Tensor | None,
    composition: Composition,
    likelihood: Likelihood,
    reduction: Reduction,
    return_responsibilities: bool,
    /,
) -> Any: ...
