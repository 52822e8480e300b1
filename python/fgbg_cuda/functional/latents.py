"""Gaussian latents: samples, their KL divergence, and log-densities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from ..words import Parameterization, Reduction
from . import _routes

__all__ = ["gaussian_kl", "gaussian_log_prob", "reparameterize", "sample_gaussian"]


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    parameterization: Parameterization = "logvar",
    num_samples: int | None = None,
    seed: Tensor | int | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of N(mu, exp logvar) that gradients pass through: ``z = mu + exp(logvar / 2) * eps``.

    Kingma & Welling, "Auto-Encoding Variational Bayes", 2014. ``eps`` is
    ``philox_normal(seed, z.shape, offset=offset)``. It is not stored for the backward pass but made again
    there. (The exception is one draw in float32 or float64 on the CPU, where storing dz/dlogvar is faster.)

    Args:
        mu, logvar: ``[B, *D]``, any float dtype.
        parameterization: what ``logvar`` is: ``"logvar"``, ``"log_std"`` or ``"std"``, the standard deviation
            itself (as from ``softplus``), whose gradient is eps wherever it is, at 0 too.
        num_samples: S draws, stacked in front: the result is ``[S, B, *D]``.
        seed: an integer, or an int64 tensor of one element, on the CPU or the device of ``mu``.
            Default: drawn from ``generator``, so that ``torch.manual_seed`` governs it.
        offset: number of the first element in the stream of ``seed``. A part of a split batch that
            passes the position of its first element gets the noise of the unsplit batch.
        generator: where the seed is drawn from. Default: the default generator of the device.

    Returns:
        ``z``, in the (promoted) dtype of ``mu`` and ``logvar``; half precision is computed in float32.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
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
    return _draw(mu, logvar, parameterization, num_samples, seed, offset)


def _draw(
    mu: Tensor, spread: Tensor, parameterization: Parameterization, num_samples: Any, seed: Any, offset: Any
) -> Tensor:
    if not is_compiling():
        z = _routes.eager.reparameterize(mu, spread, parameterization, num_samples, seed, offset)
        if z is not None:
            return z
    seed = _routes.seed_tensor(seed, None, mu.device)
    op = _routes.traced_op("reparameterize", mu.device)
    if op is None:
        return reference.reparameterize(mu, spread, parameterization, seed, offset, num_samples)
    z = op(*_routes.as_matrices(mu, 1, mu, spread), parameterization, seed, offset, num_samples)[0]
    return z if mu.dim() <= _routes.MAX_DIMS else z.view(*z.shape[:-2], *mu.shape)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    parameterization: Parameterization = "logvar",
    reduction: Reduction = "batchmean",
    free_bits: float = 0.0,
    batch_dims: int = 1,
) -> Tensor:
    """KL(N(mu, exp logvar) || N(prior_mu, exp prior_logvar)) in nats, for diagonal Gaussians.

    Per element, with d = logvar - prior_logvar:
    ``1/2 (exp(d) - 1 - d + (mu - prior_mu)^2 / exp(prior_logvar))``; exp(d) - 1 - d is evaluated without
    cancellation, so a posterior near its prior keeps its relative accuracy. (Kingma & Welling, 2014,
    appendix B, for a general Gaussian prior.)

    Args:
        mu, logvar: posterior, ``[B, *D]``, any float dtype.
        prior_mu, prior_logvar: prior: numbers, or tensors that broadcast to the shape of the posterior.
            Default: that of N(0, 1), whatever the parameterization.
        parameterization: what ``logvar`` is: ``"logvar"``, ``"log_std"`` or ``"std"``, the standard deviation
            itself (as from ``softplus``), and what ``prior_logvar`` is.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per sample, [B]), ``"batchmean"`` (mean over
            the samples of these sums), ``"sum"``, or ``"mean"`` (over every element). An ELBO needs
            ``"batchmean"``: nats per image, on the same footing as the other terms.
        free_bits: nats per latent dimension. The mean over the batch of each dimension's KL is raised
            to at least this before dimensions are summed: ``sum_j max(mean_b kl[b, j], free_bits)``.
            Dimensions below it get no gradient. ``"batchmean"`` gives that sum, ``"sum"`` and ``"mean"`` the
            same rescaled. (Kingma et al., "Improved Variational Inference with Inverse
            Autoregressive Flow", 2016, appendix C.8.)
        batch_dims: how many leading dimensions index samples. With 2, latents ``[S, B, *D]`` give [S, B] for
            ``"sample"``.

    Returns:
        float32, or float64 if an operand is float64.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> fgbg_cuda.gaussian_kl(torch.full((4, 2), 3.0), torch.zeros(4, 2))  # 2 * 3^2 / 2 nats
        tensor(9.)
        >>> std = torch.ones(4, 2)
        >>> fgbg_cuda.gaussian_kl(torch.full((4, 2), 3.0), std, parameterization="std")
        tensor(9.)
    """
    priors = _priors(prior_mu, prior_logvar, parameterization)
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    free_bits = _checks.free_bits(free_bits, reduction)
    if _may_floor(free_bits):
        mu, logvar, prior_mu, prior_logvar = _routes.widened(mu, logvar, *priors)
        return _floored_kl(
            mu, logvar, prior_mu, prior_logvar, parameterization, reduction, free_bits, batch_dims
        )
    return _kl(mu, logvar, *priors, parameterization, reduction, batch_dims)


def _priors(prior_mu: Any, prior_spread: Any, parameterization: object) -> tuple[Any, Any]:
    mu = prior_mu if prior_mu is None else _checks.tensor_or_number("prior_mu", prior_mu)
    return mu, _spread("prior_logvar", prior_spread, parameterization)


def _spread(name: str, value: Any, parameterization: object) -> Any:
    """None, a tensor, or a number that this parameterization has."""
    if value is None:
        return None
    return _checks.tensor_or_number(name, value, above=0.0 if parameterization == "std" else -math.inf)


def _may_floor(free_bits: float) -> bool:
    """Whether to take the way that floors. While compiling, of a number that may change, without asking
    what it is now, so that a schedule that begins or ends with 0 needs no graph more: a floor of 0 changes
    nothing, no KL being below it."""
    if not is_compiling():
        return free_bits > 0
    from .._while_compiling import is_always_zero

    return not is_always_zero(free_bits)


def _kl(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Any,
    prior_spread: Any,
    parameterization: Parameterization,
    reduction: Reduction,
    batch_dims: int,
) -> Tensor:
    options = (parameterization, reduction, batch_dims)
    if not is_compiling():
        kl = _routes.eager.gaussian_kl(mu, spread, prior_mu, prior_spread, *options)
        if kl is not None:
            return kl
    op = _routes.traced_op("gaussian_kl", mu.device)
    if op is None:
        return reference.gaussian_kl(
            mu, spread, 0.0 if prior_mu is None else prior_mu, prior_spread, *options
        )
    operands = _routes.traced(mu, batch_dims, mu, spread, prior_mu, prior_spread)
    kl, _ = op(*operands, parameterization, reduction, _routes.traced_batch_dims(mu, batch_dims))
    return _routes.unflattened(kl, mu, reduction, batch_dims)


def _floored_kl(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Any,
    prior_spread: Any,
    parameterization: Parameterization,
    reduction: Reduction,
    free_bits: float,
    batch_dims: int,
) -> Tensor:
    if not is_compiling():
        _routes.eager.check_gaussian_kl(
            mu, spread, prior_mu, prior_spread, parameterization, reduction, batch_dims
        )

    def by_dimension(x: Any) -> Any:
        """With the batch last, the "samples" of the reduction are the latent dimensions."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        x = _routes.expanded(x, mu, x.dtype).flatten(0, batch_dims - 1)
        return (x.flatten(1) if x.dim() > 1 else x[:, None]).t()

    samples = math.prod(mu.shape[:batch_dims])
    posterior = (by_dimension(mu), by_dimension(spread))
    prior = (by_dimension(prior_mu), by_dimension(prior_spread))
    mean_kl = _kl(*posterior, *prior, parameterization, "sample", 1) / samples
    floored = _routes.sum_in_order(_at_least(mean_kl, free_bits))
    if reduction == "batchmean":
        return floored
    total = floored * samples
    return total if reduction == "sum" else total / mu.numel()


def _at_least(x: Tensor, floor: float) -> Tensor:
    # A number that changes must not be an operand of clamp in a compiled graph: see _as_tensor.
    return x.clamp(min=_routes.as_tensor(floor, x, x.dtype) if is_compiling() else floor)


def sample_gaussian(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    parameterization: Parameterization = "logvar",
    num_samples: int | None = None,
    seed: Tensor | int | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    reduction: Reduction = "batchmean",
    free_bits: float = 0.0,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """``(z, kl)``: ``reparameterize`` and ``gaussian_kl`` in one pass over memory.

    Args:
        mu, logvar: posterior, ``[B, *D]``, any float dtype.
        prior_mu, prior_logvar: prior: numbers, or tensors that broadcast to the shape of the posterior.
            Default: that of N(0, 1), whatever the parameterization.
        parameterization: what ``logvar`` is: ``"logvar"``, ``"log_std"`` or ``"std"``, the standard deviation
            itself (as from ``softplus``), and what ``prior_logvar`` is.
        num_samples: S draws, stacked in front: z is ``[S, B, *D]``; the KL is that of the distribution.
        seed: an integer, or an int64 tensor of one element, on the CPU or the device of ``mu``.
            Default: drawn from ``generator``, so that ``torch.manual_seed`` governs it.
        offset: number of the first element in the stream of ``seed``. A part of a split batch that
            passes the position of its first element gets the noise of the unsplit batch.
        generator: where the seed is drawn from. Default: the default generator of the device.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per sample, [B]), ``"batchmean"`` (mean over
            the samples of these sums), ``"sum"``, or ``"mean"`` (over every element). An ELBO needs
            ``"batchmean"``: nats per image, on the same footing as the other terms.
        free_bits: as in ``gaussian_kl``.
        batch_dims: how many leading dimensions index samples. With 2, latents ``[S, B, *D]`` give [S, B] for
            ``"sample"``.

    Returns:
        ``z`` in the dtype of ``mu`` and ``logvar``; ``kl`` in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> mu, logvar = torch.zeros(8, 16), torch.zeros(8, 16)
        >>> z, kl = fgbg_cuda.sample_gaussian(mu, logvar)
        >>> z.shape, kl
        (torch.Size([8, 16]), tensor(0.))
    """
    priors = _priors(prior_mu, prior_logvar, parameterization)
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    free_bits = _checks.free_bits(free_bits, reduction)
    seed = _routes.drawn_seed(seed, generator, mu)
    offset = _checks.integer("offset", offset, 0)
    if num_samples is not None:
        num_samples = _checks.integer("num_samples", num_samples, 1)
    if _may_floor(free_bits):
        if not is_compiling():
            _routes.eager.check_gaussian_kl(mu, logvar, *priors, parameterization, reduction, batch_dims)
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar, prior_mu, prior_logvar = _routes.widened(mu, logvar, *priors)
        z = _draw(mu, logvar, parameterization, num_samples, seed, offset)
        kl = _floored_kl(
            mu, logvar, prior_mu, prior_logvar, parameterization, reduction, free_bits, batch_dims
        )
        return z.to(dtype), kl
    if not is_compiling():
        out = _routes.eager.sample_gaussian(
            mu, logvar, *priors, parameterization, num_samples, seed, offset, reduction, batch_dims
        )
        if out is not None:
            return out
    seed = _routes.seed_tensor(seed, None, mu.device)
    op = _routes.traced_op("sample_gaussian", mu.device)
    if op is None:
        prior_mu, prior_spread = priors
        return reference.sample_gaussian(
            mu, logvar, 0.0 if prior_mu is None else prior_mu, prior_spread, parameterization, seed, offset,
            num_samples, reduction, batch_dims,
        )  # fmt: skip
    z, kl, _ = op(
        *_routes.traced(mu, batch_dims, mu, logvar, *priors), parameterization, seed, offset, num_samples,
        reduction, _routes.traced_batch_dims(mu, batch_dims),
    )  # fmt: skip
    z = z if mu.dim() <= _routes.MAX_DIMS else z.view(*z.shape[:-2], *mu.shape)
    return z, _routes.unflattened(kl, mu, reduction, batch_dims)


def gaussian_log_prob(
    z: Tensor,
    mu: Tensor | float = 0.0,
    logvar: Tensor | float | None = None,
    *,
    parameterization: Parameterization = "logvar",
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """log N(z; mu, exp logvar) in nats, the constant included:
    ``-1/2 (log(2 pi) + logvar + (z - mu)^2 / exp(logvar))`` per element.

    With ``reduction="sample"`` it gives the operands of ``importance_weighted_bound``; with a ``logvar`` for
    each element it is the log-likelihood of a decoder that predicts its noise.

    Args:
        z: ``[B, *D]``, any float dtype.
        mu, logvar: numbers, or tensors that broadcast to the shape of ``z``, such as ``[B, *D]`` against the
            ``[S, B, *D]`` of S draws. Default: those of N(0, 1), whatever the parameterization.
        parameterization: what ``logvar`` is: ``"logvar"``, ``"log_std"`` or ``"std"``, the standard deviation
            itself (as from ``softplus``).
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per sample, [B]), ``"batchmean"`` (mean over
            the samples of these sums), ``"sum"``, or ``"mean"`` (over every element). An ELBO needs
            ``"batchmean"``: nats per image, on the same footing as the other terms.
        batch_dims: how many leading dimensions index samples. With 2, draws ``[S, B, *D]`` give [S, B] for
            ``"sample"``.

    Returns:
        float32, or float64 if an operand is float64.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> fgbg_cuda.gaussian_log_prob(torch.zeros(2, 3), reduction="sample")  # -3/2 log(2 pi)
        tensor([-2.7568, -2.7568])
        >>> mu, logvar = torch.zeros(4, 8), torch.zeros(4, 8)
        >>> z = fgbg_cuda.reparameterize(mu, logvar, num_samples=5)
        >>> fgbg_cuda.gaussian_log_prob(z, mu, logvar, reduction="sample", batch_dims=2).shape
        torch.Size([5, 4])
    """
    mu = _checks.tensor_or_number("mu", mu)
    spread = _spread("logvar", logvar, parameterization)
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    options = (parameterization, reduction, batch_dims)
    if not is_compiling():
        log_prob = _routes.eager.gaussian_log_prob(z, mu, spread, *options)
        if log_prob is not None:
            return log_prob
    op = _routes.traced_op("gaussian_log_prob", z.device)
    if op is None:
        return reference.gaussian_log_prob(z, mu, spread, *options)
    operands = _routes.traced(z, batch_dims, z, mu, spread)
    log_prob, _ = op(*operands, parameterization, reduction, _routes.traced_batch_dims(z, batch_dims))
    return _routes.unflattened(log_prob, z, reduction, batch_dims)
