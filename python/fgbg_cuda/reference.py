"""The executable specification: every op in plain PyTorch, formula by formula.

The kernels are tested against these functions in float64. They also run where the kernels cannot:
under ``torch.func`` transforms and forward-mode AD, on devices without a kernel, and as the source of
second derivatives. Arguments are taken as already checked; seeds are one-element int64 tensors.

Half-precision operands are computed in float32; a float64 operand makes the whole computation float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .words import Composition, Likelihood, Parameterization, Reduction

_WORD = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def compute_dtype(*operands: Tensor | float | None) -> torch.dtype:
    """float64 if any operand is float64, else float32."""
    double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in operands)
    return torch.float64 if double else torch.float32


# --- randomness -----------------------------------------------------------------------------------


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words held in int64 tensors."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps around, which leaves its 64 bits right.
        p0, p1 = x0 * _PHILOX_M[0], x2 * _PHILOX_M[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _WORD) ^ x1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ x3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _WORD, (k1 + _PHILOX_W[1]) & _WORD
    return [x0, x1, x2, x3]


def philox_normal(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    """Standard normals; element i (row-major) is number ``offset + i`` of the stream of ``seed``.

    Words x0..x3 of block (offset + i) // 4 become u = (x + 0.5) 2^-32, rounded to float32, and
    Box-Muller makes r(u0) cos 2 pi u1, r(u0) sin 2 pi u1, r(u2) cos 2 pi u3, r(u2) sin 2 pi u3 with
    r(u) = sqrt(-2 ln u).
    """
    index = torch.arange(math.prod(size), dtype=torch.int64, device=seed.device) + offset
    # As an unsigned number: offset + i may pass 2^63.
    block, which = (index >> 2) & (2**62 - 1), index & 3
    zero = torch.zeros_like(block)
    seed = seed.reshape(())
    x = philox4x32_10(
        (block & _WORD, (block >> 32) & _WORD, zero, zero), (seed & _WORD, (seed >> 32) & _WORD)
    )
    # In float64 the transform is exact to float32, which is what the kernels approximate.
    wide = torch.float32 if seed.device.type == "mps" else torch.float64
    first_pair = which < 2
    u, v = (
        (torch.where(first_pair, a, b).to(torch.float32) * 2.0**-32 + 2.0**-33).to(wide)
        for a, b in ((x[0], x[2]), (x[1], x[3]))
    )
    angle = 2 * math.pi * v
    wave = torch.where((which & 1) == 0, torch.cos(angle), torch.sin(angle))
    return (torch.sqrt(-2 * torch.log(u)) * wave).to(torch.float32).to(dtype).reshape(tuple(size))


# --- reductions -----------------------------------------------------------------------------------


def reduce(elements: Tensor, reduction: Reduction, batch_dims: int = 1) -> Tensor:
    """One of ``none``, ``sample`` ([B], or the shape of the leading ``batch_dims``), ``batchmean``, ``sum``,
    ``mean``."""
    if reduction == "none":
        return elements
    if reduction == "sample":
        return elements.flatten(batch_dims).sum(-1) if elements.dim() > batch_dims else elements
    total = elements.sum()
    if reduction == "batchmean":
        return total / math.prod(elements.shape[:batch_dims])
    return total / elements.numel() if reduction == "mean" else total


# --- latents --------------------------------------------------------------------------------------


def _as(value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand that is broadcast: a tensor, or a number, for every element of ``like``. (Expanded, so that
    its gradient is a sum of the elements'.)"""
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=dtype, device=like.device).expand_as(like)
    return value.to(dtype).expand_as(like)


def reparameterize(
    mu: Tensor,
    spread: Tensor,
    parameterization: Parameterization,
    seed: Tensor,
    offset: int = 0,
    num_samples: int | None = None,
) -> Tensor:
    """z = mu + std eps."""
    dtype = compute_dtype(mu, spread)
    size = tuple(mu.shape) if num_samples is None else (num_samples, *mu.shape)
    if seed.device != mu.device:  # of the CPU: as an operand, for which nothing waits
        seed = torch.zeros((), dtype=torch.int64, device=mu.device) + seed.reshape(())
    eps = philox_normal(seed, size, offset, dtype)
    std = spread.to(dtype)
    if parameterization != "std":
        std = torch.exp(std if parameterization == "log_std" else 0.5 * std)
    return (mu.to(dtype) + std * eps).to(torch.promote_types(mu.dtype, spread.dtype))


def gaussian_kl(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Tensor | float = 0.0,
    prior_spread: Tensor | float | None = None,
    parameterization: Parameterization = "logvar",
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """With d = logvar - prior_logvar: 1/2 (e^d - 1 - d + (mu - prior_mu)^2 / e^prior_logvar). From standard
    deviations, with t = std / prior_std - 1: 1/2 t^2 + t - log(1 + t) + 1/2 ((mu - prior_mu) / prior_std)^2.
    """
    dtype = compute_dtype(mu, spread, prior_mu, prior_spread)
    if prior_spread is None:
        prior_spread = 1.0 if parameterization == "std" else 0.0
    delta = mu.to(dtype) - _as(prior_mu, mu, dtype)
    s, prior = spread.to(dtype), _as(prior_spread, mu, dtype)
    if parameterization == "std":
        t = (s - prior) / prior
        # Where std is small, 1 + t has lost its digits; near the prior, std / prior_std those of t. (A
        # difference of logarithms has the right derivative at std = 0. Of a negative ratio there is none.)
        near = t.abs() < 0.5
        far_s, far_prior = (torch.where(near, 1.0, x).abs() for x in (s, prior))
        far_log = torch.log(far_s) - torch.log(far_prior) + torch.where(t < -1, math.nan, 0.0)
        log = torch.where(near, torch.log1p(torch.where(near, t, 0.0)), far_log)
        kl = 0.5 * t**2 + (t - log) + 0.5 * (delta / prior) ** 2
    else:
        if parameterization == "log_std":
            s, prior = 2 * s, 2 * prior
        d = s - prior
        kl = 0.5 * (torch.expm1(d) - d + delta**2 * torch.exp(-prior))
    return reduce(kl, reduction, batch_dims)


def sample_gaussian(
    mu: Tensor,
    spread: Tensor,
    prior_mu: Tensor | float,
    prior_spread: Tensor | float | None,
    parameterization: Parameterization,
    seed: Tensor,
    offset: int = 0,
    num_samples: int | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """``reparameterize`` and ``gaussian_kl``."""
    z = reparameterize(mu, spread, parameterization, seed, offset, num_samples)
    return z, gaussian_kl(mu, spread, prior_mu, prior_spread, parameterization, reduction, batch_dims)


def gaussian_log_prob(
    z: Tensor,
    mu: Tensor | float = 0.0,
    spread: Tensor | float | None = None,
    parameterization: Parameterization = "logvar",
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """-log(std sqrt(2 pi)) - 1/2 ((z - mu) / std)^2."""
    dtype = compute_dtype(z, mu, spread)
    if spread is None:
        spread = 1.0 if parameterization == "std" else 0.0
    delta, s = z.to(dtype) - _as(mu, z, dtype), _as(spread, z, dtype)
    if parameterization == "std":
        r, log_std = delta / s, torch.log(s)
    else:
        log_std = s if parameterization == "log_std" else 0.5 * s
        r = delta * torch.exp(-log_std)
    return reduce(-(log_std + 0.5 * math.log(2 * math.pi)) - 0.5 * r**2, reduction, batch_dims)


def bernoulli_kl(
    logits: Tensor,
    prior_logits: Tensor | float = 0.0,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """m (log m - log p) + (1 - m) (log(1 - m) - log(1 - p)), m and p the sigmoids of the logits.

    A logit of +-inf is a mask of exactly 1 or 0, of which one term is left: -log p or -log(1 - p).
    """
    dtype = compute_dtype(logits, prior_logits)
    a = logits.to(dtype)
    b = _as(prior_logits, a, dtype)
    certain = a.isinf() & ~b.isnan()
    unbounded = b.isinf() & a.isfinite()
    exact = torch.where(a > 0, -b, b)  # of a mask that is certain: softplus of this
    # The share that the prior rules out, times inf. Clamped, since it must not underflow to 0.
    largest = 700.0 if dtype == torch.float64 else 100.0
    ruled_out = torch.exp(F.logsigmoid(torch.where(b > 0, -a, a).clamp(-largest, largest)))
    infinite = torch.where(unbounded, ruled_out, 1.0) * torch.where(unbounded, b.abs(), 1.0)
    special = certain | unbounded
    a, b = torch.where(special, 0.0, a), torch.where(special, 0.0, b)
    on = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    off = torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))
    kl = torch.where(certain, -F.logsigmoid(-exact), torch.where(unbounded, infinite, on + off))
    return reduce(kl, reduction, batch_dims)


def categorical_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    dim: int = 1,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """sum_k p_k (log p_k - log q_k), p and q the softmax of the logits along ``dim``; no prior: uniform.

    An outcome of logit -inf has p_k = 0, and its term is 0; one that the prior alone excludes makes it inf.
    """
    dtype = compute_dtype(logits, prior_logits)
    a = logits.to(dtype)
    b = torch.zeros_like(a) if prior_logits is None else prior_logits.to(dtype).expand_as(a)
    excluded = a == -math.inf
    log_p, log_q = F.log_softmax(a, dim), F.log_softmax(b, dim)
    difference = torch.where(excluded, 0.0, log_p) - torch.where(excluded, 0.0, log_q)
    kl = (log_p.exp() * difference).sum(dim)
    forbidden = (~excluded & (b == -math.inf)).any(dim)
    return reduce(torch.where(forbidden, math.inf, kl), reduction, batch_dims)


# --- likelihoods: -log p(target | x) per element, in nats -----------------------------------------


def _gaussian(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    r = (x - target) / scale
    return 0.5 * r**2 + torch.log(scale) + 0.5 * math.log(2 * math.pi)


def _laplace(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return (x - target).abs() / scale + torch.log(2 * scale)


def _charbonnier(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return torch.sqrt((x - target) ** 2 + scale**2)


def _bernoulli(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    # softplus(x) - target x, on each side of 0 in the form that has no inf - inf.
    return torch.where(x > 0, (1 - target) * x - F.logsigmoid(x), -target * x - F.logsigmoid(-x))


def continuous_bernoulli_log_normalizer(logits: Tensor) -> Tensor:
    """log C = log(l / tanh(l / 2)), which tends to log 2 as l tends to 0."""
    near = logits.abs() < 0.1
    far = torch.where(near, torch.ones_like(logits), logits)
    s = torch.where(near, logits, torch.zeros_like(logits)) ** 2
    terms = (1 / 12, -7 / 1440, 31 / 90720, -127 / 4838400, 73 / 34214400)
    series = math.log(2) + sum(c * s ** (k + 1) for k, c in enumerate(terms))
    return torch.where(near, series, torch.log(far / torch.tanh(far / 2)))


def _continuous_bernoulli(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return _bernoulli(x, target, scale) - continuous_bernoulli_log_normalizer(x)


def _poisson(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return torch.exp(x) - target * x + torch.lgamma(target + 1)


def _squared_error(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return (x - target) ** 2


def _absolute_error(x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return (x - target).abs()


LIKELIHOODS: dict[Likelihood, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "charbonnier": _charbonnier,
    "bernoulli": _bernoulli,
    "continuous_bernoulli": _continuous_bernoulli,
    "poisson": _poisson,
    "squared_error": _squared_error,
    "absolute_error": _absolute_error,
}
SCALED_LIKELIHOODS = ("gaussian", "laplace", "charbonnier")


# --- reconstruction losses ------------------------------------------------------------------------


def _scale_of_elements(scale: Tensor | float, like: Tensor) -> Tensor:
    """A scale for every element of ``like``, [B, C, *spatial]."""
    if not isinstance(scale, Tensor):
        return torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if scale.dim() > 1:
        return scale.to(like.dtype).expand_as(like)
    # Expanded, so that its gradient is a sum of the elements': of an empty batch 0, where the derivative of
    # log(scale), taken once and times 0, would be NaN at 0.
    return scale.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 2)).expand_as(like)


def _weights(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where a weight leaves elements out, and what it multiplies the others by: of bool and uint8, 1."""
    dropped = weight == 0
    numbers = weight if weight.is_floating_point() else ~dropped
    return dropped, torch.where(dropped, 0.0, numbers.to(dtype))


def region_mean(total: Tensor, area: Tensor, channels: int) -> Tensor:
    """total / (area * channels), and exactly 0 where the area is 0."""
    empty = area <= 0
    return torch.where(empty, 0.0, total) / torch.where(empty, 1.0, area * channels)


def _any(*conditions: Tensor | None) -> Tensor | None:
    """Where one of them holds; None is a condition that holds nowhere."""
    given = [c for c in conditions if c is not None]
    return functools.reduce(torch.logical_or, given) if given else None


def _unless(excluded: Tensor | None, x: Tensor, otherwise: float) -> Tensor:
    return x if excluded is None else torch.where(excluded, otherwise, x)


def _is_zero(weight: Tensor | float, like: Tensor) -> Tensor | None:
    if isinstance(weight, Tensor):
        return weight == 0
    return like.new_ones((), dtype=torch.bool) if weight == 0 else None


def _on_and_off(logits: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(logits) and sigmoid(-logits), both from the smaller: the derivative of the larger, taken by
    itself, would be s (1 - s) with 1 - s cancelled (at 30 and in float64, wrong in the third digit)."""
    small = torch.sigmoid(torch.where(logits > 0, -logits, logits))
    large = 1 - small
    return torch.where(logits > 0, large, small), torch.where(logits > 0, small, large)


def reconstruction_loss(
    fg: Tensor,
    bg: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    fg_scale: Tensor | float,
    bg_scale: Tensor | float,
    weight: Tensor | None,
    composition: Composition,
    mask_is_logits: bool,
    likelihood: Likelihood,
    fg_weight: Tensor | float = 1.0,
    bg_weight: Tensor | float = 1.0,
    normalize_area: bool = False,
    reduction: Reduction = "batchmean",
    return_terms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss and, where asked for, the sums it is made of.

    With m the mask, l(x) = -log p(target | x) and sums over the elements of each sample:

    - ``masked``: fg_weight sum m l(fg) + bg_weight sum (1 - m) l(bg)
    - ``blended``: sum l(m fg + (1 - m) bg)
    - ``mixture_joint``: sum over pixels -log(m e^-sum_c l(fg) + (1 - m) e^-sum_c l(bg))
    - ``mixture_independent``: sum over elements -log(m e^-l(fg) + (1 - m) e^-l(bg))
    - ``plain``: sum l(fg)

    A weight multiplies each element's part of the sums, those of the areas among them.

    The terms are [4, B]: foreground nats, background nats, foreground area, background area.

    Hard means select. What a mask of bool or uint8 or a weight of 0 leaves out of a sum, and, of the loss, a
    region whose weight is 0 or which is empty and is normalised by its area, is not part of it: NaN there
    adds 0, and gets zero gradients. (A float mask multiplies.) For that the operands themselves are replaced
    there, before the likelihood sees them: the derivative of torch.where is 0 where it does not choose.
    """
    dtype = compute_dtype(fg, bg, target, mask, fg_scale, bg_scale, weight)
    nll = LIKELIHOODS[likelihood]
    fg, target = fg.to(dtype), target.to(dtype)
    bg = fg if bg is None else bg.to(dtype)
    hard = None if mask is None or mask.is_floating_point() else mask != 0
    if mask is not None:
        mask = (mask if hard is None else hard).to(dtype)
    fg_scale, bg_scale = _scale_of_elements(fg_scale, fg), _scale_of_elements(bg_scale, fg)
    no_terms = fg.new_empty(0)
    w: Tensor | float = 1.0
    if weight is not None:
        dropped, w = _weights(weight, dtype)
        fg, bg, target = (torch.where(dropped, 0.0, x) for x in (fg, bg, target))
        fg_scale, bg_scale = (torch.where(dropped, 1.0, x) for x in (fg_scale, bg_scale))
        if mask is not None:
            mask = torch.where(dropped, 0.0, mask)

    if composition == "plain":
        return reduce(w * nll(fg, target, fg_scale), reduction), no_terms

    assert mask is not None, composition
    if composition.startswith("mixture"):
        fg_nats, bg_nats = nll(fg, target, fg_scale), nll(bg, target, bg_scale)
        if composition == "mixture_joint":
            fg_nats, bg_nats = fg_nats.sum(1, keepdim=True), bg_nats.sum(1, keepdim=True)
        elements = -torch.logaddexp(F.logsigmoid(mask) - fg_nats, F.logsigmoid(-mask) - bg_nats)
        return reduce(w * elements, reduction), no_terms

    on, off = _on_and_off(mask) if mask_is_logits else (mask, 1 - mask)
    if composition == "blended":
        blend = on * fg + off * bg if hard is None else torch.where(hard, fg, bg)
        return reduce(w * nll(blend, target, fg_scale), reduction), no_terms

    def region(x: Tensor, scale: Tensor, share: Tensor, excluded: Tensor | None) -> Tensor:
        operands = _unless(excluded, x, 0.0), _unless(excluded, target, 0.0), _unless(excluded, scale, 1.0)
        return _unless(excluded, share * nll(*operands), 0.0)

    # (layer, its scale, its share of each element, where it has none, its weight)
    regions = (
        (fg, fg_scale, w * on, None if hard is None else ~hard, fg_weight),
        (bg, bg_scale, w * off, hard, bg_weight),
    )
    channels, shape = fg.shape[1], (-1, *(1,) * (fg.dim() - 1))
    terms, areas, parts = [], [], []
    for x, scale, share, absent, region_weight in regions:
        nats = region(x, scale, share, absent)
        # In pixels: a mask or a weight with channels has 1/C of a pixel in each.
        area = share.mean(1).flatten(1).sum(1)
        terms.append(reduce(nats, "sample"))
        areas.append(area)
        # The terms are those before the weights; the loss may leave out more.
        zero = _is_zero(region_weight, fg)
        empty = area <= 0 if normalize_area else None
        left_out = _any(zero, None if empty is None else empty.reshape(shape))
        if left_out is not None:
            nats = region(x, scale, share, _any(absent, left_out))
        if reduction != "none":
            nats = reduce(nats, "sample")
        if normalize_area:
            nats = region_mean(nats, area.reshape(shape) if reduction == "none" else area, channels)
        parts.append(_unless(zero, region_weight * nats, 0.0))
    loss = parts[0] + parts[1]
    if reduction == "mean":
        loss = reduce(loss, "sum") / fg.numel()
    elif reduction != "none":
        loss = reduce(loss, reduction)
    return loss, torch.stack([*terms, *areas])


# --- slots ----------------------------------------------------------------------------------------


def _scale_of_slots(scale: Tensor | float, slots: Tensor) -> Tensor:
    """A scale for every element of ``slots``, [B, K, C, *spatial]."""
    if isinstance(scale, Tensor) and scale.dim() == 1:
        scale = scale.reshape(-1, *(1,) * (slots.dim() - 2))
    return torch.as_tensor(scale, dtype=slots.dtype, device=slots.device).expand_as(slots)


def slot_loss(
    slots: Tensor,
    target: Tensor,
    mask: Tensor,
    scale: Tensor | float,
    weight: Tensor | None,
    composition: Composition,
    mask_is_logits: bool,
    likelihood: Likelihood,
    reduction: Reduction = "batchmean",
    return_responsibilities: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of an image that K slots make up and, of a mixture where asked for, the responsibilities.

    With m the softmax of the logits over the slots, or the exponential of the log-mask, and
    l(x) = -log p(target | x):

    - ``mixture_joint``: sum over pixels -log sum_k m_k e^-sum_c l(slot_k)
    - ``mixture_independent``: sum over elements -log sum_k m_k e^-l(slot_k)
    - ``blended``: sum l(sum_k m_k slot_k)

    A slot whose mask is -inf is excluded, and an element whose weight is 0 left out: what they hold is
    replaced before it is used, as in ``reconstruction_loss``.
    """
    dtype = compute_dtype(slots, target, mask, scale, weight)
    slots, target, mask = slots.to(dtype), target.to(dtype), mask.to(dtype)
    blended = composition == "blended"
    scale = _scale_of_elements(scale, target) if blended else _scale_of_slots(scale, slots)
    responsibilities = slots.new_empty(0)
    if return_responsibilities and not blended:
        with torch.no_grad():
            terms = _slot_terms(slots, target, mask, scale, composition, mask_is_logits, likelihood)
            posterior = torch.exp(terms - torch.logsumexp(terms, 1, keepdim=True))
            # (Forward-mode AD goes on without grad mode.)
            responsibilities = torch.where(mask == -math.inf, 0.0, posterior).detach()
    w: Tensor | float = 1.0
    if weight is not None:
        dropped, w = _weights(weight, dtype)
        dropped = dropped[(None,) * (target.dim() - weight.dim())]
        of_slots = dropped.unsqueeze(1)
        # A mask that several channels share is left out where all of them are.
        of_mask = of_slots if mask.shape[2] == slots.shape[2] else of_slots.all(2, keepdim=True)
        slots, target = torch.where(of_slots, 0.0, slots), torch.where(dropped, 0.0, target)
        scale, mask = (
            torch.where(dropped if blended else of_slots, 1.0, scale),
            torch.where(of_mask, 0.0, mask),
        )
    if blended:
        share = _softmax(mask) if mask_is_logits else torch.exp(mask)
        blend = (share * torch.where(mask == -math.inf, 0.0, slots)).sum(1)
        return reduce(w * LIKELIHOODS[likelihood](blend, target, scale), reduction), responsibilities
    terms = _slot_terms(slots, target, mask, scale, composition, mask_is_logits, likelihood)
    # Where every slot is excluded nothing is likely, and nothing has a gradient.
    none = (mask == -math.inf).all(1, keepdim=True)
    log_likelihood = torch.logsumexp(torch.where(none, 0.0, terms), 1, keepdim=True)
    # The softmax of nothing but -inf is NaN.
    elements = torch.where(none, math.nan if mask_is_logits else math.inf, -log_likelihood).squeeze(1)
    return reduce(w * elements, reduction), responsibilities


def _softmax(logits: Tensor) -> Tensor:
    """NaN, without a gradient, where all logits are -inf."""
    none = (logits == -math.inf).all(1, keepdim=True)
    return torch.where(none, math.nan, torch.softmax(torch.where(none, 0.0, logits), 1))


def _slot_terms(
    slots: Tensor,
    target: Tensor,
    mask: Tensor,
    scale: Tensor,
    composition: Composition,
    mask_is_logits: bool,
    likelihood: Likelihood,
) -> Tensor:
    """log m_k p(target | slot_k), -inf of a slot that is excluded."""
    excluded = mask == -math.inf
    operands = (
        torch.where(excluded, 0.0, slots),
        torch.where(excluded, 0.0, target.unsqueeze(1)),
        torch.where(excluded, 1.0, scale),
    )
    nats = LIKELIHOODS[likelihood](*operands)
    if composition == "mixture_joint":
        nats = nats.sum(2, keepdim=True)
    if mask_is_logits:
        none = excluded.all(1, keepdim=True)
        mask = F.log_softmax(torch.where(none, 0.0, mask), 1)
    return torch.where(excluded, -math.inf, mask - nats)


# --- evaluation -----------------------------------------------------------------------------------

LOG_2 = math.log(2)


def importance_weighted_bound(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """log (1/K) sum_k p(x, z_k) / q(z_k | x) over the K samples along ``dim``."""
    return torch.logsumexp(log_p - log_q, dim) - math.log(log_p.shape[dim])
