"""What is timed: per op the inputs at a size, our call, and the same loss in plain PyTorch as a user
would write it. Peers other than ours are made from the plain version, so they compute the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fgbg_cuda


@dataclass
class Case:
    name: str
    size: tuple[int, ...]
    inputs: list[Tensor]  # all of them want gradients, but for the last (the target of an image loss)
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    perfect_bytes: int  # every input read once and every gradient written once, in one fused pass
    comparable: bool = True  # the same numbers, up to rounding (false where noise enters)


LATENT_SIZES = ((64, 16), (512, 128), (4096, 1024))
IMAGE_SIZES = ((64, 1, 28, 28), (64, 3, 64, 64), (16, 3, 256, 256))


def _plain_nll(likelihood: str) -> Callable[[Tensor, Tensor], Tensor]:
    return {
        "gaussian": lambda x, t: 0.5 * (x - t) ** 2 + 0.5 * math.log(2 * math.pi),
        "laplace": lambda x, t: (x - t).abs() + math.log(2),
        "bernoulli": lambda x, t: F.binary_cross_entropy_with_logits(x, t, reduction="none"),
        "squared_error": lambda x, t: (x - t) ** 2,
    }[likelihood]


def _masked(likelihood: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    b, _, *spatial = size
    fg, bg, target = (torch.rand(size, dtype=dtype, device=device) for _ in range(3))
    logits = torch.randn(b, 1, *spatial, dtype=dtype, device=device)
    nll = _plain_nll(likelihood)

    def ours(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask_logits=logits, likelihood=likelihood)

    def eager(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        mask = torch.sigmoid(logits)
        return (mask * nll(fg, target) + (1 - mask) * nll(bg, target)).sum() / b

    inputs = [t.requires_grad_() for t in (fg, bg, logits)] + [target]
    read = sum(t.numel() for t in inputs)
    written = read - target.numel()
    return Case(f"masked {likelihood}", size, inputs, ours, eager, (read + written) * target.element_size())


def _mixture(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    case = _masked("gaussian", size, dtype, device)
    nll = _plain_nll("gaussian")

    def ours(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return fgbg_cuda.mixture_reconstruction_loss(fg, bg, target, mask_logits=logits)

    def eager(fg: Tensor, bg: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        a = F.logsigmoid(logits) - nll(fg, target).sum(1, keepdim=True)
        b = F.logsigmoid(-logits) - nll(bg, target).sum(1, keepdim=True)
        return -torch.logaddexp(a, b).sum() / fg.shape[0]

    return Case("mixture gaussian", size, case.inputs, ours, eager, case.perfect_bytes)


def _plain_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (logvar.exp() - 1 - logvar + mu**2).sum() / mu.shape[0]


def _latents(name: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    mu, logvar = (torch.randn(size, dtype=dtype, device=device, requires_grad=True) for _ in range(2))

    def plain_sample(mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

    def ours_both(mu: Tensor, logvar: Tensor) -> Tensor:
        z, kl = fgbg_cuda.sample_gaussian(mu, logvar)
        return z.sum() + kl

    ours, eager, tensors = {
        "gaussian_kl": (fgbg_cuda.gaussian_kl, _plain_kl, 4),
        "reparameterize": (
            lambda mu, logvar: fgbg_cuda.reparameterize(mu, logvar).sum(),
            lambda mu, logvar: plain_sample(mu, logvar).sum(),
            6,
        ),
        "sample_gaussian": (
            ours_both,
            lambda mu, logvar: plain_sample(mu, logvar).sum() + _plain_kl(mu, logvar),
            6,
        ),
    }[name]
    perfect = tensors * mu.numel() * mu.element_size()
    return Case(name, size, [mu, logvar], ours, eager, perfect, comparable=name == "gaussian_kl")


def cases(dtype: torch.dtype, device: str, quick: bool) -> list[Case]:
    pick = slice(0, 1) if quick else slice(None)
    out = []
    for size in IMAGE_SIZES[pick]:
        for likelihood in ("squared_error", "gaussian", "laplace", "bernoulli"):
            out.append(_masked(likelihood, size, dtype, device))
        out.append(_mixture(size, dtype, device))
    for size in LATENT_SIZES[pick]:
        for name in ("gaussian_kl", "reparameterize", "sample_gaussian"):
            out.append(_latents(name, size, dtype, device))
    return out
