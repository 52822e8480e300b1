"""KL divergences of discrete posteriors, from logits."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from . import _routes

__all__ = ["bernoulli_kl"]


def bernoulli_kl(
    logits: Tensor, prior_logits: Tensor | float = 0.0, *, reduction: str = "batchmean"
) -> Tensor:
    """KL(Bernoulli(sigmoid(logits)) || Bernoulli(sigmoid(prior_logits))) in nats, from logits.

    Per element, with m and p the two sigmoids: ``m log(m / p) + (1 - m) log((1 - m) / (1 - p))``, the
    discrete KL of a per-pixel mask posterior against a mask prior. Exact for saturated and for
    nearly equal logits; nothing is added inside a logarithm.

    Args:
        logits: posterior, [B, *D], any float dtype.
        prior_logits: prior: a number, or a tensor of the same shape.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.

    Returns:
        float32, or float64 if an operand is float64.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> fgbg_cuda.bernoulli_kl(torch.full((1, 4), 30.0), 0.0)  # certain against even odds: 4 log 2
        tensor(2.7726)
    """
    if not isinstance(prior_logits, Tensor):
        prior_logits = _checks.number("prior_logits", prior_logits)
    if not is_compiling():
        kl = _routes.eager.bernoulli_kl(logits, prior_logits, reduction)
        if kl is not None:
            return kl
    prior, constant = (prior_logits, 0.0) if isinstance(prior_logits, Tensor) else (None, prior_logits)
    op = _routes.traced_op("bernoulli_kl", logits.device)
    if op is None:
        return reference.bernoulli_kl(logits, prior, constant, reduction)
    constant = _routes.as_tensor(constant, logits, reference.compute_dtype(logits)) if prior is None else None
    kl, _ = op(*_routes.flat(logits, prior), constant, reduction)
    return kl.view(logits.shape) if reduction == "none" else kl
