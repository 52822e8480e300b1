"""Gaussian latents: samples and their KL divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from . import _routes

__all__ = ["gaussian_kl", "reparameterize", "sample_gaussian"]


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    seed: Tensor | int | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of N(mu, exp logvar) that gradients pass through: ``z = mu + exp(logvar / 2) * eps``.

    Kingma & Welling, "Auto-Encoding Variational Bayes", 2014. ``eps`` is
    ``philox_normal(seed, z.shape, offset=offset)``. Backward makes it again instead of storing it, but for
    one draw in float32 or float64 on the CPU, where keeping dz/dlogvar takes less time.

    Args:
        mu, logvar: [B, *D], any float dtype.
        num_samples: S draws, stacked in front: the result is [S, B, *D].
        seed: an integer, or an int64 tensor of one element, on the CPU or the device of ``mu``.
            Default: drawn from ``generator``, so that ``torch.manual_seed`` governs it.
        offset: number of the first element in the stream of ``seed``. A part of a split batch that
            passes the position of its first element gets the noise of the unsplit batch.
        generator: where the seed is drawn from. Default: the default generator of the device.

    Returns:
        ``z``, in the (promoted) dtype of ``mu`` and ``logvar``; half precision is computed in float32.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> z = fgbg_cuda.reparameterize(mu, logvar, seed=7)
        >>> torch.equal(z, fgbg_cuda.philox_normal(7, (2, 3)))
        True
        >>> fgbg_cuda.reparameterize(mu, logvar, num_samples=5).shape
        torch.Size([5, 2, 3])
    """
    seed = _routes.drawn_seed(seed, generator, mu)
    offset = _checks.integer("offset", offset, 0)
    if num_samples is not None:
        num_samples = _checks.integer("num_samples", num_samples, 1)
    return _draw(mu, logvar, num_samples, seed, offset)


def _draw(mu: Tensor, logvar: Tensor, num_samples: Any, seed: Any, offset: Any) -> Tensor:
    if not is_compiling():
        z = _routes.eager.reparameterize(mu, logvar, num_samples, seed, offset)
        if z is not None:
            return z
    seed = _routes.seed_tensor(seed, None, mu.device)
    op = _routes.traced_op("reparameterize", mu.device)
    if op is None:
        return reference.reparameterize(mu, logvar, seed, offset, num_samples)
    return _routes.unflat_draws(op(*_routes.flat(mu, logvar), seed, offset, num_samples)[0], mu)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
) -> Tensor:
    """KL(N(mu, exp logvar) || N(prior_mu, exp prior_logvar)) in nats, for diagonal Gaussians.

    Per element, with d = logvar - prior_logvar:
    ``1/2 (exp(d) - 1 - d + (mu - prior_mu)^2 / exp(prior_logvar))``; exp(d) - 1 - d is evaluated without
    cancellation, so a posterior near its prior keeps its relative accuracy. (Kingma & Welling, 2014,
    appendix B, for a general Gaussian prior.)

    Args:
        mu, logvar: posterior, [B, *D], any float dtype.
        prior_mu, prior_logvar: prior, of the same shape (expand a shared one); each defaults to 0.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
        free_bits: nats per latent dimension. The mean over the batch of each dimension's KL is raised
            to at least this, before dimensions are summed: sum_j max(mean_b kl[b, j], free_bits).
            Dimensions below it get no gradient. "batchmean" gives that sum, "sum" and "mean" the
            same rescaled. (Kingma et al., "Improved Variational Inference with Inverse
            Autoregressive Flow", 2016, appendix C.8.)

    Returns:
        float32, or float64 if an operand is float64.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> fgbg_cuda.gaussian_kl(torch.full((4, 2), 3.0), torch.zeros(4, 2))  # 2 * 3^2 / 2 nats
        tensor(9.)
    """
    free_bits = _checks.free_bits(free_bits, reduction)
    if free_bits > 0:
        return _floored_kl(*_routes.widened(mu, logvar, prior_mu, prior_logvar), reduction, free_bits)
    return _kl(mu, logvar, prior_mu, prior_logvar, reduction)


def _kl(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    if not is_compiling():
        kl = _routes.eager.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
        if kl is not None:
            return kl
    op = _routes.traced_op("gaussian_kl", mu.device)
    if op is None:
        return reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
    kl, _ = op(*_routes.flat(mu, logvar, prior_mu, prior_logvar), reduction)
    return kl.view(mu.shape) if reduction == "none" else kl


def _floored_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    reduction: str,
    free_bits: float,
) -> Tensor:
    if not is_compiling():
        _routes.eager.check_gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
    # With the batch last, the "samples" of the reduction are the latent dimensions.
    by_dimension = (
        None if t is None else (t.flatten(1) if t.dim() > 1 else t[:, None]).t()
        for t in (mu, logvar, prior_mu, prior_logvar)
    )
    mean_kl = _kl(*by_dimension, "sample") / mu.shape[0]
    floored = _routes.sum_in_order(_at_least(mean_kl, free_bits))
    if reduction == "batchmean":
        return floored
    total = floored * mu.shape[0]
    return total if reduction == "sum" else total / mu.numel()


def _at_least(x: Tensor, floor: float) -> Tensor:
    # A number that changes must not be an operand of clamp in a compiled graph: see _as_tensor.
    return x.clamp(min=_routes.as_tensor(floor, x, x.dtype) if is_compiling() else floor)


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
    """``(z, kl)``: :func:`reparameterize` and :func:`gaussian_kl` in one pass over memory.

    Args:
        mu, logvar: posterior, [B, *D], any float dtype.
        prior_mu, prior_logvar: prior, of the same shape; each defaults to 0.
        num_samples: S draws, stacked in front: z is [S, B, *D]; the KL is that of the distribution.
        seed: an integer, or an int64 tensor of one element, on the CPU or the device of ``mu``.
            Default: drawn from ``generator``, so that ``torch.manual_seed`` governs it.
        offset: number of the first element in the stream of ``seed``. A part of a split batch that
            passes the position of its first element gets the noise of the unsplit batch.
        generator: where the seed is drawn from. Default: the default generator of the device.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
        free_bits: as in :func:`gaussian_kl`.

    Returns:
        ``z`` in the dtype of ``mu`` and ``logvar``; ``kl`` in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> mu, logvar = torch.zeros(8, 16), torch.zeros(8, 16)
        >>> z, kl = fgbg_cuda.sample_gaussian(mu, logvar)
        >>> z.shape, kl
        (torch.Size([8, 16]), tensor(0.))
    """
    free_bits = _checks.free_bits(free_bits, reduction)
    seed = _routes.drawn_seed(seed, generator, mu)
    offset = _checks.integer("offset", offset, 0)
    if num_samples is not None:
        num_samples = _checks.integer("num_samples", num_samples, 1)
    if free_bits > 0:
        if not is_compiling():
            _routes.eager.check_gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
        wide = _routes.widened(mu, logvar, prior_mu, prior_logvar)
        z = _draw(*wide[:2], num_samples, seed, offset)
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        return z.to(dtype), _floored_kl(*wide, reduction, free_bits)
    if not is_compiling():
        out = _routes.eager.sample_gaussian(
            mu, logvar, prior_mu, prior_logvar, num_samples, seed, offset, reduction
        )
        if out is not None:
            return out
    seed = _routes.seed_tensor(seed, None, mu.device)
    op = _routes.traced_op("sample_gaussian", mu.device)
    if op is None:
        return reference.sample_gaussian(
            mu, logvar, prior_mu, prior_logvar, seed, offset, num_samples, reduction
        )
    z, kl, _ = op(*_routes.flat(mu, logvar, prior_mu, prior_logvar), seed, offset, num_samples, reduction)
    return _routes.unflat_draws(z, mu), kl.view(mu.shape) if reduction == "none" else kl
