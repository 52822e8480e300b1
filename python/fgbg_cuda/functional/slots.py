"""Losses of an image that several slots make up, as object-centric models have them."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks, reference
from ..words import CHANNELS, Channels, Composition, Likelihood, Reduction
from . import _routes

__all__ = ["slot_blended_loss", "slot_mixture_loss"]


@overload
def slot_mixture_loss(
    slots: Tensor,
    target: Tensor,
    *,
    mask_logits: Tensor | None = ...,
    log_mask: Tensor | None = ...,
    likelihood: Likelihood = ...,
    scale: Tensor | float = ...,
    channels: Channels = ...,
    weight: Tensor | None = ...,
    reduction: Reduction = ...,
    batch_dims: int = ...,
    return_responsibilities: Literal[False] = ...,
) -> Tensor: ...


@overload
def slot_mixture_loss(
    slots: Tensor,
    target: Tensor,
    *,
    mask_logits: Tensor | None = ...,
    log_mask: Tensor | None = ...,
    likelihood: Likelihood = ...,
    scale: Tensor | float = ...,
    channels: Channels = ...,
    weight: Tensor | None = ...,
    reduction: Reduction = ...,
    batch_dims: int = ...,
    return_responsibilities: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def slot_mixture_loss(
    slots: Tensor,
    target: Tensor,
    *,
    mask_logits: Tensor | None = None,
    log_mask: Tensor | None = None,
    likelihood: Likelihood = "gaussian",
    scale: Tensor | float = 1.0,
    channels: Channels = "joint",
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
    return_responsibilities: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-likelihood of a mixture of K slots per pixel, in nats.

    ``-log sum_k m_k p(target | slot_k)``, by log-sum-exp: densities are never exponentiated, so a small scale
    does not overflow. The gradient weighs each slot by its responsibility, the posterior probability that the
    pixel is its. (Burgess et al., "MONet", 2019, eq. 3; Greff et al., "IODINE", 2019, eq. 2; Engelcke et al.,
    "GENESIS", 2020, eq. 3.)

    Args:
        slots: reconstructions, ``[B, K, C, *spatial]`` with 1 to 3 spatial dimensions; for the Bernoulli
            likelihoods logits, for Poisson the log of the rate. A permuted view of ``[B, K, *spatial, C]`` is
            not copied.
        target: the image, ``[B, C, *spatial]``.
        mask_logits: float logits, of which m is the softmax over the slots: ``[B, K, 1, *spatial]``; with
            independent channels also ``[B, K, C, *spatial]``.
        log_mask: log m itself, of the same shape, as stick-breaking gives it: used as it is, so m need not
            sum to one. Exactly one of the two is given. Where either is -inf that slot is excluded: it may
            hold NaN there, and its gradients are 0. (Where all log-masks are, the loss is inf and the
            gradients are 0.)
        likelihood: ``"gaussian"`` and ``"laplace"`` (with their normalising constants, and a scale),
            ``"charbonnier"`` (a robust L1, with a scale), ``"bernoulli"`` and ``"continuous_bernoulli"``
            (logits), ``"poisson"`` (log-rates), ``"squared_error"`` and ``"absolute_error"`` (no constants).
        scale: standard deviation (Gaussian) or diversity (Laplace): a positive number, or a float tensor,
            which gets its gradient: of one element, one per slot [K], or a map of two dimensions or more
            that broadcasts to ``slots``. (The values of a tensor are not checked.)
        channels: ``"joint"``: the channels of a pixel belong to the same slot, and p is their product;
            ``"independent"``: each channel is a mixture of its own.
        weight: multiplies the loss of each element: float, bool or uint8, of a shape that broadcasts to the
            elements, such as ``[B, 1, *spatial]``; a float one gets its gradient. Where it is 0 the element
            is left out: its operands may be NaN or infinite there, and get zero gradients.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
            With joint channels the elements are pixels, ``[B, 1, *spatial]``.
        batch_dims: how many leading dimensions index samples: with 2 a video is ``[B, T, K, C, *spatial]``,
            and ``"sample"`` gives [B, T].
        return_responsibilities: also return the posterior over the slots, ``[B, K, 1, *spatial]`` (with
            independent channels ``[B, K, C, *spatial]``), whatever the weight. It is not differentiable.

    Returns:
        The loss in float32 (float64 if an operand is float64), and the responsibilities where asked for.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> slots = torch.stack([torch.full((1, 3, 2, 2), float(k)) for k in range(4)], dim=1)
        >>> loss, posterior = fgbg_cuda.slot_mixture_loss(
        ...     slots, slots[:, 2], mask_logits=torch.zeros(1, 4, 1, 2, 2), scale=0.05,
        ...     return_responsibilities=True,
        ... )
        >>> posterior[0, :, 0, 0, 0]  # the third slot is the image
        tensor([0., 0., 1., 0.])
    """
    _checks.one_mask(log_mask, mask_logits, "log_mask")
    _checks.choice("channels", channels, CHANNELS)
    _checks.flag("return_responsibilities", return_responsibilities)
    scale = _checks.scale("scale", scale, likelihood)
    composition: Composition = "mixture_joint" if channels == "joint" else "mixture_independent"
    operands = _Operands(slots, target, mask_logits, log_mask, scale, weight)
    loss, responsibilities = _slot_loss(
        operands, composition, likelihood, reduction, batch_dims, return_responsibilities
    )
    return loss if responsibilities is None else (loss, responsibilities)


def slot_blended_loss(
    slots: Tensor,
    target: Tensor,
    *,
    mask_logits: Tensor | None = None,
    log_mask: Tensor | None = None,
    likelihood: Likelihood = "gaussian",
    scale: Tensor | float = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """Reconstruction error of the composite image, ``-log p(target | sum_k m_k slot_k)``, in nats.

    (Locatello et al., "Object-centric learning with slot attention", 2020, with the squared error.) For the
    Bernoulli likelihoods it is the logits that are blended.

    Args:
        slots: reconstructions, ``[B, K, C, *spatial]`` with 1 to 3 spatial dimensions. A permuted view of
            ``[B, K, *spatial, C]`` is not copied.
        target: the image, ``[B, C, *spatial]``.
        mask_logits: float logits, of which m is the softmax over the slots: ``[B, K, 1, *spatial]`` or
            ``[B, K, C, *spatial]``.
        log_mask: log m itself, of the same shape. Exactly one of the two is given. Where either is -inf that
            slot is excluded: it may hold NaN there, and its gradients are 0.
        likelihood: as of ``slot_mixture_loss``.
        scale: of the composite: a positive number, or a float tensor, which gets its gradient: of one
            element, one per channel [C], or a map of two dimensions or more that broadcasts to ``target``.
        weight: multiplies the loss of each element: float, bool or uint8, of a shape that broadcasts to
            ``target``, such as ``[B, 1, *spatial]``; a float one gets its gradient. Where it is 0 the element
            is left out: its operands may be NaN or infinite there, and get zero gradients.
        reduction: ``"none"`` (elementwise), ``"sample"`` (summed per batch element, [B]),
            ``"batchmean"`` (mean over the batch of the per-sample sums), ``"sum"``, or ``"mean"`` (over
            every element). An ELBO needs ``"batchmean"``: nats per image, on the same footing as the
            other terms.
        batch_dims: how many leading dimensions index samples: with 2 a video is ``[B, T, K, C, *spatial]``,
            and ``"sample"`` gives [B, T].

    Returns:
        The loss in float32 (float64 if an operand is float64).

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Examples:
        >>> slots = torch.stack([torch.full((1, 1, 4, 4), float(k)) for k in range(2)], dim=1)
        >>> fgbg_cuda.slot_blended_loss(
        ...     slots, slots[:, 0], mask_logits=torch.zeros(1, 2, 1, 4, 4), likelihood="squared_error"
        ... )  # 16 pixels, each off by 1/2
        tensor(4.)
    """
    _checks.one_mask(log_mask, mask_logits, "log_mask")
    scale = _checks.scale("scale", scale, likelihood)
    operands = _Operands(slots, target, mask_logits, log_mask, scale, weight)
    loss, _ = _slot_loss(operands, "blended", likelihood, reduction, batch_dims)
    return loss


class _Operands(NamedTuple):
    """The operands of the op, in its order, but for how the mask is given."""

    slots: Tensor
    target: Tensor
    mask_logits: Tensor | None
    log_mask: Tensor | None
    scale: Tensor | float
    weight: Tensor | None


class _Merged(_Operands):
    """The dimensions of whose samples were made one."""


def _slot_loss(
    operands: _Operands,
    composition: Composition,
    likelihood: Likelihood,
    reduction: Reduction,
    batch_dims: int,
    return_responsibilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, where asked for, the responsibilities."""
    batch_dims = _checks.integer("batch_dims", batch_dims, 1)
    samples = None
    if batch_dims > 1:
        operands, samples = _merged(operands, composition, batch_dims)
    loss, responsibilities = _run(operands, composition, likelihood, reduction, return_responsibilities)
    if samples is not None:
        if reduction in ("none", "sample"):
            loss = loss.unflatten(0, samples)
        if responsibilities is not None:
            responsibilities = responsibilities.unflatten(0, samples)
    return loss, responsibilities


def _merged(operands: _Operands, composition: Composition, batch_dims: int) -> tuple[_Merged, torch.Size]:
    """The operands with the dimensions of the samples merged, and these."""
    slots, target, _, _, scale, weight = operands
    _checks.sample_dimensions("slots", slots, batch_dims, 3)
    samples, rank = slots.shape[:batch_dims], slots.dim()

    def merged(t: Tensor, rank: int) -> Tensor:
        """What is broadcast along some dimensions of the samples is expanded first."""
        t = t[(None,) * (rank - t.dim())]
        if any(n != 1 for n in t.shape[:batch_dims]):
            t = t.expand(*samples, *t.shape[batch_dims:])
        return t.flatten(0, batch_dims - 1)

    image = slots.select(batch_dims, 0)
    _checks.companion("target", target, "slots", image, batch_dims, False)
    changed = {"slots": merged(slots, rank), "target": target.flatten(0, batch_dims - 1)}
    for name in ("mask_logits", "log_mask"):
        if getattr(operands, name) is not None:
            _checks.companion(name, getattr(operands, name), "slots", slots, batch_dims, False)
            changed[name] = merged(getattr(operands, name), rank)
    if isinstance(scale, Tensor) and scale.dim() > 1:
        of = image if composition == "blended" else slots
        _checks.companion("scale", scale, "slots", of, batch_dims, True)
        changed["scale"] = merged(scale, of.dim())
    if weight is not None:
        _checks.companion("weight", weight, "slots", image, batch_dims, True)
        changed["weight"] = merged(weight, rank - 1)
    return _Merged(**{**operands._asdict(), **changed}), samples


def _run(
    operands: _Operands,
    composition: Composition,
    likelihood: Likelihood,
    reduction: Reduction,
    return_responsibilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, where asked for, the responsibilities."""
    if not is_compiling():
        try:
            out = _routes.eager.slot_loss(
                *operands, composition, likelihood, reduction, return_responsibilities
            )
        except ValueError as error:
            raise _checks.of_merged(error) if isinstance(operands, _Merged) else error from None
        if out is not None:
            return out if return_responsibilities else (out, None)
    slots, target, mask_logits, log_mask, scale, weight = operands
    is_logits = log_mask is None
    mask = mask_logits if is_logits else log_mask
    assert mask is not None
    op = _routes.traced_op("slot_loss", slots.device)
    if op is None:
        op = reference.slot_loss
    elif not isinstance(scale, Tensor):
        scale = _routes.as_tensor(scale, slots, reference.compute_dtype(slots, target, mask, weight))
    loss, responsibilities = op(
        slots, target, mask, scale, weight, composition, is_logits, likelihood, reduction,
        return_responsibilities,
    )[:2]  # fmt: skip
    return loss, responsibilities if return_responsibilities else None
