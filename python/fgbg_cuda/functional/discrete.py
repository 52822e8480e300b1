"""KL divergences of discrete posteriors, from logits."""

from __future__ import annotations

import math

from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from ..words import Reduction
from . import _routes

__all__ = ["bernoulli_kl", "categorical_kl"]


def bernoulli_kl(
    logits: Tensor,
    prior_logits: Tensor | float = 0.0,
    *,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """KL(Bernoulli(sigmoid(logits)) || Bernoulli(sigmoid(prior_logits))) in nats, from logits.

    Per element, with m and p the two sigmoids: ``m log(m / p) + (1 - m) log((1 - m) / (1 - p))``, the
    discrete KL of a per-pixel mask posterior against a mask prior. Exact for saturated and for
    nearly equal logits; nothing is added inside a logarithm.

    Args:
        logits: posterior, ``[B, *D]``, any float dtype.
        prior_logits: prior: a number, or a tensor that broadcasts to the shape of the posterior.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per sample, [B]), ``"batchmean"`` (mean over
            the samples of these sums), ``"sum"``, or ``"mean"`` (over every element). An ELBO needs
            ``"batchmean"``: nats per image, on the same footing as the other terms.
        batch_dims: how many leading dimensions index samples. With 2, logits ``[S, B, *D]`` give [S, B] for
            ``"sample"``.

    Returns:
        float32, or float64 if an operand is float64.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> fgbg_cuda.bernoulli_kl(torch.full((1, 4), 30.0), 0.0)  # certain against even odds: 4 log 2
        tensor(2.7726)
    """
    prior_logits = _checks.tensor_or_number("prior_logits", prior_logits)
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    if not is_compiling():
        kl = _routes.eager.bernoulli_kl(logits, prior_logits, reduction, batch_dims)
        if kl is not None:
            return kl
    op = _routes.traced_op("bernoulli_kl", logits.device)
    if op is None:
        return reference.bernoulli_kl(logits, prior_logits, reduction, batch_dims)
    kl, _ = op(
        *_routes.traced(logits, batch_dims, logits, prior_logits),
        reduction,
        _routes.traced_batch_dims(logits, batch_dims),
    )
    return _routes.unflattened(kl, logits, reduction, batch_dims)


def categorical_kl(
    logits: Tensor,
    prior_logits: Tensor | float = 0.0,
    *,
    dim: int = 1,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """KL(softmax(logits) || softmax(prior_logits)) of K outcomes along ``dim`` in nats, from logits.

    With p and q the two: ``sum_k p_k log(p_k / q_k)``. Accurate for a posterior near its prior, since no
    two terms of the evaluated sum cancel, and for logits of any size. An outcome of logit -inf is excluded:
    it adds nothing, and gets no gradient; the KL is inf where the prior excludes what the posterior does not.

    Args:
        logits: posterior, ``[B, *D]`` with the outcomes along one of its dimensions, any float dtype.
        prior_logits: prior: a tensor that broadcasts to the shape of the posterior, or any number, which
            stands for the uniform distribution.
        dim: dimension of the outcomes; not one of those that index samples.
        reduction: ``"none"`` (a KL for each group of outcomes: the shape of the logits without ``dim``),
            ``"sample"`` (summed per sample, [B]), ``"batchmean"`` (mean over the samples of these
            sums), ``"sum"``, or ``"mean"`` (over every group). An ELBO needs
            ``"batchmean"``: nats per image, on the same footing as the other terms.
        batch_dims: how many leading dimensions index samples. With 2, logits ``[S, B, *D]`` give [S, B] for
            ``"sample"``.

    Returns:
        float32, or float64 if an operand is float64.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> certain = torch.tensor([[100.0, 0.0, 0.0, 0.0]])
        >>> fgbg_cuda.categorical_kl(certain)  # of one of four: log 4
        tensor(1.3863)
    """
    prior_logits = _checks.tensor_or_number("prior_logits", prior_logits)
    prior = prior_logits if isinstance(prior_logits, Tensor) else None
    dim = _checks.integer("dim", dim)
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    if not is_compiling():
        kl = _routes.eager.categorical_kl(logits, prior, dim, reduction, batch_dims)
        if kl is not None:
            return kl
    if -logits.dim() <= dim < 0:
        dim += logits.dim()
    op = _routes.traced_op("categorical_kl", logits.device)
    if op is None:
        return reference.categorical_kl(logits, prior, dim, reduction, batch_dims)
    if logits.dim() <= _routes.MAX_DIMS:
        return op(logits, prior, dim, reduction, batch_dims)[0]
    # [samples, *before, outcomes, *after], with each part as one dimension.
    sizes = logits.shape
    parts = (sizes[:batch_dims], sizes[batch_dims:dim], sizes[dim : dim + 1], sizes[dim + 1 :])
    four = [math.prod(part) for part in parts]
    groups = (*sizes[:dim], *sizes[dim + 1 :])
    if prior is not None:
        prior = _routes.expanded(prior, logits, reference.compute_dtype(logits, prior)).reshape(four)
    kl, _ = op(logits.reshape(four), prior, 2, reduction, 1)
    if reduction == "none":
        return kl.view(groups)
    return kl.view(sizes[:batch_dims]) if reduction == "sample" else kl
