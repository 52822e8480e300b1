"""Bounds on the likelihood of data."""

from __future__ import annotations

from torch import Tensor

from .. import _checks, reference

__all__ = ["importance_weighted_bound"]


def importance_weighted_bound(
    log_p: Tensor, log_q: Tensor, *, dim: int = 0, bits_per_dim: int | None = None
) -> Tensor:
    """The K-sample bound on log p(x): ``log (1/K) sum_k p(x, z_k) / q(z_k | x)``, in nats.

    K = 1 gives the ELBO's integrand; the bound tightens as K grows and tends to log p(x) (Burda et al.,
    "Importance Weighted Autoencoders", 2016, eq. 8), so that the gap between ELBO and log p(x) can
    be measured.

    Args:
        log_p: log p(x, z_k) = log p(x | z_k) + log p(z_k), in nats, with the K samples along ``dim``,
            for instance [K, B].
        log_q: log q(z_k | x) of the same shape.
        dim: dimension of the samples.
        bits_per_dim: number of dimensions of x. If given, the result is the bound on the negative
            log-likelihood in bits per dimension: -bound / (bits_per_dim * log 2).

    Returns:
        ``log_p`` without ``dim``, float32 (float64 if an operand is float64); differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> log_p, log_q = torch.zeros(5, 2), torch.zeros(5, 2)
        >>> fgbg_cuda.importance_weighted_bound(log_p, log_q)
        tensor([0., 0.])
    """
    _checks.samples(log_p, log_q, dim, bits_per_dim)
    dtype = reference.compute_dtype(log_p, log_q)
    bound = reference.importance_weighted_bound(log_p.to(dtype), log_q.to(dtype), dim)
    if bits_per_dim is None:
        return bound
    return -bound / (bits_per_dim * reference.LOG_2)
