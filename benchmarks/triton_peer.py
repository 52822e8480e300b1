"""The peer a CUDA user would write by hand: Triton kernels for a few of the ops, forward and backward.

Imported only where there is a GPU. Losses are partial sums, one per program, added up by torch; the atomic
variant lets programs add to one number in whatever order they finish, and shows what the second pass costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cases import SCALE

BLOCK = 1024
SAMPLE_BLOCK = 2048  # four runs of it, so that a thread's part of a run is still 16 bytes


# --- masked losses of images ----------------------------------------------------------------------
# A program takes BLOCK pixels of the batch and walks their channels; the mask is read once per pixel.
# l(x) = factor (x - target)^2 + constant, summed as m l(fg) + (1 - m) l(bg), m = sigmoid(logits).


@triton.jit
def _finish(total, out, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(out, total)
    else:
        tl.store(out + tl.program_id(0), total)


@triton.jit
def _masked_forward(
    fg, bg, target, logits, out, pixels, plane, factor, constant,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < pixels
    mask = tl.sigmoid(tl.load(logits + pixel, live, other=0.0).to(tl.float32))
    first = pixel // plane * plane * CHANNELS + pixel % plane
    total = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHANNELS):
        at = first + c * plane
        t = tl.load(target + at, live, other=0.0).to(tl.float32)
        df = tl.load(fg + at, live, other=0.0).to(tl.float32) - t
        db = tl.load(bg + at, live, other=0.0).to(tl.float32) - t
        total += factor * (mask * df * df + (1 - mask) * db * db) + constant
    _finish(tl.sum(tl.where(live, total, 0.0)), out, ATOMIC)


@triton.jit
def _masked_backward(
    fg, bg, target, logits, upstream, d_fg, d_bg, d_logits, pixels, plane, batch, factor,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < pixels
    mask = tl.sigmoid(tl.load(logits + pixel, live, other=0.0).to(tl.float32))
    scale = tl.load(upstream).to(tl.float32) * factor / batch
    first = pixel // plane * plane * CHANNELS + pixel % plane
    difference = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHANNELS):
        at = first + c * plane
        t = tl.load(target + at, live, other=0.0).to(tl.float32)
        df = tl.load(fg + at, live, other=0.0).to(tl.float32) - t
        db = tl.load(bg + at, live, other=0.0).to(tl.float32) - t
        tl.store(d_fg + at, 2 * scale * mask * df, live)
        tl.store(d_bg + at, 2 * scale * (1 - mask) * db, live)
        difference += df * df - db * db
    tl.store(d_logits + pixel, scale * mask * (1 - mask) * difference, live)


def _sum(launch: Callable[[Tensor, bool], None], programs: int, like: Tensor, atomic: bool) -> Tensor:
    """The sum over programs of what the kernel hands to :func:`_finish`."""
    make = torch.zeros if atomic else torch.empty
    out = make(1 if atomic else programs, dtype=torch.float32, device=like.device)
    launch(out, atomic)
    return out.sum()


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fg: Tensor,
        bg: Tensor,
        logits: Tensor,
        target: Tensor,
        factor: float,
        constant: float,
        atomic: bool,
    ) -> Tensor:
        pixels, plane, channels = logits.numel(), logits[0].numel(), fg.shape[1]
        grid = (triton.cdiv(pixels, BLOCK),)

        def launch(out: Tensor, atomic: bool) -> None:
            _masked_forward[grid](
                fg, bg, target, logits, out, pixels, plane, factor, constant,
                CHANNELS=channels, BLOCK=BLOCK, ATOMIC=atomic,
            )  # fmt: skip

        ctx.save_for_backward(fg, bg, logits, target)
        ctx.factor = factor
        return _sum(launch, grid[0], fg, atomic) / fg.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        fg, bg, logits, target = ctx.saved_tensors
        d_fg, d_bg, d_logits = (torch.empty_like(t) for t in (fg, bg, logits))
        pixels, plane = logits.numel(), logits[0].numel()
        _masked_backward[(triton.cdiv(pixels, BLOCK),)](
            fg, bg, target, logits, upstream, d_fg, d_bg, d_logits, pixels, plane, fg.shape[0], ctx.factor,
            CHANNELS=fg.shape[1], BLOCK=BLOCK,
        )  # fmt: skip
        return d_fg, d_bg, d_logits, None, None, None, None


# --- latents --------------------------------------------------------------------------------------
# KL = 1/2 sum(exp(logvar) - 1 - logvar + mu^2) / batch; z = mu + exp(logvar / 2) eps. Philox gives four
# normals at a time: a program takes four runs of BLOCK / 4 elements, one normal of each draw for each run.


@triton.jit
def _kl_forward(mu, logvar, out, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(mu + at, at < n, other=0.0).to(tl.float32)
    lv = tl.load(logvar + at, at < n, other=0.0).to(tl.float32)
    _finish(tl.sum(0.5 * (tl.exp(lv) - 1 - lv + m * m)), out, ATOMIC)  # 0 beyond n


@triton.jit
def _kl_backward(mu, logvar, upstream, d_mu, d_logvar, n, batch, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(upstream).to(tl.float32) / batch
    m = tl.load(mu + at, at < n, other=0.0).to(tl.float32)
    lv = tl.load(logvar + at, at < n, other=0.0).to(tl.float32)
    tl.store(d_mu + at, scale * m, at < n)
    tl.store(d_logvar + at, scale * 0.5 * (tl.exp(lv) - 1), at < n)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, atomic: bool) -> Tensor:
        grid = (triton.cdiv(mu.numel(), BLOCK),)

        def launch(out: Tensor, atomic: bool) -> None:
            _kl_forward[grid](mu, logvar, out, mu.numel(), BLOCK=BLOCK, ATOMIC=atomic)

        ctx.save_for_backward(mu, logvar)
        return _sum(launch, grid[0], mu, atomic) / mu.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        mu, logvar = ctx.saved_tensors
        d_mu, d_logvar = torch.empty_like(mu), torch.empty_like(logvar)
        n = mu.numel()
        _kl_backward[(triton.cdiv(n, BLOCK),)](
            mu, logvar, upstream, d_mu, d_logvar, n, mu.shape[0], BLOCK=BLOCK
        )
        return d_mu, d_logvar, None


@triton.jit
def _sample_run(mu, logvar, z, at, n, eps):
    """One run of z; returns the KL of its elements."""
    m = tl.load(mu + at, at < n, other=0.0).to(tl.float32)
    lv = tl.load(logvar + at, at < n, other=0.0).to(tl.float32)
    tl.store(z + at, m + tl.exp(0.5 * lv) * eps, at < n)
    return tl.sum(0.5 * (tl.exp(lv) - 1 - lv + m * m))


@triton.jit
def _sample_forward(mu, logvar, z, out, seed, n, BLOCK: tl.constexpr):
    run: tl.constexpr = BLOCK // 4
    lane = tl.arange(0, run)
    e0, e1, e2, e3 = tl.randn4x(seed, tl.program_id(0) * run + lane)
    at = tl.program_id(0).to(tl.int64) * BLOCK + lane
    total = _sample_run(mu, logvar, z, at, n, e0)
    total += _sample_run(mu, logvar, z, at + run, n, e1)
    total += _sample_run(mu, logvar, z, at + 2 * run, n, e2)
    total += _sample_run(mu, logvar, z, at + 3 * run, n, e3)
    tl.store(out + tl.program_id(0), total)


@triton.jit
def _sample_backward_run(mu, logvar, d_z, d_mu, d_logvar, at, n, eps, scale):
    m = tl.load(mu + at, at < n, other=0.0).to(tl.float32)
    lv = tl.load(logvar + at, at < n, other=0.0).to(tl.float32)
    dz = tl.load(d_z + at, at < n, other=0.0).to(tl.float32)
    tl.store(d_mu + at, dz + scale * m, at < n)
    tl.store(d_logvar + at, 0.5 * (dz * tl.exp(0.5 * lv) * eps + scale * (tl.exp(lv) - 1)), at < n)


@triton.jit
def _sample_backward(mu, logvar, d_z, d_kl, d_mu, d_logvar, seed, n, batch, BLOCK: tl.constexpr):
    run: tl.constexpr = BLOCK // 4
    lane = tl.arange(0, run)
    scale = tl.load(d_kl).to(tl.float32) / batch
    e0, e1, e2, e3 = tl.randn4x(seed, tl.program_id(0) * run + lane)
    at = tl.program_id(0).to(tl.int64) * BLOCK + lane
    _sample_backward_run(mu, logvar, d_z, d_mu, d_logvar, at, n, e0, scale)
    _sample_backward_run(mu, logvar, d_z, d_mu, d_logvar, at + run, n, e1, scale)
    _sample_backward_run(mu, logvar, d_z, d_mu, d_logvar, at + 2 * run, n, e2, scale)
    _sample_backward_run(mu, logvar, d_z, d_mu, d_logvar, at + 3 * run, n, e3, scale)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        n = mu.numel()
        z = torch.empty_like(mu)
        ctx.seed = int(torch.randint(2**31, ()))  # on the host: nothing to wait for
        out = torch.empty(triton.cdiv(n, SAMPLE_BLOCK), dtype=torch.float32, device=mu.device)
        _sample_forward[(len(out),)](mu, logvar, z, out, ctx.seed, n, BLOCK=SAMPLE_BLOCK)
        ctx.save_for_backward(mu, logvar)
        return z, out.sum() / mu.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_z: Tensor, d_kl: Tensor) -> tuple:
        mu, logvar = ctx.saved_tensors
        d_mu, d_logvar = torch.empty_like(mu), torch.empty_like(logvar)
        n = mu.numel()
        _sample_backward[(triton.cdiv(n, SAMPLE_BLOCK),)](
            mu, logvar, d_z, d_kl, d_mu, d_logvar, ctx.seed, n, mu.shape[0], BLOCK=SAMPLE_BLOCK
        )
        return d_mu, d_logvar


def _functions(atomic: bool) -> dict[str, Callable[..., Tensor]]:
    gaussian = (0.5 / SCALE**2, math.log(SCALE * math.sqrt(2 * math.pi)))
    return {
        "masked squared_error": lambda *images: _Masked.apply(*images, 1.0, 0.0, atomic),
        "masked squared_error, forward": lambda *images: _Masked.apply(*images, 1.0, 0.0, atomic),
        "masked gaussian": lambda *images: _Masked.apply(*images, *gaussian, atomic),
        "gaussian_kl": lambda mu, logvar: _KL.apply(mu, logvar, atomic),
    }


FUNCTIONS: dict[str, Callable[..., Any]] = {**_functions(atomic=False), "sample_gaussian": _Sample.apply}
ATOMIC_FUNCTIONS = _functions(atomic=True)
