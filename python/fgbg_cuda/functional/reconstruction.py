"""Reconstruction losses: of one image, and of two layers, masked, blended or as a mixture."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from ..words import CHANNELS, NORMALIZATIONS, Channels, Composition, Likelihood, Normalize, Reduction
from . import _routes

__all__ = [
    "ReconstructionTerms",
    "blended_reconstruction_loss",
    "masked_reconstruction_loss",
    "mixture_reconstruction_loss",
    "reconstruction_loss",
]


class ReconstructionTerms(NamedTuple):
    """Per-sample parts of a masked loss, each of shape [B] and differentiable: before the weights,
    the area normalisation and the reduction."""

    fg_nats: Tensor
    bg_nats: Tensor
    fg_area: Tensor


def reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    likelihood: Likelihood = "gaussian",
    scale: Tensor | float = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """Reconstruction error of an image, or of anything else: ``sum weight * -log p(target | prediction)``, in
    nats.

    Args:
        prediction: ``[B, *D]`` with any number of dimensions, ``[B, C, *spatial]`` for images; for the
            Bernoulli likelihoods logits, for Poisson the log of the rate.
        target: of the same shape.
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"charbonnier"`` (``sqrt((x - target)^2 + scale^2)``, a robust L1), ``"bernoulli"`` and
            ``"continuous_bernoulli"`` (logits), ``"poisson"`` (``exp(x) - target x + log target!``),
            ``"squared_error"`` and ``"absolute_error"`` (no constants).
        scale: standard deviation (Gaussian), diversity (Laplace), or where the loss turns from quadratic to
            linear (Charbonnier): a positive number, or a float tensor, which gets its gradient: of one
            element, one per channel [C], or a map that broadcasts to ``prediction``, such as the noise of
            each pixel. (The values of a tensor are not checked.)
        weight: multiplies the loss of each element: float, or bool or uint8 (0/1), of a shape that
            broadcasts to ``prediction``, such as ``[B, 1, *spatial]``; a float one gets its gradient. Where
            it is 0 the element is left out: its operands may be NaN or infinite there, and get zero
            gradients.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element, whatever its weight). An ELBO needs ``"batchmean"``: nats per image, on the same
            footing as the other terms.
        batch_dims: how many leading dimensions index samples: with 2 a video is ``[B, T, C, *spatial]``, and
            ``"sample"`` gives [B, T].

    Returns:
        The loss in float32 (float64 if an operand is float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> valid = torch.tensor([[True, True, False]])
        >>> prediction, target = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, torch.nan]])
        >>> fgbg_cuda.reconstruction_loss(prediction, target, likelihood="squared_error", weight=valid)
        tensor(5.)
    """
    scale = _checks.scale("scale", scale, likelihood)
    images, shape = _merged(
        (prediction, None, target, None, None, scale, 1.0, weight), batch_dims, "prediction", "scale"
    )
    loss, _ = _reconstruction(images, "plain", likelihood, reduction=reduction)
    return _split(loss, shape, reduction)


@overload
def masked_reconstruction_loss(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = ...,
    mask_logits: Tensor | None = ...,
    likelihood: Likelihood = ...,
    fg_scale: Tensor | float = ...,
    bg_scale: Tensor | float = ...,
    fg_weight: float = ...,
    bg_weight: float = ...,
    weight: Tensor | None = ...,
    normalize: Normalize | None = ...,
    reduction: Reduction = ...,
    batch_dims: int = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def masked_reconstruction_loss(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = ...,
    mask_logits: Tensor | None = ...,
    likelihood: Likelihood = ...,
    fg_scale: Tensor | float = ...,
    bg_scale: Tensor | float = ...,
    fg_weight: float = ...,
    bg_weight: float = ...,
    weight: Tensor | None = ...,
    normalize: Normalize | None = ...,
    reduction: Reduction = ...,
    batch_dims: int = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, ReconstructionTerms]: ...


def masked_reconstruction_loss(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    mask_logits: Tensor | None = None,
    likelihood: Likelihood = "gaussian",
    fg_scale: Tensor | float = 1.0,
    bg_scale: Tensor | float = 1.0,
    fg_weight: float = 1.0,
    bg_weight: float = 1.0,
    weight: Tensor | None = None,
    normalize: Normalize | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, ReconstructionTerms]:
    """Reconstruction error of two layers, each in its own region, in nats.

    With m the mask and l(x) = -log p(target | x) per element:
    ``sum fg_weight * m * l(fg) + bg_weight * (1 - m) * l(bg)``.

    Args:
        fg, bg: reconstructions of the two layers, ``[B, C, *spatial]`` with 1 to 3 spatial dimensions;
            for the Bernoulli likelihoods logits, for Poisson the log of the rate. ``bg=None`` means one
            reconstruction, ``fg``, weighted by region.
        target: the image, of the same shape.
        mask: probability of foreground in [0, 1], float, or bool or uint8 (0/1, read as such);
            ``[B, 1, *spatial]`` or ``[B, C, *spatial]``. A bool or uint8 mask selects: what it leaves out of
            a region is no part of its sum, and may be NaN or infinite. A float mask multiplies.
        mask_logits: the same as float logits. Exactly one of the two is given.
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"charbonnier"`` (a robust L1 with a scale), ``"bernoulli"`` and ``"continuous_bernoulli"``
            (logits), ``"poisson"`` (the log of the rate; the target is a count), ``"squared_error"`` and
            ``"absolute_error"`` (no constants).
        fg_scale, bg_scale: standard deviation (Gaussian), diversity (Laplace), or where the loss turns from
            quadratic to linear (Charbonnier): a positive number, or a float tensor, which gets its
            gradient: of one element, one per channel, or a map that broadcasts to ``fg``. (The values of a
            tensor are not checked.)
        fg_weight, bg_weight: weights of the two regions. A region of weight 0 is left out as well.
        weight: multiplies the loss of each element, and its part in the areas: float, bool or uint8,
            ``[B, 1, *spatial]``, ``[B, C, *spatial]`` or what broadcasts to them; a float one gets its
            gradient. Where it is 0 the element is left out: its operands may be NaN or infinite there, and
            get zero gradients.
        normalize: ``"area"`` divides each sample's sum over a region by that region's mask area times
            the channels. An empty region contributes exactly 0, with zero gradient.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
        batch_dims: how many leading dimensions index samples: with 2 a video is ``[B, T, C, *spatial]``, and
            ``"sample"`` gives [B, T].
        return_terms: also return ``ReconstructionTerms``.

    Returns:
        The loss in float32 (float64 if an operand is float64), and the terms where asked for.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
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
        _checks.choice("normalize", normalize, NORMALIZATIONS)
    _checks.flag("return_terms", return_terms)
    fg_weight = _checks.number("fg_weight", fg_weight)
    bg_weight = _checks.number("bg_weight", bg_weight)
    fg_scale = _checks.scale("fg_scale", fg_scale, likelihood)
    bg_scale = _checks.scale("bg_scale", bg_scale, likelihood)
    images, shape = _merged((fg, bg, target, mask, mask_logits, fg_scale, bg_scale, weight), batch_dims)
    options = (likelihood, fg_weight, bg_weight)
    if normalize is not None and reduction == "none":
        loss, terms = _area_normalized_elements(images, *options)
    else:
        loss, terms = _reconstruction(
            images, "masked", *options, normalize is not None, reduction, return_terms
        )
    loss = _split(loss, shape, reduction)
    if not return_terms:
        return loss
    return loss, ReconstructionTerms(*(_split(terms[i], shape, "sample") for i in range(3)))


def blended_reconstruction_loss(
    fg: Tensor,
    bg: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    mask_logits: Tensor | None = None,
    likelihood: Likelihood = "gaussian",
    scale: Tensor | float = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """Reconstruction error of the composite image, ``-log p(target | m * fg + (1 - m) * bg)``, in nats.

    For the Bernoulli likelihoods it is the logits that are blended.

    Args:
        fg, bg: reconstructions of the two layers, ``[B, C, *spatial]`` with 1 to 3 spatial dimensions;
            for the Bernoulli likelihoods logits, for Poisson the log of the rate.
        target: the image, of the same shape.
        mask: probability of foreground in [0, 1], float, or bool or uint8 (0/1, read as such);
            ``[B, 1, *spatial]`` or ``[B, C, *spatial]``. A bool or uint8 mask selects: the layer that it
            leaves out of a pixel may be NaN or infinite there. A float mask multiplies.
        mask_logits: the same as float logits. Exactly one of the two is given.
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"charbonnier"`` (a robust L1 with a scale), ``"bernoulli"`` and ``"continuous_bernoulli"``
            (logits), ``"poisson"`` (the log of the rate; the target is a count), ``"squared_error"`` and
            ``"absolute_error"`` (no constants).
        scale: as ``fg_scale`` of ``masked_reconstruction_loss``, for the composite.
        weight: multiplies the loss of each element: float, bool or uint8, ``[B, 1, *spatial]``,
            ``[B, C, *spatial]`` or what broadcasts to them; a float one gets its gradient. Where it is 0 the
            element is left out: its operands may be NaN or infinite there, and get zero gradients.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
        batch_dims: how many leading dimensions index samples: with 2 a video is ``[B, T, C, *spatial]``, and
            ``"sample"`` gives [B, T].

    Returns:
        The loss in float32 (float64 if an operand is float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> white, black = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> fgbg_cuda.blended_reconstruction_loss(
        ...     white, black, black, mask=black + 0.5, likelihood="squared_error"
        ... )  # 16 pixels, each off by 1/2
        tensor(4.)
    """
    _checks.one_mask(mask, mask_logits)
    scale = _checks.scale("scale", scale, likelihood)
    images, shape = _merged(
        (fg, bg, target, mask, mask_logits, scale, 1.0, weight), batch_dims, scale="scale"
    )
    loss, _ = _reconstruction(images, "blended", likelihood, reduction=reduction)
    return _split(loss, shape, reduction)


def mixture_reconstruction_loss(
    fg: Tensor,
    bg: Tensor,
    target: Tensor,
    *,
    mask_logits: Tensor,
    likelihood: Likelihood = "gaussian",
    fg_scale: Tensor | float = 1.0,
    bg_scale: Tensor | float = 1.0,
    channels: Channels = "joint",
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """Negative log-likelihood of a two-component mixture per pixel, in nats.

    ``-log(m * p(target | fg) + (1 - m) * p(target | bg))`` with ``m = sigmoid(mask_logits)``, evaluated
    from the logits by log-sum-exp. The gradient weighs each layer by its responsibility, the
    posterior probability that the pixel is its. (Burgess et al., "MONet", 2019, eq. 3; Engelcke et
    al., "GENESIS", 2020, eq. 3.)

    Args:
        fg, bg: reconstructions of the two layers, ``[B, C, *spatial]`` with 1 to 3 spatial dimensions;
            for the Bernoulli likelihoods logits, for Poisson the log of the rate.
        target: the image, of the same shape.
        mask_logits: float logits of the foreground, ``[B, 1, *spatial]``; with independent channels also
            ``[B, C, *spatial]``.
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"charbonnier"`` (a robust L1 with a scale), ``"bernoulli"`` and ``"continuous_bernoulli"``
            (logits), ``"poisson"`` (the log of the rate; the target is a count), ``"squared_error"`` and
            ``"absolute_error"`` (no constants).
        fg_scale, bg_scale: standard deviation (Gaussian), diversity (Laplace), or where the loss turns from
            quadratic to linear (Charbonnier): a positive number, or a float tensor, which gets its
            gradient: of one element, one per channel, or a map that broadcasts to ``fg``. (The values of a
            tensor are not checked.)
        channels: ``"joint"``: the channels of a pixel belong to the same layer, and p is their product;
            ``"independent"``: each channel is a mixture of its own.
        weight: multiplies the loss of each pixel (with independent channels, of each element): float, bool
            or uint8, ``[B, 1, *spatial]`` (or ``[B, C, *spatial]``) or what broadcasts to it; a float one
            gets its gradient. Where it is 0 the element is left out: its operands may be NaN or infinite
            there, and get zero gradients.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
            With joint channels the elements are pixels, ``[B, 1, *spatial]``.
        batch_dims: how many leading dimensions index samples: with 2 a video is ``[B, T, C, *spatial]``, and
            ``"sample"`` gives [B, T].

    Returns:
        The loss in float32 (float64 if an operand is float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> fg, bg = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> fgbg_cuda.mixture_reconstruction_loss(
        ...     fg, bg, fg, mask_logits=torch.full((1, 1, 2, 2), 200.0), likelihood="squared_error"
        ... )  # the mask is certain and the foreground exact
        tensor(0.)
    """
    _checks.choice("channels", channels, CHANNELS)
    fg_scale = _checks.scale("fg_scale", fg_scale, likelihood)
    bg_scale = _checks.scale("bg_scale", bg_scale, likelihood)
    composition: Composition = "mixture_joint" if channels == "joint" else "mixture_independent"
    images, shape = _merged((fg, bg, target, None, mask_logits, fg_scale, bg_scale, weight), batch_dims)
    loss, _ = _reconstruction(images, composition, likelihood, reduction=reduction)
    return _split(loss, shape, reduction)


class _Images(NamedTuple):
    """The operands of the op, in its order, but for how the mask is given."""

    fg: Tensor
    bg: Tensor | None
    target: Tensor
    mask: Tensor | None
    mask_logits: Tensor | None
    fg_scale: Tensor | float
    bg_scale: Tensor | float
    weight: Tensor | None


class _Merged(_Images):
    """Some of whose dimensions were made one."""


# The same without names, which take time to make.
_Operands = tuple[
    Tensor,
    Tensor | None,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | float,
    Tensor | float,
    Tensor | None,
]


def _merged(
    operands: _Operands, batch_dims: int, name: str = "fg", scale: str = "fg_scale"
) -> tuple[_Operands, torch.Size | None]:
    """The operands, those of ``_Images``, as the op takes them, ``[B, C, *spatial]`` with at most three
    spatial dimensions, and the shape that results get back, led by the dimensions of the samples; None where
    nothing had to change. ``name`` and ``scale``: what the first image and its scale are called."""
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    image, plain = operands[0], name == "prediction"
    if batch_dims == 1 and (
        not plain or not isinstance(image, Tensor) or 3 <= image.dim() <= _routes.MAX_DIMS
    ):
        return operands, None
    images = _Images(*operands)
    _checks.sample_dimensions(name, image, batch_dims, 0 if plain else 2)
    for other, t in images._asdict().items():
        if t is not None and (isinstance(t, Tensor) or not other.endswith("scale")):
            broadcasts = other == "weight" or other.endswith("scale")
            called = {"fg": name, "fg_scale": scale}.get(other, other)
            _checks.companion(called, t, name, image, batch_dims, broadcasts)
    rank, has_channels = image.dim(), image.dim() > batch_dims + 1

    def merged(t: Tensor, first: int, last: int) -> Tensor:
        """With these dimensions merged: as one that is broadcast, or expanded."""
        sizes = image.shape[first : last + 1]
        if all(n == 1 for n in t.shape[first : last + 1]):
            return t.reshape(*t.shape[:first], 1, *t.shape[last + 1 :])
        if t.shape[first : last + 1] != sizes:
            (t,) = _routes.widened(t)  # so that a sum over what is expanded is rounded once
            t = t.expand(*t.shape[:first], *sizes, *t.shape[last + 1 :])
        return t.flatten(first, last)

    def as_image(t: Tensor) -> Tensor:
        t = t[(None,) * (rank - t.dim())]
        if rank - batch_dims > _routes.MAX_DIMS - 1:  # the spatial dimensions
            t = merged(t, batch_dims + 1, rank - 1)
        t = merged(t, 0, batch_dims - 1)
        return t if has_channels else t[:, None] if t.dim() == 2 else t[:, None, None]

    def scale_of_images(scale: Tensor | float) -> Tensor | float:
        if not isinstance(scale, Tensor) or scale.dim() == 0 or (scale.dim() == 1 and has_channels):
            return scale  # one for all, or one per channel
        return as_image(scale)

    wide: dict[str, Any] = {
        n: t if t is None else as_image(t) for n, t in images._asdict().items() if not n.endswith("scale")
    }
    scales: dict[str, Any] = {n: scale_of_images(getattr(images, n)) for n in ("fg_scale", "bg_scale")}
    return _Merged(**wide, **scales), torch.Size((batch_dims, *image.shape))


def _split(result: Tensor, shape: torch.Size | None, reduction: Reduction) -> Tensor:
    """A result with the dimensions of the samples that ``_merged`` took from it."""
    if shape is None or reduction not in ("none", "sample"):
        return result
    batch_dims, sizes = shape[0], list(shape[1:])
    if reduction == "sample":
        return result.reshape(sizes[:batch_dims])
    if len(sizes) > batch_dims + 1:
        sizes[batch_dims] = result.shape[1]  # of a joint mixture one loss for each pixel
    return result.reshape(sizes)


def _reconstruction(
    images: _Operands,
    composition: Composition,
    likelihood: Likelihood,
    fg_weight: float = 1.0,
    bg_weight: float = 1.0,
    normalize_area: bool = False,
    reduction: Reduction = "batchmean",
    return_terms: bool = False,
) -> tuple[Tensor, Any]:
    """The loss and, where asked for, the terms; the arguments after the images are those of the op."""
    if not is_compiling():
        try:
            out = _routes.eager.reconstruction_loss(
                *images,
                composition,
                likelihood,
                fg_weight,
                bg_weight,
                normalize_area,
                reduction,
                return_terms,
            )
        except ValueError as error:
            raise _checks.of_merged(error) if isinstance(images, _Merged) else error from None
        if out is not None:
            return out if return_terms else (out, None)
    fg, bg, target, mask, mask_logits, fg_scale, bg_scale, weight = images
    is_logits = mask is None and composition != "plain"
    operands = (fg, bg, target, mask_logits if is_logits else mask)
    rest = (normalize_area, reduction, return_terms)
    op = _routes.traced_op("reconstruction_loss", fg.device)
    if op is None:
        return reference.reconstruction_loss(
            *operands, fg_scale, bg_scale, weight, composition, is_logits, likelihood, fg_weight, bg_weight,
            *rest,
        )  # fmt: skip
    dtype = reference.compute_dtype(*operands, fg_scale, bg_scale, weight)
    numbers = [
        x if isinstance(x, Tensor) else _routes.as_tensor(x, fg, dtype)
        for x in (fg_scale, bg_scale, fg_weight, bg_weight)
    ]
    return op(*operands, *numbers[:2], weight, composition, is_logits, likelihood, *numbers[2:], *rest)[:2]


def _area_normalized_elements(
    operands: _Operands, likelihood: Likelihood, fg_weight: float, bg_weight: float
) -> tuple[Tensor, Tensor]:
    """A loss by element that is normalised by area. The areas have to be known before the first element is:
    one pass for them, of nothing but the mask, and one per region. There the other region has weight 0, and
    so is left out; where a region is empty, its operands are."""
    kind = _Merged if isinstance(operands, _Merged) else _Images
    images = kind(*_routes.widened(*operands))
    _, terms = _reconstruction(images, "masked", likelihood, reduction="sample", return_terms=True)
    fg = images.fg
    blank = fg.new_zeros(()).expand_as(fg)
    of_mask = images._replace(fg=blank, bg=None, target=blank, fg_scale=1.0, bg_scale=1.0)
    areas = _reconstruction(of_mask, "masked", "squared_error", reduction="sample", return_terms=True)[1][2:]
    parts = []
    for area, x, scale, weights in (
        (areas[0], fg, images.fg_scale, (fg_weight, 0.0)),
        (areas[1], fg if images.bg is None else images.bg, images.bg_scale, (0.0, bg_weight)),
    ):
        area = area.reshape(-1, *(1,) * (fg.dim() - 1))
        empty = area <= 0
        x, there = (torch.where(empty, 0.0, t) for t in (x, images.target))
        if isinstance(scale, Tensor):
            scale = torch.where(empty if scale.dim() > 1 else empty.all(), 1.0, scale)
        region = images._replace(fg=x, bg=None, target=there, fg_scale=scale, bg_scale=scale)
        nats, _ = _reconstruction(region, "masked", likelihood, *weights, reduction="none")
        parts.append(reference.region_mean(nats, area, fg.shape[1]))
    return parts[0] + parts[1], terms
