"""The public functions. Each checks its arguments and calls the fused kernel, or, where kernels cannot
go (``torch.func`` transforms, forward-mode AD, devices without one), the same formula in reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks, reference
from ._ops import _C, HAS_CUDA_KERNELS

__all__ = [
    "ReconstructionTerms",
    "bernoulli_kl",
    "blended_reconstruction_loss",
    "gaussian_kl",
    "importance_weighted_bound",
    "masked_reconstruction_loss",
    "mixture_reconstruction_loss",
    "philox_normal",
    "reparameterize",
    "sample_gaussian",
]

_KERNEL_DEVICES = ("cpu", "cuda") if HAS_CUDA_KERNELS else ("cpu",)
# Kernels index up to five dimensions; more are flattened first.
_MAX_DIMS = 5


def _op(name: str, device: torch.device) -> Any:
    """How to call an op here: the binding, the traceable op, or None where only reference.py works."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fgbg, name).default if device.type in _KERNEL_DEVICES else None
    if (
        device.type not in _KERNEL_DEVICES
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    return getattr(_C, name)


def _seed_tensor(
    seed: Tensor | int | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        # Drawn here and not in the op: the op stays pure, so a compiler that merges equal calls
        # cannot merge two samples, and torch.manual_seed governs the draw.
        return torch.randint(2**63 - 1, (1,), device=device, generator=generator)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def philox_normal(
    seed: Tensor | int,
    size: Sequence[int],
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    _checks.size("size", size)
    _checks.integer("offset", offset, 0)
    if seed is None:
        raise TypeError("seed must be an integer or a one-element int64 tensor, got NoneType")
    if dtype not in _checks.FLOATS:
        raise TypeError(f"dtype is {dtype}, expected one of {_checks.FLOATS}")
    if device is not None:
        device = torch.device(device)
    elif not isinstance(seed, Tensor):
        device = torch.get_default_device()
    _checks.seed(seed, None, device)
    seed = _seed_tensor(seed, None, device)
    op = _op("philox_normal", seed.device)
    if op is None:
        return reference.philox_normal(seed, size, offset, dtype)
    return op(seed, size, offset, dtype)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    seed: Tensor | int | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    _checks.latents(mu, logvar)
    _checks.draws(seed, generator, offset, num_samples, mu)
    seed = _seed_tensor(seed, generator, mu.device)
    op = _op("reparameterize", mu.device)
    if op is None:
        return reference.reparameterize(mu, logvar, seed, offset, num_samples)
    z = op(*_flat(mu, logvar), seed, offset, num_samples)
    return _unflat_draws(z, mu)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
) -> Tensor:
    _checks.latents(mu, logvar, prior_mu, prior_logvar)
    _checks.kl(reduction, free_bits)
    inner = "none" if free_bits > 0 else reduction
    op = _op("gaussian_kl", mu.device)
    if op is None:
        kl = reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar, inner)
    else:
        kl = op(*_flat(mu, logvar, prior_mu, prior_logvar), inner)
    return _finish_kl(kl, mu, reduction, free_bits)


def sample_gaussian(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    num_samples: int | None = None,
    seed: Tensor | int | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _checks.latents(mu, logvar, prior_mu, prior_logvar)
    _checks.draws(seed, generator, offset, num_samples, mu)
    _checks.kl(reduction, free_bits)
    seed = _seed_tensor(seed, generator, mu.device)
    inner = "none" if free_bits > 0 else reduction
    op = _op("sample_gaussian", mu.device)
    if op is None:
        z, kl = reference.sample_gaussian(
            mu, logvar, prior_mu, prior_logvar, seed, offset, num_samples, inner
        )
    else:
        z, kl = op(
            *_flat(mu, logvar, prior_mu, prior_logvar), seed, offset, num_samples, inner
        )
    return _unflat_draws(z, mu), _finish_kl(kl, mu, reduction, free_bits)


def _flat(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    if tensors[0].dim() <= _MAX_DIMS:
        return tensors
    return tuple(None if t is None else t.flatten(1) for t in tensors)


def _unflat_draws(z: Tensor, mu: Tensor) -> Tensor:
    return z if mu.dim() <= _MAX_DIMS else z.unflatten(-1, mu.shape[1:])


def _finish_kl(kl: Tensor, mu: Tensor, reduction: str, free_bits: float) -> Tensor:
    if free_bits > 0:
        floored = _sum_in_order(kl.flatten(1).mean(0).clamp(min=free_bits))
        if reduction == "batchmean":
            return floored
        return floored * mu.shape[0] if reduction == "sum" else floored * mu.shape[0] / mu.numel()
    return kl.view(mu.shape) if reduction == "none" else kl


def _sum_in_order(x: Tensor) -> Tensor:
    """The sum of a vector, in the same order whatever the number of threads: torch splits one long
    sum among threads, but not a row of a matrix."""
    row = 4096
    padded = torch.nn.functional.pad(x, (0, -x.shape[0] % row))
    return padded.view(-1, row).sum(1).sum()


def bernoulli_kl(
    logits: Tensor, prior_logits: Tensor | float = 0.0, *, reduction: str = "batchmean"
) -> Tensor:
    _checks.tensor("logits", logits)
    if logits.dim() < 1:
        raise ValueError("logits has shape [], expected [B, *D]")
    if isinstance(prior_logits, Tensor):
        _checks.like("prior_logits", prior_logits, "logits", logits)
        prior, constant = prior_logits, 0.0
    else:
        _checks.number("prior_logits", prior_logits)
        prior, constant = None, float(prior_logits)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    op = _op("bernoulli_kl", logits.device)
    if op is None:
        return reference.bernoulli_kl(logits, prior, constant, reduction)
    kl = op(*_flat(logits, prior), constant, reduction)
    return kl.view(logits.shape) if reduction == "none" else kl


class ReconstructionTerms(NamedTuple):
    """Per-sample parts of a masked loss, each of shape [B] and differentiable: before the weights,
    the area normalisation and the reduction."""

    fg_nats: Tensor
    bg_nats: Tensor
    fg_area: Tensor


def masked_reconstruction_loss(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    mask_logits: Tensor | None = None,
    likelihood: str = "gaussian",
    fg_scale: Tensor | float = 1.0,
    bg_scale: Tensor | float = 1.0,
    fg_weight: float = 1.0,
    bg_weight: float = 1.0,
    normalize: str | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, ReconstructionTerms]:
    _checks.images(fg, bg, target, single=True)
    _checks.one_mask(mask, mask_logits)
    _check_mask_and_likelihood(fg, mask, mask_logits, likelihood, reduction)
    _checks.scale("fg_scale", fg_scale, likelihood, fg)
    _checks.scale("bg_scale", bg_scale, likelihood, fg)
    _checks.number("fg_weight", fg_weight)
    _checks.number("bg_weight", bg_weight)
    if normalize is not None:
        _checks.choice("normalize", normalize, ("area",))
    _checks.flag("return_terms", return_terms)
    loss, terms = _reconstruction(
        fg, bg, target, mask, mask_logits, fg_scale, bg_scale, "masked", likelihood,
        fg_weight, bg_weight, normalize == "area", reduction, return_terms,
    )  # fmt: skip
    return (loss, ReconstructionTerms(terms[0], terms[1], terms[2])) if return_terms else loss


def blended_reconstruction_loss(
    fg: Tensor,
    bg: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    mask_logits: Tensor | None = None,
    likelihood: str = "gaussian",
    scale: Tensor | float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    _checks.images(fg, bg, target, single=False)
    _checks.one_mask(mask, mask_logits)
    _check_mask_and_likelihood(fg, mask, mask_logits, likelihood, reduction)
    _checks.scale("scale", scale, likelihood, fg)
    return _reconstruction(
        fg, bg, target, mask, mask_logits, scale, 1.0, "blended", likelihood,
        1.0, 1.0, False, reduction, False,
    )[0]  # fmt: skip


def mixture_reconstruction_loss(
    fg: Tensor,
    bg: Tensor,
    target: Tensor,
    *,
    mask_logits: Tensor,
    likelihood: str = "gaussian",
    fg_scale: Tensor | float = 1.0,
    bg_scale: Tensor | float = 1.0,
    channels: str = "joint",
    reduction: str = "batchmean",
) -> Tensor:
    _checks.images(fg, bg, target, single=False)
    _checks.choice("channels", channels, ("joint", "independent"))
    _check_mask_and_likelihood(
        fg, None, mask_logits, likelihood, reduction, per_channel=channels == "independent"
    )
    _checks.scale("fg_scale", fg_scale, likelihood, fg)
    _checks.scale("bg_scale", bg_scale, likelihood, fg)
    return _reconstruction(
        fg, bg, target, None, mask_logits, fg_scale, bg_scale, f"mixture_{channels}", likelihood,
        1.0, 1.0, False, reduction, False,
    )[0]  # fmt: skip


def _check_mask_and_likelihood(
    fg: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    likelihood: str,
    reduction: str,
    per_channel: bool = True,
) -> None:
    if mask is not None:
        _checks.mask("mask", mask, fg, logits=False)
    else:
        _checks.mask("mask_logits", mask_logits, fg, logits=True, per_channel=per_channel)
    _checks.choice("likelihood", likelihood, tuple(reference.LIKELIHOODS))
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)


def _reconstruction(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    fg_scale: Tensor | float,
    bg_scale: Tensor | float,
    composition: str,
    likelihood: str,
    fg_weight: float,
    bg_weight: float,
    normalize_area: bool,
    reduction: str,
    return_terms: bool,
) -> tuple[Tensor, Tensor]:
    is_logits = mask is None
    mask = mask_logits if is_logits else mask
    op = _op("reconstruction_loss", fg.device)
    # An unreduced loss normalised by area needs two passes over the image; it has no kernel.
    if op is None or (normalize_area and reduction == "none"):
        return reference.reconstruction_loss(
            fg, bg, target, mask, fg_scale, bg_scale, composition, is_logits, likelihood,
            fg_weight, bg_weight, normalize_area, reduction, return_terms,
        )  # fmt: skip
    fg_tensor, fg_value = (fg_scale, 1.0) if isinstance(fg_scale, Tensor) else (None, fg_scale)
    bg_tensor, bg_value = (bg_scale, 1.0) if isinstance(bg_scale, Tensor) else (None, bg_scale)
    return op(
        fg, bg, target, mask, fg_tensor, bg_tensor, fg_value, bg_value, composition, is_logits,
        likelihood, fg_weight, bg_weight, normalize_area, reduction, return_terms,
    )  # fmt: skip


def importance_weighted_bound(
    log_p: Tensor, log_q: Tensor, *, dim: int = 0, bits_per_dim: int | None = None
) -> Tensor:
    _checks.tensor("log_p", log_p)
    _checks.like("log_q", log_q, "log_p", log_p)
    _checks.integer("dim", dim, -log_p.dim())
    if log_p.dim() == 0 or dim >= log_p.dim():
        raise ValueError(f"dim is {dim}, expected a dimension of log_p, of shape {list(log_p.shape)}")
    if bits_per_dim is not None:
        _checks.integer("bits_per_dim", bits_per_dim, 1)
    dtype = reference.compute_dtype(log_p, log_q)
    bound = reference.importance_weighted_bound(log_p.to(dtype), log_q.to(dtype), dim)
    if bits_per_dim is None:
        return bound
    return -bound / (bits_per_dim * reference.LOG_2)
