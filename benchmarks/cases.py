"""What is measured: per op the inputs at a size, our call, and the same in plain PyTorch as a careful user
writes it. Peers other than ours are made from the plain version, so they compute the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fgbg_cuda

SCALE = 0.5  # of Gaussian and Laplace; in the plain version constants are folded by hand
PRIOR_LOGIT = -2.0


@dataclass
class Case:
    """One op at one size and dtype.

    ``ours`` and ``plain`` take the inputs and return a tensor or several. Where the op draws noise, the
    first result is the sample and ``plain`` takes the noise as one more, optional argument, for checking.
    ``upstream`` holds a gradient for each result: None for a scalar, which gets 1 as from
    ``loss.backward()``.
    """

    op: str
    size: tuple[int, ...]
    dtype: torch.dtype
    device: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    perfect_bytes: int  # what perfect kernels move: operands read once, results and gradients written once
    upstream: tuple[Tensor | None, ...] = (None,)
    noise: bool = False
    backward: bool = True

    @property
    def wanted(self) -> list[Tensor]:
        return [t for t in self.inputs if t.requires_grad]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- losses of images -----------------------------------------------------------------------------


def _log_normalizer(x: Tensor) -> Tensor:
    """log(x / tanh(x / 2)) of the continuous Bernoulli, by its series near 0, right to 1e-8."""
    near = x.abs() < 0.3
    far = torch.where(near, 1.0, x)
    s = x**2
    series = math.log(2) + s * (1 / 12 + s * (-7 / 1440 + s * (31 / 90720)))
    return torch.where(near, series, torch.log(far / torch.tanh(0.5 * far)))


def _bernoulli(x: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, t, reduction="none")


PLAIN_NLL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared_error": lambda x, t: F.mse_loss(x, t, reduction="none"),
    "gaussian": lambda x, t: (
        F.mse_loss(x, t, reduction="none") * (0.5 / SCALE**2) + math.log(SCALE * math.sqrt(2 * math.pi))
    ),
    "laplace": lambda x, t: F.l1_loss(x, t, reduction="none") * (1 / SCALE) + math.log(2 * SCALE),
    "bernoulli": _bernoulli,
    "continuous_bernoulli": lambda x, t: _bernoulli(x, t) - _log_normalizer(x),
}


def _scales(likelihood: str, *names: str) -> dict[str, float]:
    return dict.fromkeys(names, SCALE) if likelihood in ("gaussian", "laplace") else {}


def image_functions(composition: str, likelihood: str) -> tuple[Callable, Callable]:
    """Our loss and the plain one, each of (fg, bg, mask_logits, target)."""
    nll = PLAIN_NLL[likelihood]
    two, one = _scales(likelihood, "fg_scale", "bg_scale"), _scales(likelihood, "scale")

    def masked(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return fgbg_cuda.masked_reconstruction_loss(
            fg, bg, target, mask_logits=logits, likelihood=likelihood, **two
        )

    def plain_masked(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        mask = torch.sigmoid(logits)
        return (mask * nll(fg, target) + (1 - mask) * nll(bg, target)).sum() / fg.shape[0]

    def blended(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return fgbg_cuda.blended_reconstruction_loss(
            fg, bg, target, mask_logits=logits, likelihood=likelihood, **one
        )

    def plain_blended(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return nll(torch.lerp(bg, fg, torch.sigmoid(logits)), target).sum() / fg.shape[0]

    def mixture(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return fgbg_cuda.mixture_reconstruction_loss(
            fg, bg, target, mask_logits=logits, likelihood=likelihood, **two
        )

    def plain_mixture(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        a = F.logsigmoid(logits) - nll(fg, target).sum(1, keepdim=True)
        b = F.logsigmoid(-logits) - nll(bg, target).sum(1, keepdim=True)
        return -torch.logaddexp(a, b).sum() / fg.shape[0]

    return {
        "masked": (masked, plain_masked),
        "blended": (blended, plain_blended),
        "mixture": (mixture, plain_mixture),
        # An upstream gradient other than 1, as from a weight of this term in a sum.
        "half of masked": (lambda *x: 0.5 * masked(*x), lambda *x: 0.5 * plain_masked(*x)),
    }[composition]


def image_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """``COMPOSITION LIKELIHOOD``, with a mask from logits and gradients for all but the target;
    ``..., forward``: without."""
    name, _, forward = op.partition(", ")
    composition, likelihood = name.rsplit(" ", 1)
    make = torch.randn if "bernoulli" in likelihood else torch.rand
    options = {"dtype": dtype, "device": device}
    fg, bg = make(size, **options), make(size, **options)
    target = torch.rand(size, **options)
    logits = torch.randn(size[0], 1, *size[2:], **options)
    perfect = _bytes(fg, bg, logits, target)
    if not forward:
        for t in (fg, bg, logits):
            t.requires_grad_()
        perfect += _bytes(fg, bg, logits)
    ours, plain = image_functions(composition, likelihood)
    inputs = (fg, bg, logits, target)
    return Case(op, size, dtype, device, inputs, ours, plain, perfect, backward=not forward)


def plain_gaussian(x: Tensor, target: Tensor) -> Tensor:
    """As decoders of a fixed noise have it."""
    nll = 0.5 * ((target - x) / SCALE) ** 2 + math.log(SCALE) + 0.5 * math.log(2 * math.pi)
    return nll.sum() / x.shape[0]


def plain_squared_error(x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(x, target, reduction="sum") / x.shape[0]


def one_image_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """``reconstruction LIKELIHOOD``: no layers, with a gradient for the prediction."""
    likelihood = op.removeprefix("reconstruction ")
    x, target = (torch.rand(size, dtype=dtype, device=device) for _ in range(2))
    x.requires_grad_()
    options = _scales(likelihood, "scale")

    def ours(x: Tensor, target: Tensor) -> Tensor:
        return fgbg_cuda.reconstruction_loss(x, target, likelihood=likelihood, **options)

    plain = {"gaussian": plain_gaussian, "squared_error": plain_squared_error}[likelihood]
    return Case(op, size, dtype, device, (x, target), ours, plain, 3 * _bytes(x))


def slot_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """``slot mixture``, as MONet and IODINE have it, or ``slot blend``, as slot attention has: of K slots
    [B, K, C, *spatial], with gradients for slots and logits."""
    batch, _, channels, *spatial = size
    options = {"dtype": dtype, "device": device}
    slots = torch.rand(size, requires_grad=True, **options)
    logits = torch.randn(*size[:2], 1, *spatial, requires_grad=True, **options)
    target = torch.rand(batch, channels, *spatial, **options)

    def mixture(slots: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        return fgbg_cuda.slot_mixture_loss(slots, target, mask_logits=logits, scale=SCALE)

    def plain_mixture(slots: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        log_mask = F.log_softmax(logits, 1)
        constant = math.log(SCALE * math.sqrt(2 * math.pi))
        density = -(((target[:, None] - slots) / SCALE) ** 2) / 2 - constant
        return -torch.logsumexp(log_mask + density.sum(2, keepdim=True), 1).sum() / batch

    def blend(slots: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        return fgbg_cuda.slot_blended_loss(slots, target, mask_logits=logits, likelihood="squared_error")

    def plain_blend(slots: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        return ((slots * logits.softmax(1)).sum(1) - target).square().sum() / batch

    ours, plain = (mixture, plain_mixture) if op == "slot mixture" else (blend, plain_blend)
    perfect = 2 * _bytes(slots, logits) + _bytes(target)
    return Case(op, size, dtype, device, (slots, target, logits), ours, plain, perfect)


def mask_kl_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """KL of a mask's Bernoulli posterior to a prior of one probability."""
    logits = torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    def ours(logits: Tensor) -> Tensor:
        return fgbg_cuda.bernoulli_kl(logits, PRIOR_LOGIT)

    log_p, log_not_p = -math.log1p(math.exp(-PRIOR_LOGIT)), -math.log1p(math.exp(PRIOR_LOGIT))

    def plain(logits: Tensor) -> Tensor:
        m = torch.sigmoid(logits)
        kl = m * (F.logsigmoid(logits) - log_p) + (1 - m) * (F.logsigmoid(-logits) - log_not_p)
        return kl.sum() / logits.shape[0]

    return Case(op, size, dtype, device, (logits,), ours, plain, 2 * _bytes(logits))


# --- latents --------------------------------------------------------------------------------------


def plain_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (logvar.exp() - 1 - logvar + mu**2).sum() / mu.shape[0]


def plain_sample(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if eps is None else eps)


def plain_sample_and_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return plain_sample(mu, logvar, eps), plain_kl(mu, logvar)


def latent_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """``gaussian_kl``, ``reparameterize`` or ``sample_gaussian``; z gets a gradient as from a decoder."""
    mu, logvar, dz = (torch.randn(size, dtype=dtype, device=device) for _ in range(3))
    mu.requires_grad_()
    logvar.requires_grad_()
    ours, plain, upstream, tensors = {
        # Forward reads 2 and with the gradients at hand writes 2.
        "gaussian_kl": (fgbg_cuda.gaussian_kl, plain_kl, (None,), 4),
        # Forward reads 2, writes z; backward reads dz and logvar, writes dlogvar (dmu is dz).
        "reparameterize": (fgbg_cuda.reparameterize, plain_sample, (dz,), 6),
        # Forward as above; backward reads dz, mu and logvar, writes dmu and dlogvar.
        "sample_gaussian": (fgbg_cuda.sample_gaussian, plain_sample_and_kl, (dz, None), 8),
    }[op]
    noise = op != "gaussian_kl"
    perfect = tensors * _bytes(mu)
    return Case(op, size, dtype, device, (mu, logvar), ours, plain, perfect, upstream, noise)


def plain_std_kl(mu: Tensor, std: Tensor) -> Tensor:
    return 0.5 * (std**2 + mu**2 - 1 - 2 * torch.log(std)).sum() / mu.shape[0]


def plain_std_sample_and_kl(mu: Tensor, std: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return mu + std * (torch.randn_like(mu) if eps is None else eps), plain_std_kl(mu, std)


def std_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """``gaussian_kl std`` or ``sample_gaussian std``: the scale is a standard deviation, as from softplus."""
    mu, dz = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    std = (0.1 + torch.rand(size, device=device)).to(dtype)
    mu.requires_grad_()
    std.requires_grad_()
    draws = op == "sample_gaussian std"
    function = fgbg_cuda.sample_gaussian if draws else fgbg_cuda.gaussian_kl

    def ours(mu: Tensor, std: Tensor) -> Any:
        return function(mu, std, parameterization="std")

    plain = plain_std_sample_and_kl if draws else plain_std_kl
    perfect = (8 if draws else 4) * _bytes(mu)
    upstream = (dz, None) if draws else (None,)
    return Case(op, size, dtype, device, (mu, std), ours, plain, perfect, upstream, draws)


def log_prob_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """The likelihood of a decoder that predicts its noise: a mean and a logvar for every pixel."""
    x, mu, logvar = (torch.randn(size, dtype=dtype, device=device) for _ in range(3))
    mu.requires_grad_()
    logvar.requires_grad_()

    def ours(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return fgbg_cuda.gaussian_log_prob(x, mu, logvar)

    def plain(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu) ** 2 / logvar.exp()).sum() / x.shape[0]

    return Case(op, size, dtype, device, (x, mu, logvar), ours, plain, 5 * _bytes(x))


def categorical_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """Groups of outcomes along the last dimension against the uniform distribution, as of a discrete VAE."""
    logits = torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    def ours(logits: Tensor) -> Tensor:
        return fgbg_cuda.categorical_kl(logits, dim=-1)

    def plain(logits: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1)
        return (log_p.exp() * (log_p + math.log(logits.shape[-1]))).sum() / logits.shape[0]

    return Case(op, size, dtype, device, (logits,), ours, plain, 2 * _bytes(logits))


def noise_case(op: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """``philox_normal`` against ``torch.randn``: no gradient, every number written once."""

    def ours() -> Tensor:
        return fgbg_cuda.philox_normal(7, size, dtype=dtype, device=device)

    def plain(eps: Tensor | None = None) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device) if eps is None else eps

    perfect = math.prod(size) * dtype.itemsize
    return Case(op, size, dtype, device, (), ours, plain, perfect, noise=True, backward=False)


# --- the list -------------------------------------------------------------------------------------

IMAGE_SIZES = ((64, 1, 28, 28), (64, 1, 64, 64), (64, 3, 64, 64), (16, 3, 256, 256), (64, 3, 256, 256))
MASK_SIZES = ((64, 1, 28, 28), (64, 1, 64, 64), (64, 1, 256, 256))
LATENT_SIZES = ((64, 16), (128, 32), (512, 128), (2048, 512), (4096, 1024))
IMAGE_OPS = (
    "reconstruction squared_error",
    "reconstruction gaussian",
    "masked squared_error",
    "masked gaussian",
    "masked laplace",
    "masked bernoulli",
    "masked continuous_bernoulli",
    "half of masked gaussian",
    "blended squared_error",
    "mixture gaussian",
)
SLOT_OPS = ("slot mixture", "slot blend")
SLOT_SIZES = ((8, 7, 3, 64, 64), (8, 7, 3, 128, 128))
LATENT_OPS = ("gaussian_kl", "reparameterize", "sample_gaussian", "philox_normal")
FORWARD_OP, FORWARD_SIZE = "masked squared_error, forward", (102, 3, 256, 256)  # 255 MiB of inputs in float32

_MAKERS = {
    "reconstruction squared_error": one_image_case,
    "reconstruction gaussian": one_image_case,
    **dict.fromkeys(SLOT_OPS, slot_case),
    "bernoulli_kl": mask_kl_case,
    "gaussian_kl": latent_case,
    "reparameterize": latent_case,
    "sample_gaussian": latent_case,
    "philox_normal": noise_case,
    "gaussian_kl std": std_case,
    "sample_gaussian std": std_case,
    "gaussian_log_prob": log_prob_case,
    "categorical_kl": categorical_case,
}
# One size of each: what these share with others is measured there.
OTHER_LATENTS = (
    ("gaussian_kl std", (512, 256)),
    ("sample_gaussian std", (512, 256)),
    ("gaussian_log_prob", (64, 3, 64, 64)),
    ("categorical_kl", (512, 64, 16)),
)


@dataclass(frozen=True)
class Plan:
    """A case that is made when its turn comes: the inputs of all at once would not fit into memory."""

    op: str
    size: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.size))} {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> Case:
        return _MAKERS.get(self.op, image_case)(self.op, self.size, self.dtype, self.device)


def _plans(dtype: torch.dtype, device: str, sizes: slice) -> list[Plan]:
    plans = [Plan(op, size, dtype, device) for size in IMAGE_SIZES[sizes] for op in IMAGE_OPS]
    plans += [Plan("bernoulli_kl", size, dtype, device) for size in MASK_SIZES[sizes]]
    plans += [Plan(op, size, dtype, device) for size in SLOT_SIZES[sizes] for op in SLOT_OPS]
    return plans + [Plan(op, size, dtype, device) for size in LATENT_SIZES[sizes] for op in LATENT_OPS]


def all_plans(dtypes: list[torch.dtype], device: str) -> list[Plan]:
    """Every other size in every dtype first, then the sizes between in the first dtype: what a time budget
    cuts off is what matters least."""
    plans = [Plan(FORWARD_OP, FORWARD_SIZE, dtypes[0], device)]
    for dtype in dtypes:
        plans += _plans(dtype, device, slice(0, None, 2))
        plans += [Plan(op, size, dtype, device) for op, size in OTHER_LATENTS]
    return plans + _plans(dtypes[0], device, slice(1, None, 2))


def quick_plans(dtypes: list[torch.dtype], device: str) -> list[Plan]:
    """One small case of every kind."""
    plans = []
    for dtype in dtypes:
        plans += [Plan(op, (4, 3, 8, 8), dtype, device) for op in (*IMAGE_OPS, FORWARD_OP)]
        plans.append(Plan("bernoulli_kl", (4, 1, 8, 8), dtype, device))
        plans += [Plan(op, (2, 3, 3, 8, 8), dtype, device) for op in SLOT_OPS]
        plans += [Plan(op, (8, 4), dtype, device) for op in LATENT_OPS]
        plans += [Plan(op, (8, 4, 4), dtype, device) for op, _ in OTHER_LATENTS]
    return plans
