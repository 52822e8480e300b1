"""Reconstruction losses of two layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from . import _routes

__all__ = [
    "ReconstructionTerms",
    "blended_reconstruction_loss",
    "masked_reconstruction_loss",
    "mixture_reconstruction_loss",
]


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
    """Reconstruction error of two layers, each in its own region, in nats.

    With m the mask and l(x) = -log p(target | x) per element:
    ``sum fg_weight * m * l(fg) + bg_weight * (1 - m) * l(bg)``.

    Args:
        fg, bg: reconstructions of the two layers, [B, C, *spatial] with 1 to 3 spatial dimensions;
            for the Bernoulli likelihoods, logits.
        target: the image, of the same shape.
            ``bg=None`` means one reconstruction, ``fg``, weighted by region.
        mask: probability of foreground in [0, 1], float, or bool or uint8 (0/1, read as such);
            [B, 1, *spatial] or [B, C, *spatial]. A bool or uint8 mask selects: what it leaves out of a
            region is no part of its sum, and may be NaN or infinite. A float mask multiplies.
        mask_logits: the same as float logits. Exactly one of the two is given.
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"bernoulli"`` and ``"continuous_bernoulli"`` (logits), ``"squared_error"`` and
            ``"absolute_error"`` (no constants).
        fg_scale, bg_scale: standard deviation (Gaussian) or diversity (Laplace): a positive number, or a
            float tensor of one element or one per channel, which gets its gradient. (The values of a
            tensor are not checked.)
        fg_weight, bg_weight: weights of the two regions. A region of weight 0 is left out as well.
        normalize: ``"area"`` divides each sample's sum over a region by that region's mask area times
            the channels. An empty region contributes exactly 0, with zero gradient.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
        return_terms: also return :class:`ReconstructionTerms`.

    Returns:
        The loss in float32 (float64 if an operand is float64), and the terms where asked for.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> target = torch.zeros(2, 3, 8, 8)
        >>> mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
        >>> mask[..., :4] = True
        >>> fgbg_cuda.masked_reconstruction_loss(
        ...     target + 1, target, target, mask=mask, likelihood="squared_error"
        ... )  # half of 3 * 8 * 8 elements are off by 1
        tensor(96.)
    """
    _checks.one_mask(mask, mask_logits)
    if normalize is not None:
        _checks.choice("normalize", normalize, ("area",))
    _checks.flag("return_terms", return_terms)
    fg_weight = _checks.number("fg_weight", fg_weight)
    bg_weight = _checks.number("bg_weight", bg_weight)
    fg_scale = _checks.scale("fg_scale", fg_scale, likelihood)
    bg_scale = _checks.scale("bg_scale", bg_scale, likelihood)
    if normalize is not None and reduction == "none":
        loss, terms = _area_normalized_elements(
            fg, bg, target, mask, mask_logits, fg_scale, bg_scale, likelihood, fg_weight, bg_weight
        )
    else:
        loss, terms = _reconstruction(
            fg, bg, target, mask, mask_logits, fg_scale, bg_scale, "masked", likelihood,
            fg_weight, bg_weight, normalize is not None, reduction, return_terms,
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
    """Reconstruction error of the composite image, ``-log p(target | m * fg + (1 - m) * bg)``, in nats.

    For the Bernoulli likelihoods it is the logits that are blended.

    Args:
        fg, bg: reconstructions of the two layers, [B, C, *spatial] with 1 to 3 spatial dimensions;
            for the Bernoulli likelihoods, logits.
        target: the image, of the same shape.
        mask: probability of foreground in [0, 1], float, or bool or uint8 (0/1, read as such);
            [B, 1, *spatial] or [B, C, *spatial]. A bool or uint8 mask selects: the layer that it leaves out
            of a pixel may be NaN or infinite there. A float mask multiplies.
        mask_logits: the same as float logits. Exactly one of the two is given.
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"bernoulli"`` and ``"continuous_bernoulli"`` (logits), ``"squared_error"`` and
            ``"absolute_error"`` (no constants).
        scale: as ``fg_scale`` of :func:`masked_reconstruction_loss`, for the composite.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.

    Returns:
        The loss in float32 (float64 if an operand is float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> white, black = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> fgbg_cuda.blended_reconstruction_loss(
        ...     white, black, black, mask=black + 0.5, likelihood="squared_error"
        ... )  # 16 pixels, each off by 1/2
        tensor(4.)
    """
    _checks.one_mask(mask, mask_logits)
    scale = _checks.scale("scale", scale, likelihood)
    return _reconstruction(
        fg, bg, target, mask, mask_logits, scale, 1.0, "blended", likelihood, reduction=reduction
    )[0]


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
    """Negative log-likelihood of a two-component mixture per pixel, in nats.

    ``-log(m * p(target | fg) + (1 - m) * p(target | bg))`` with ``m = sigmoid(mask_logits)``, evaluated
    from the logits by log-sum-exp. The gradient weighs each layer by its responsibility, the
    posterior probability that the pixel is its. (Burgess et al., "MONet", 2019, eq. 3; Engelcke et
    al., "GENESIS", 2020, eq. 3.)

    Args:
        fg, bg: reconstructions of the two layers, [B, C, *spatial] with 1 to 3 spatial dimensions;
            for the Bernoulli likelihoods, logits.
        target: the image, of the same shape.
        mask_logits: float logits of the foreground, [B, 1, *spatial]; with independent channels also
            [B, C, *spatial].
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"bernoulli"`` and ``"continuous_bernoulli"`` (logits), ``"squared_error"`` and
            ``"absolute_error"`` (no constants).
        fg_scale, bg_scale: standard deviation (Gaussian) or diversity (Laplace): a positive number, or a
            float tensor of one element or one per channel, which gets its gradient. (The values of a
            tensor are not checked.)
        channels: ``"joint"``: the channels of a pixel belong to the same layer, and p is their product;
            ``"independent"``: each channel is a mixture of its own.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
            With joint channels the elements are pixels, [B, 1, *spatial].

    Returns:
        The loss in float32 (float64 if an operand is float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> fg, bg = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> fgbg_cuda.mixture_reconstruction_loss(
        ...     fg, bg, fg, mask_logits=torch.full((1, 1, 2, 2), 200.0), likelihood="squared_error"
        ... )  # the mask is certain and the foreground exact
        tensor(0.)
    """
    _checks.choice("channels", channels, ("joint", "independent"))
    fg_scale = _checks.scale("fg_scale", fg_scale, likelihood)
    bg_scale = _checks.scale("bg_scale", bg_scale, likelihood)
    composition = "mixture_joint" if channels == "joint" else "mixture_independent"
    return _reconstruction(
        fg, bg, target, None, mask_logits, fg_scale, bg_scale, composition, likelihood, reduction=reduction
    )[0]


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
    fg_weight: float = 1.0,
    bg_weight: float = 1.0,
    normalize_area: bool = False,
    reduction: str = "batchmean",
    return_terms: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, where asked for, the terms; the arguments after the scales are those of the op."""
    if not is_compiling():
        out = _routes.eager.reconstruction_loss(
            fg, bg, target, mask, mask_logits, fg_scale, bg_scale, composition, likelihood,
            fg_weight, bg_weight, normalize_area, reduction, return_terms,
        )  # fmt: skip
        if out is not None:
            return out if return_terms else (out, None)
    is_logits = mask is None
    operands = (fg, bg, target, mask_logits if is_logits else mask)
    rest = (normalize_area, reduction, return_terms)
    op = _routes.traced_op("reconstruction_loss", fg.device)
    if op is None:
        return reference.reconstruction_loss(
            *operands, fg_scale, bg_scale, composition, is_logits, likelihood, fg_weight, bg_weight, *rest
        )
    dtype = reference.compute_dtype(*operands, fg_scale, bg_scale)
    fg_scale, bg_scale, fg_weight, bg_weight = (
        x if isinstance(x, Tensor) else _routes.as_tensor(x, fg, dtype)
        for x in (fg_scale, bg_scale, fg_weight, bg_weight)
    )
    return op(*operands, fg_scale, bg_scale, composition, is_logits, likelihood, fg_weight, bg_weight, *rest)[
        :2
    ]


def _area_normalized_elements(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    fg_scale: Tensor | float,
    bg_scale: Tensor | float,
    likelihood: str,
    fg_weight: float,
    bg_weight: float,
) -> tuple[Tensor, Tensor]:
    """A loss by element that is normalised by area. The areas have to be known before the first element is:
    one pass for them, of nothing but the mask, and one per region. There the other region has weight 0, and
    so is left out; where a region is empty, its operands are."""
    call = _routes.widened(fg, bg, target, mask, mask_logits, fg_scale, bg_scale)
    _, terms = _reconstruction(*call, "masked", likelihood, reduction="sample", return_terms=True)
    fg, bg, target, *masks, fg_scale, bg_scale = call
    blank = fg.new_zeros(()).expand_as(fg)
    of_mask = (blank, None, blank, *masks, 1.0, 1.0, "masked", "squared_error")
    areas = _reconstruction(*of_mask, reduction="sample", return_terms=True)[1][2:]
    parts = []
    for area, x, scale, weights in (
        (areas[0], fg, fg_scale, (fg_weight, 0.0)),
        (areas[1], fg if bg is None else bg, bg_scale, (0.0, bg_weight)),
    ):
        area = area.reshape(-1, *(1,) * (fg.dim() - 1))
        empty = area <= 0
        x, there = (torch.where(empty, 0.0, t) for t in (x, target))
        if isinstance(scale, Tensor):
            scale = torch.where(empty.all(), 1.0, scale)
        nats, _ = _reconstruction(
            x, None, there, *masks, scale, scale, "masked", likelihood, *weights, reduction="none"
        )
        parts.append(reference.region_mean(nats, area, fg.shape[1]))
    return parts[0] + parts[1], terms
