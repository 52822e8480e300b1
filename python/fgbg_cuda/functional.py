"""The public functions. Each checks its arguments and calls the fused kernel, or, where kernels cannot
go (``torch.func`` transforms, forward-mode AD, devices without one), the same formula in reference.py."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _checks, reference
from ._ops import _C, CUDA_MISSING, HAS_CUDA_KERNELS

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

# Three routes, for every op. Eager: the namesake in _C checks the call and runs the kernel (csrc/eager.cpp),
# or returns None where kernels cannot go. Compiled: the dispatcher's op, which checks while it is traced.
# And reference.py for the rest: torch.func transforms, forward-mode AD, devices without a kernel.


def _transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is active; both are live while torch.compile
    traces them, so the answer is right there too, if it is asked and not traced."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


@functools.cache
def _warn_without_cuda_kernels() -> None:
    """Once: every call on that GPU is slower than it could be."""
    warnings.warn(CUDA_MISSING or "fgbg_cuda was built without CUDA kernels", UserWarning, stacklevel=2)


def _traced_op(name: str, device: torch.device) -> Any:
    """What to call while compiling: the op, or None where only reference.py works."""
    if device.type == "cuda" and not HAS_CUDA_KERNELS:
        if is_compiling():
            from ._while_compiling import warn_without_cuda_kernels as warn
        else:
            warn = _warn_without_cuda_kernels
        warn()
    if not is_compiling() or device.type not in _KERNEL_DEVICES:
        return None
    from ._while_compiling import transforming

    # Reading the level makes torch trace anew when it changes; transforms it watches by itself.
    if transforming() or forward_ad._current_level >= 0:
        return None
    return getattr(torch.ops.fgbg, name).default


def _as_tensor(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number for a compiled graph, which takes other values of it without being traced anew: torch turns
    arithmetic with a number into arithmetic with a tensor, but the number itself, given to an op, into a
    constant."""
    return (torch.ones((), dtype=torch.float64, device=like.device) * value).to(dtype)


def _seed_tensor(
    seed: Tensor | int | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.to(device)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device, generator=generator)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _drawn_seed(seed: Any, generator: torch.Generator | None, mu: Any) -> Any:
    """The seed; where there is a generator, drawn from it."""
    if generator is None:
        return seed if seed is None else _checks.seed(seed)
    device = mu.device if isinstance(mu, Tensor) else torch.device("cpu")
    _checks.generator(generator, seed, device)
    return _seed_tensor(None, generator, device)


def philox_normal(
    seed: Tensor | int,
    size: Sequence[int],
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The noise :func:`reparameterize` uses: standard normals that depend on ``seed`` and position alone.

    Element i in row-major order is number ``offset + i`` of the stream: Philox4x32-10 (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and (offset + i) // 4
    as counter, then Box-Muller in float32. Device, layout, thread count and batch split do not enter;
    CPU and CUDA share the random bits and agree to 2e-6.

    Args:
        seed: an integer, or an int64 tensor of one element.
        size: shape of the result.
        offset: number of the first element, at least 0.
        dtype: float64 (float32 values, widened), float32, bfloat16 or float16.
        device: default: that of ``seed`` if it is a tensor, else torch's default device.

    Raises:
        TypeError, ValueError: naming the argument, what came, and what is accepted.

    Example:
        >>> whole = fgbg_cuda.philox_normal(7, (6,))
        >>> part = fgbg_cuda.philox_normal(7, (4,), offset=2)
        >>> torch.equal(part, whole[2:])
        True
    """
    seed = _checks.seed(seed)
    size = _checks.size(size)
    offset = _checks.integer("offset", offset, 0)
    if device is not None and type(device) is not torch.device:
        device = _checks.device(device)
    if not is_compiling():
        out = _C.philox_normal(seed, size, offset, dtype, device)
        if out is not None:
            return out
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    seed = _seed_tensor(seed, None, device)
    op = _traced_op("philox_normal", seed.device)
    return (op or reference.philox_normal)(seed, size, offset, dtype)


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
    seed = _drawn_seed(seed, generator, mu)
    offset = _checks.integer("offset", offset, 0)
    if num_samples is not None:
        num_samples = _checks.integer("num_samples", num_samples, 1)
    return _draw(mu, logvar, num_samples, seed, offset)


def _draw(mu: Tensor, logvar: Tensor, num_samples: Any, seed: Any, offset: Any) -> Tensor:
    if not is_compiling():
        z = _C.reparameterize(mu, logvar, num_samples, seed, offset)
        if z is not None:
            return z
    seed = _seed_tensor(seed, None, mu.device)
    op = _traced_op("reparameterize", mu.device)
    if op is None:
        return reference.reparameterize(mu, logvar, seed, offset, num_samples)
    return _unflat_draws(op(*_flat(mu, logvar), seed, offset, num_samples)[0], mu)


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
        return _floored_kl(*_widened(mu, logvar, prior_mu, prior_logvar), reduction, free_bits)
    return _kl(mu, logvar, prior_mu, prior_logvar, reduction)


def _kl(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, reduction: str
) -> Tensor:
    if not is_compiling():
        kl = _C.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
        if kl is not None:
            return kl
    op = _traced_op("gaussian_kl", mu.device)
    if op is None:
        return reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
    kl, _ = op(*_flat(mu, logvar, prior_mu, prior_logvar), reduction)
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
        _C.check_gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
    # With the batch last, the "samples" of the reduction are the latent dimensions.
    by_dimension = (
        None if t is None else (t.flatten(1) if t.dim() > 1 else t[:, None]).t()
        for t in (mu, logvar, prior_mu, prior_logvar)
    )
    mean_kl = _kl(*by_dimension, "sample") / mu.shape[0]
    floored = _sum_in_order(_at_least(mean_kl, free_bits))
    if reduction == "batchmean":
        return floored
    total = floored * mu.shape[0]
    return total if reduction == "sum" else total / mu.numel()


def _at_least(x: Tensor, floor: float) -> Tensor:
    # A number that changes must not be an operand of clamp in a compiled graph: see _as_tensor.
    return x.clamp(min=_as_tensor(floor, x, x.dtype) if is_compiling() else floor)


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
    seed = _drawn_seed(seed, generator, mu)
    offset = _checks.integer("offset", offset, 0)
    if num_samples is not None:
        num_samples = _checks.integer("num_samples", num_samples, 1)
    if free_bits > 0:
        if not is_compiling():
            _C.check_gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction)
        wide = _widened(mu, logvar, prior_mu, prior_logvar)
        z = _draw(*wide[:2], num_samples, seed, offset)
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        return z.to(dtype), _floored_kl(*wide, reduction, free_bits)
    if not is_compiling():
        out = _C.sample_gaussian(mu, logvar, prior_mu, prior_logvar, num_samples, seed, offset, reduction)
        if out is not None:
            return out
    seed = _seed_tensor(seed, None, mu.device)
    op = _traced_op("sample_gaussian", mu.device)
    if op is None:
        return reference.sample_gaussian(
            mu, logvar, prior_mu, prior_logvar, seed, offset, num_samples, reduction
        )
    z, kl, _ = op(*_flat(mu, logvar, prior_mu, prior_logvar), seed, offset, num_samples, reduction)
    return _unflat_draws(z, mu), kl.view(mu.shape) if reduction == "none" else kl


def _widened(*operands: Any) -> tuple[Any, ...]:
    """Float tensors in the dtype of the computation. Where a function is made of several ops, their
    gradients then add up in that dtype and are rounded once, as in a single op."""
    dtype = reference.compute_dtype(*operands)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _checks.FLOATS else t for t in operands)


def _flat(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    if tensors[0].dim() <= _MAX_DIMS:
        return tensors
    return tuple(None if t is None else t.flatten(1) for t in tensors)


def _unflat_draws(z: Tensor, mu: Tensor) -> Tensor:
    return z if mu.dim() <= _MAX_DIMS else z.unflatten(-1, mu.shape[1:])


def _sum_in_order(x: Tensor) -> Tensor:
    """The sum of a vector, in the same order whatever the number of threads: torch splits one long
    sum among threads, but not a row of a matrix."""
    row = 4096
    padded = torch.nn.functional.pad(x, (0, -x.shape[0] % row))
    return padded.view(-1, row).sum(1).sum()


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
        kl = _C.bernoulli_kl(logits, prior_logits, reduction)
        if kl is not None:
            return kl
    prior, constant = (prior_logits, 0.0) if isinstance(prior_logits, Tensor) else (None, prior_logits)
    op = _traced_op("bernoulli_kl", logits.device)
    if op is None:
        return reference.bernoulli_kl(logits, prior, constant, reduction)
    constant = _as_tensor(constant, logits, reference.compute_dtype(logits)) if prior is None else None
    kl, _ = op(*_flat(logits, prior), constant, reduction)
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
        out = _C.reconstruction_loss(
            fg, bg, target, mask, mask_logits, fg_scale, bg_scale, composition, likelihood,
            fg_weight, bg_weight, normalize_area, reduction, return_terms,
        )  # fmt: skip
        if out is not None:
            return out if return_terms else (out, None)
    is_logits = mask is None
    operands = (fg, bg, target, mask_logits if is_logits else mask)
    rest = (normalize_area, reduction, return_terms)
    op = _traced_op("reconstruction_loss", fg.device)
    if op is None:
        return reference.reconstruction_loss(
            *operands, fg_scale, bg_scale, composition, is_logits, likelihood, fg_weight, bg_weight, *rest
        )
    dtype = reference.compute_dtype(*operands, fg_scale, bg_scale)
    fg_scale, bg_scale, fg_weight, bg_weight = (
        x if isinstance(x, Tensor) else _as_tensor(x, fg, dtype)
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
    call = _widened(fg, bg, target, mask, mask_logits, fg_scale, bg_scale)
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

    Example:
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
