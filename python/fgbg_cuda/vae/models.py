"""The layered VAE: one flat-toned object of limited extent in front of a smooth background."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fgbg_cuda

Gaussian = tuple[Tensor, Tensor]  # (mu, logvar) of a diagonal Gaussian


class LayeredOutput(NamedTuple):
    """What the decoders say about a batch, and what the latents cost (nats per image)."""

    foreground: Tensor  # [B, C, H, W] mean of the foreground layer
    background: Tensor  # [B, C, H, W] mean of the background layer
    mask_logits: Tensor  # [B, 1, H, W] prior log-odds, given the latents, that the object is here
    kl_fg: Tensor  # [B]
    kl_bg: Tensor  # [B]


class Separation(NamedTuple):
    """The layers found in a batch of images, all [B, C or 1, H, W]."""

    foreground: Tensor
    background: Tensor
    mask: Tensor  # posterior probability that the pixel shows the foreground
    composite: Tensor  # mask * foreground + (1 - mask) * background


def conv(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, GroupNorm, SiLU; keeps the size."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())


def halve(inputs: int, outputs: int) -> nn.Sequential:
    """4x4 convolution with stride 2, GroupNorm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()
    )


def coordinates(height: int, width: int, like: Tensor) -> Tensor:
    """Pixel centres (y, x) in units of half the image side: [2, height, width] in (-1, 1)."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))


def draw_seed() -> int:
    """A seed from torch's CPU generator, with room above it for the streams of a model's latents."""
    return int(torch.randint(2**62, ()))


def sample_latent(q: Gaussian, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """A sample of q, [B, *D], and its KL in nats, [B], for images ``first``, first + 1, ... of a batch."""
    mu, logvar = q
    offset = first * mu.shape[1:].numel()
    return fgbg_cuda.sample_gaussian(mu, logvar, seed=seed, offset=offset, reduction="sample")


class Attention(nn.Module):
    """One map of weights over pixels, softmax-normalised, from fine and coarse features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(2 * width, width, 1)
        self.score = nn.Sequential(conv(width, 16), nn.Conv2d(16, 1, 1))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:  # -> [B, 1, h * w]
        lifted = F.interpolate(self.coarse(coarse), size=fine.shape[-2:])
        return self.score(fine + lifted).flatten(2).softmax(-1)


class ForegroundEncoder(nn.Module):
    """q(shape, tone, centre | x): three diagonal Gaussians from one convolutional trunk.

    ``forward(x)`` with x [B, C, H, W] (H, W multiples of 8) returns (mu, logvar) pairs
    ``shape`` [B, latents, H/8, W/8], ``tone`` [B, 2] and ``centre`` [B, 2].
    """

    def __init__(self, channels: int = 1, latents: int = 8, width: int = 32) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.PixelUnshuffle(2), conv(4 * channels, width), conv(width, width))
        self.coarse = nn.Sequential(
            halve(width, 2 * width),
            conv(2 * width, 2 * width),
            halve(2 * width, 2 * width),
            conv(2 * width, 2 * width),
        )
        self.shape = nn.Conv2d(2 * width, 2 * latents, 1)
        self.tone_attention = Attention(width)
        self.tone = nn.Linear(width + 4 * channels, 4)
        self.centre_attention = Attention(width)
        self.centre_logvar = nn.Parameter(torch.full((1, 2), -6.0))

    def forward(self, x: Tensor) -> tuple[Gaussian, Gaussian, Gaussian]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        mu, logvar = self.shape(coarse).chunk(2, dim=1)
        # The pixels themselves go along with the features: GroupNorm has taken the absolute gray
        # level out of the features, and the tone is just that.
        pixels = 4 * F.pixel_unshuffle(x - 0.5, 2)
        weights = self.tone_attention(fine, coarse)
        pooled = (torch.cat([fine, pixels], dim=1).flatten(2) * weights).sum(-1)
        tone = self.tone(pooled).chunk(2, dim=1)
        weights = self.centre_attention(fine, coarse)[:, 0]
        centre = weights @ coordinates(*fine.shape[-2:], like=x).flatten(1).t()
        # Bounded, so that the first steps cannot overflow exp(logvar).
        return (
            (mu, logvar.clamp(-8, 4)),
            tone,
            (centre, self.centre_logvar.expand_as(centre)),
        )


class ForegroundDecoder(nn.Module):
    """p(mask, foreground | shape, tone, centre): an object of one tone inside a round window.

    The mask's log-odds are those of a convolutional decoder minus 4 (d / extent)^4, d being the
    distance from the centre: the object is compact, while its position stays free.
    """

    def __init__(self, channels: int = 1, latents: int = 8, width: int = 32, extent: float = 0.65) -> None:
        super().__init__()
        self.extent = extent  # radius of the window, in units of half the image side
        self.low = nn.Sequential(conv(latents, 2 * width), conv(2 * width, 2 * width))
        self.mid = conv(2 * width, width)
        self.high = nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2))
        self.tone = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, channels))
        # Where training starts decides which layer is which: a small object, brighter than the
        # scene. Started at mid-gray, the flat tone settles on the most common gray of the texture.
        nn.init.constant_(self.high[0].bias, -3.0)
        nn.init.constant_(self.tone[-1].bias, 1.7)

    def forward(self, shape: Tensor, tone: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        h = F.interpolate(self.low(shape), scale_factor=2)
        logits = self.high(F.interpolate(self.mid(h), scale_factor=2))
        grid = coordinates(*logits.shape[-2:], like=logits)
        distance2 = (grid - centre[:, :, None, None]).square().sum(1, keepdim=True)
        logits = logits - 4 * (distance2 / self.extent**2).square()
        flat = torch.sigmoid(self.tone(tone))[:, :, None, None]
        return flat.expand(-1, -1, *logits.shape[-2:]), logits


class BackgroundEncoder(nn.Module):
    """q(z_bg | x): x [B, C, H, W] -> (mu, logvar), each [B, latents, H/cell, W/cell]; see the decoder."""

    def __init__(self, channels: int = 1, latents: int = 2, cell: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.AvgPool2d(cell // 4),  # it has no use for detail that its decoder cannot draw
            conv(channels, 16),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 2 * latents, 3, padding=1),
        )
        self.cell = cell

    def forward(self, x: Tensor) -> Gaussian:
        if x.shape[-2] % self.cell or x.shape[-1] % self.cell:
            raise ValueError(
                f"x is {x.shape[-2]} x {x.shape[-1]}, expected multiples of bg_cell, {self.cell}"
            )
        mu, logvar = self.net(x).chunk(2, dim=1)
        return mu, logvar


class BackgroundDecoder(nn.Module):
    """p(background | z_bg): drawn at 1/cell of the resolution and interpolated, so objects do not fit.

    z_bg [B, latents, H/cell, W/cell] -> [B, C, H, W]. ``cell``, 8, 16 or 32 pixels, is to be larger than what
    is not to fit: a stroke with the default of 8, a whole cell nucleus of 25 pixels with 32.
    """

    def __init__(self, channels: int = 1, latents: int = 2, cell: int = 8) -> None:
        super().__init__()
        if cell not in (8, 16, 32):
            raise ValueError(f"bg_cell is {cell}, expected 8, 16 or 32")
        self.cell = cell
        self.net = nn.Sequential(conv(latents, 16), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        low = self.net(z)
        return torch.sigmoid(F.interpolate(low, scale_factor=self.cell, mode="bilinear"))


class LayeredVAE(nn.Module):
    r"""Unsupervised separation of an image into foreground, background and mask.

    Generative model, with every latent a priori N(0, 1):

    - ``z_fg`` = (shape, tone, centre): shape and centre give the log-odds ``l`` of a mask, tone the
      gray level(s) of the object, one for the whole object;
    - ``z_bg``: a smooth background ``bg``;
    - each pixel i belongs to the object, m_i ~ Bernoulli(sigmoid(l_i)), and shows
      x_i ~ N(fg, fg_scale^2) where m_i = 1, x_i ~ N(bg_i, bg_scale^2) where m_i = 0.

    What tells the layers apart: the object is flat in tone (``fg_scale`` is small and fixed),
    compact and cheap to describe; the background is anything, coarsely drawn (``bg_scale`` is
    learned and takes up the texture). The masks m are summed out exactly, so the negative ELBO is

    .. math::
        -\sum_i \log\big(\sigma(l_i) N(x_i; fg, s_{fg}^2) + \sigma(-l_i) N(x_i; bg_i, s_{bg}^2)\big)
        + KL(q(z_{fg}|x) \| N(0,1)) + KL(q(z_{bg}|x) \| N(0,1))

    in nats per image, the sums over pixels and latents. (A factorised q(m | x) with a Bernoulli KL
    against sigmoid(l) has this sum as its optimum, reached at the exact posterior, which
    :meth:`separate` returns as the mask.)

    Args:
        channels: C of the images.
        fg_latents, bg_latents: latent channels per cell of the H/8 x W/8 and H/bg_cell x W/bg_cell grids.
        width: channels of the default foreground networks.
        bg_cell: pixels to a cell of the background, see :class:`BackgroundDecoder`; H, W are multiples of it.
        fg_scale: standard deviation of a foreground pixel: sensor noise plus edge pixels.
        fg_encoder, fg_decoder, bg_encoder, bg_decoder: your own networks, with the signatures of
            the classes in this file (the foreground encoder may return any number of Gaussians;
            the decoder gets one sample of each).
    """

    def __init__(
        self,
        channels: int = 1,
        fg_latents: int = 8,
        bg_latents: int = 2,
        width: int = 32,
        fg_scale: float = 0.035,
        bg_cell: int = 8,
        fg_encoder: nn.Module | None = None,
        fg_decoder: nn.Module | None = None,
        bg_encoder: nn.Module | None = None,
        bg_decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.fg_encoder = fg_encoder or ForegroundEncoder(channels, fg_latents, width)
        self.fg_decoder = fg_decoder or ForegroundDecoder(channels, fg_latents, width)
        self.bg_encoder = bg_encoder or BackgroundEncoder(channels, bg_latents, bg_cell)
        self.bg_decoder = bg_decoder or BackgroundDecoder(channels, bg_latents, bg_cell)
        self.register_buffer("fg_scale", torch.full((channels,), fg_scale))
        self.log_bg_scale = nn.Parameter(torch.full((channels,), math.log(0.14)))

    def forward(
        self, x: Tensor, sample: bool = True, seed: int | None = None, first: int = 0
    ) -> LayeredOutput:
        """Encode and decode x [B, C, H, W], from samples of the latents or from their means.

        The noise of an image follows from ``seed`` (default: drawn from torch's generator) and from its
        place in the batch. If x is a part of a batch, ``first`` is the place of its first image in the whole.
        """
        posteriors = self.encode(x)
        if not sample:
            z = [mu for mu, _ in posteriors]
            kl = [fgbg_cuda.gaussian_kl(*q, reduction="sample") for q in posteriors]
        else:
            seed = draw_seed() if seed is None else seed
            z, kl = zip(*(sample_latent(q, seed + k, first) for k, q in enumerate(posteriors)), strict=True)
        foreground, mask_logits = self.fg_decoder(*z[:-1])
        return LayeredOutput(foreground, self.bg_decoder(z[-1]), mask_logits, sum(kl[:-1]), kl[-1])

    def encode(self, x: Tensor) -> tuple[Gaussian, ...]:
        """The posteriors of x [B, C, H, W]: those of the foreground, then that of the background."""
        return (*self.fg_encoder(x), self.bg_encoder(x))

    def decode(self, *z: Tensor) -> Separation:
        """The layers that latents make, one [B, ...] for each posterior; the mask is the prior one."""
        foreground, mask_logits = self.fg_decoder(*z[:-1])
        background, mask = self.bg_decoder(z[-1]), torch.sigmoid(mask_logits)
        return Separation(foreground, background, mask, mask * foreground + (1 - mask) * background)

    def reconstruction(self, out: LayeredOutput, x: Tensor) -> Tensor:
        """Negative log-likelihood of x [B, C, H, W] under the two layers, in nats: [B]."""
        return fgbg_cuda.mixture_reconstruction_loss(
            out.foreground,
            out.background,
            x,
            mask_logits=out.mask_logits,
            likelihood="gaussian",
            fg_scale=self.fg_scale,
            bg_scale=self.log_bg_scale.exp(),
            reduction="sample",
        )

    @torch.no_grad()
    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, C, H, W], from the posterior means of the latents."""
        out = self(x, sample=False)
        # The responsibility of the foreground: prior log-odds plus log p(x | fg) - log p(x | bg).
        evidence = self._nats(out.background, x, self.log_bg_scale.exp()) - self._nats(
            out.foreground, x, self.fg_scale
        )
        mask = torch.sigmoid(out.mask_logits + evidence)
        composite = mask * out.foreground + (1 - mask) * out.background
        return Separation(out.foreground, out.background, mask, composite)

    @staticmethod
    def _nats(layer: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """-log p(x | layer) of each pixel, channels joint: [B, 1, H, W]."""
        return fgbg_cuda.masked_reconstruction_loss(
            layer, None, x, mask=torch.ones_like(x[:, :1]), fg_scale=scale, reduction="none"
        ).sum(1, keepdim=True)
