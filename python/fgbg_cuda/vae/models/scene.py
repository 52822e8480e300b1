"""A scene model for movies of a camera that stands still: opaque objects over one background."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fgbg_cuda

from ..errors import InputError, at_least, positive, whole
from .layered import Latent, Separation, draw_latent, draw_seed
from .local_tones import SPREAD
from .smoothing import smooth_mask

STRIDE = 8  # of the foreground's grid of latents, and of the pixels that say how bright the scene is
LEAST_NOISE = 0.025  # standard deviation; less is not known of 8 bits that were compressed
ROUNDS = 2  # in which the background is found anew without the objects in front of it
LEAST_SEEN = 0.15  # of the frames, for a pixel's background to be taken from those that show it
PIXELS_AT_ONCE = 2**19  # of frames whose masks are made together
MOST_LOG_ODDS = 3.0  # of the decoded mask: what training hardly ever saw may still be foreground


def spread_of(x: Tensor) -> Tensor:
    """The standard deviation along the first dimension of x that outliers hardly change: of a Gaussian's."""
    return SPREAD * (x - x.median(0).values).abs().median(0).values


def check_place(x: Tensor, known: Tensor) -> None:
    """Refuses frames [B, C, H, W] of another shape than that of what is known of the scene, [C, H, W]."""
    if x.shape[1:] != known.shape:
        got, expected = (" x ".join(map(str, shape)) for shape in (x.shape[1:], known.shape))
        raise InputError(f"the frames are {got}, but the model knows a scene of {expected} (C x H x W)")


def check_start(frames: Tensor, known: Tensor, least: int) -> None:
    """Refuses frames [N, C, H, W] to start a model of a scene [C, H, W] from, if fewer than ``least``."""
    check_place(frames, known)
    if len(frames) < least:
        raise InputError(
            f"the movie has {len(frames)} frames to start from (those held out not counted), "
            f"expected at least {least}"
        )


class SceneOutput(NamedTuple):
    """What the model says about a batch, and what the latents cost (nats per image)."""

    x: Tensor  # [B, C, H, W] the frames, or the windows of them that all of this is about
    foreground: Tensor  # [B, C, H, W] the tone of what is in front
    background: Tensor  # [B, C, H, W]
    mask_logits: Tensor  # [B, 1, H, W] log-odds, given the latents, that the foreground is here
    nats: Tensor  # [B, 1, H, W] -log p(x | background) of each pixel; that of the foreground is 0
    kl_fg: Tensor  # [B]
    kl_bg: Tensor  # [B], 0: the background has no latents that are inferred
    z_fg: tuple[Latent, ...]  # one map, [B, latents, H / 8, W / 8]
    z_bg: tuple[Latent, ...]  # none


class SceneVAE(nn.Module):
    r"""Objects that move, hide what is behind them, and may be brighter or darker than it.

    Of a movie with values in [0, 1]:

    - The background is :math:`b = \mu + \sum_k z_k U_k`: ``mean`` is at first the median of the frames, ``U``
      the ``rank`` largest principal components of what is left, clipped so that objects hardly count. Both,
      and the noise, are then found twice more, without the pixels that are foreground by these. z is not
      encoded but solved for each frame, by least squares that give outliers little weight
      (:meth:`background`), with z ~ N(0, t^2) a priori: t is found in the movie, from the median absolute
      deviation of z. So what differs in less than half of the frames, as an object that stops does, is no
      change of the background.
    - A pixel of the background is :math:`(1 - \epsilon) N(x; b, \sigma^2) + \epsilon`, with a :math:`\sigma`
      of its own, the standard deviation over the frames that show it: leaves that move have a larger one. Of
      the foreground, which may look like anything, it is uniform in [0, 1]: log p = 0.
    - The foreground has a grid of latents, one vector for 8 x 8 pixels, z ~ N(0, 1), decoded to log-odds l of
      the mask. Each pixel is a mixture of the two, :math:`-\log(\sigma(l) + \sigma(-l) e^{-n})`, whose
      evidence n is -log p(x | b) after neighbours that look alike have agreed on it (:meth:`evidence`).
    - Beside it a tone of the foreground is learned, for what training shows.

    The loss adds KL(q(z|x) || N(0, 1)) and ``mask_weight`` KL(Ber(sigmoid(l)) || Ber(``mask_prior``)).

    The mask that :meth:`separate` returns is the posterior of a pixel given its own evidence, and given that
    neighbours which look alike belong together: :func:`~fgbg_cuda.vae.models.smoothing.smooth_mask`.

    Call :meth:`start` before training.

    Args:
        shape: (C, H, W) of the frames; the background is known at these places alone.
        rank: how many ways the background has to change, such as the light.
        width: channels of the networks at half the resolution.
        latents: at each place of the foreground's grid.
        outliers: :math:`\epsilon`, the share of background pixels that may have any value.
        mask_prior: how much of a frame the foreground is expected to cover.
        mask_weight: of the KL of the masks.

    Raises:
        InputError: naming the option, what it got, and what it takes.
    """

    one_scene = True  # it separates frames of that size alone, as wholes

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 120, 160),
        rank: int = 2,
        width: int = 16,
        latents: int = 4,
        outliers: float = 0.002,
        mask_prior: float = 0.05,
        mask_weight: float = 0.2,
    ) -> None:
        super().__init__()
        at_least(0, mask_weight=mask_weight)
        whole(0, rank=rank)
        whole(1, width=width, latents=latents)
        positive(outliers=outliers, mask_prior=mask_prior)
        if not max(outliers, mask_prior) < 1:
            raise InputError(f"outliers is {outliers} and mask_prior {mask_prior}, expected less than 1")
        channels = shape[0]
        self.outliers = outliers
        self.mask_prior, self.mask_weight = mask_prior, mask_weight
        self.mean = nn.Parameter(torch.zeros(shape))
        self.components = nn.Parameter(torch.zeros(rank, *shape))
        self.register_buffer("spread", torch.ones(rank))
        self.register_buffer("noise", torch.ones(shape))
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            _conv(12 * channels, width),
            _halve(width, wide),
            _conv(wide, wide),
            _halve(wide, wide),
            _conv(wide, wide),
            nn.Conv2d(wide, 2 * latents, 1),
        )
        self.decoder = nn.Sequential(_conv(latents, wide), nn.Upsample(scale_factor=2), _conv(wide, wide))
        self.mask = nn.Sequential(
            nn.Upsample(scale_factor=2),
            _conv(wide, width),
            nn.Conv2d(width, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.tone = nn.Sequential(
            nn.Upsample(scale_factor=2),
            _conv(wide, width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        nn.init.constant_(self.mask[2].bias, -3.0)  # nothing is foreground until it has been seen to be

    @property
    def least_frames(self) -> int:
        """How few frames tell a background with ``rank`` ways to change."""
        return len(self.components) + 2

    @torch.no_grad()
    def start(self, frames: Tensor) -> None:
        """The background and its noise, from frames [N, C, H, W] spread over the movie.

        Raises:
            InputError: they have another shape than the model, or are fewer than :attr:`least_frames`.
        """
        check_start(frames, self.mean, self.least_frames)
        self._estimate(frames)
        for _ in range(ROUNDS):
            behind = torch.cat([smooth_mask(self._unseen(part), part) for part in _parts(frames)]) < 0.5
            # Where something is nearly always in front, that is all that is known of the background.
            self._estimate(frames, behind | (behind.float().mean(0) < LEAST_SEEN))

    def _estimate(self, frames: Tensor, behind: Tensor | None = None) -> None:
        """The background and its noise, from the pixels [N, 1, H, W] that are ``behind`` all objects or, as
        long as these are not known, by medians that objects hardly change.
        """
        if behind is None:
            self.mean.copy_(frames.median(0).values)
            rest = frames - self.mean
        else:
            hidden = torch.cat([self.background(part) for part in _parts(frames)])
            self.mean.copy_(torch.where(behind, frames, torch.nan).nanmedian(0).values)
            rest = torch.where(behind, frames, hidden) - self.mean
        if len(self.components):
            most = 4 * SPREAD * rest.abs().median().clamp(min=1e-3)
            rest = rest.clamp(-most, most).flatten(1)
            # Principal components by way of the frames, of which there are fewer than pixels.
            _, vectors = torch.linalg.eigh(rest @ rest.T)
            main = F.normalize(vectors[:, -len(self.components) :].T @ rest, dim=1)
            self.components.copy_((rest @ main.T).std(0)[:, None, None, None] * main.view_as(self.components))
            self.spread.fill_(torch.inf)  # z as the frames have it
            z = self._changes(frames - self.mean)
            self.spread.copy_(spread_of(z))
        # In parts: the movie may be large.
        rest = torch.cat([part - self.background(part) for part in _parts(frames)])
        if behind is None:
            noise = spread_of(rest)
        else:  # leaves in the wind differ rarely, but then by much: a median would not know
            count = behind.sum(0)
            rest = torch.where(behind, rest - (rest * behind).sum(0) / count, 0)
            noise = (rest.square().sum(0) / count).sqrt()
        # Of a pixel's own deviation little is known from some hundred frames: a part of all pixels' is added.
        self.noise.copy_((0.7 * noise**2 + 0.3 * noise.median() ** 2).sqrt().clamp(min=LEAST_NOISE))

    def background(self, x: Tensor) -> Tensor:
        """The background of frames [B, C, H, W], the parts that objects hide included."""
        if not len(self.components):
            return self.mean.expand_as(x)
        return self.mean + torch.einsum("bk,kchw->bchw", self._changes(x - self.mean), self.components)

    @torch.no_grad()
    def _changes(self, rest: Tensor) -> Tensor:
        """z [B, rank] of what differs from the mean [B, C, H, W].

        Iteratively reweighted least squares on means of 8 x 8 pixels, with Cauchy's weights 1 / (1 + (r /
        2.5 s)^2), s from the median of the residuals' magnitudes (Holland & Welsch, 1977), and z's prior.
        """
        u, seen = _pooled(self.components), _pooled(rest)
        # Keeps what pooling has left nothing of out of z; above 0 even where all frames are equal.
        least = (1e-3 * u.square().sum(1).mean()).clamp(min=1e-12)
        z = u.new_zeros(len(rest), len(u))
        for _ in range(5):
            left = seen - z @ u
            scale = SPREAD * left.abs().median(1, keepdim=True).values + 1e-4
            weighted = u / (1 + (left / (2.5 * scale)) ** 2)[:, None]
            ridge = torch.diag_embed(least + scale**2 / self.spread.square().clamp(min=1e-12))
            z = torch.linalg.solve(weighted @ u.T + ridge, (weighted @ seen[..., None])[..., 0])
        return z

    def forward(
        self,
        x: Tensor,
        sample: bool = True,
        seed: int | None = None,
        first: int = 0,
        window: int | None = None,
    ) -> SceneOutput:
        """Encode and decode x [B, C, H, W]: as :meth:`LayeredVAE.forward`.

        ``window``: of frames with a longer side, a square of this side is taken in place of the whole, at a
        place that follows from ``seed`` and the frame's number. (z of the background is that of the whole.)
        """
        check_place(x, self.mean)
        if sample and seed is None:
            seed = draw_seed()
        background, noise = self.background(x), self.noise
        if window is not None and max(x.shape[-2:]) > window:
            noise = noise.expand_as(x)
            x, background, noise = _windows((x, background, noise), window, seed or 0, first)
        nats = self._nats(x, background, noise)
        behind = background.detach()
        seen = torch.cat([((x - behind) / noise).clamp(-20, 20) / 5, 4 * (x - behind), 2 * x - 1], dim=1)
        height, width = x.shape[-2:]
        seen = F.pad(seen, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        mu, logvar = self.encoder(seen).chunk(2, dim=1)
        # Bounded, so that the first steps cannot overflow exp(logvar).
        latent, kl = draw_latent(mu, logvar.clamp(-8, 4), seed if sample else None, first)
        features = self.decoder(latent.z)
        logits, tone = (net(features)[..., :height, :width] for net in (self.mask, self.tone))
        logits = MOST_LOG_ODDS * torch.tanh(logits / MOST_LOG_ODDS)
        return SceneOutput(
            x, torch.sigmoid(2 * tone), background, logits, nats, kl, torch.zeros_like(kl), (latent,), ()
        )

    def _unseen(self, x: Tensor) -> Tensor:
        """The log-odds of the masks where nothing is known but a pixel and the background."""
        return self._nats(x, self.background(x), self.noise) - MOST_LOG_ODDS

    def _nats(self, x: Tensor, background: Tensor, noise: Tensor) -> Tensor:
        """-log p(x | background) of each pixel, channels joint: [B, 1, H, W]."""
        gaussian = fgbg_cuda.reconstruction_loss(
            background, x, likelihood="gaussian", scale=noise, reduction="none"
        ).sum(1, keepdim=True)
        outlier = torch.full_like(gaussian, math.log(self.outliers))
        return -torch.logaddexp(math.log1p(-self.outliers) - gaussian, outlier)

    def evidence(self, out: SceneOutput) -> Tensor:
        """Nats for the foreground at each pixel: [B, 1, H, W].

        Neighbours' own evidence, ``out.nats``, is not independent, and around an object it is weak. So the
        value is the log-odds of the random field that also makes the masks (:func:`smooth_mask`); the
        gradient, by which the background learns, is that of a pixel's own.
        """
        with torch.no_grad():
            agreed = torch.logit(smooth_mask(out.nats, out.x), eps=1e-3).clamp(max=-math.log(self.outliers))
        return out.nats + (agreed - out.nats).detach()

    def reconstruction(self, out: SceneOutput, evidence: Tensor) -> Tensor:
        """-log p(x | z) in nats: [B]."""
        logits = out.mask_logits
        nats = -torch.logaddexp(F.logsigmoid(logits), F.logsigmoid(-logits) - evidence)
        return nats.flatten(1).sum(1)

    def tone_loss(self, out: SceneOutput, evidence: Tensor) -> Tensor:
        """What the tone misses of the pixels that are foreground: [B]."""
        posterior = torch.sigmoid(out.mask_logits + evidence).detach()
        return fgbg_cuda.masked_reconstruction_loss(
            out.foreground,
            None,
            out.x,
            mask=posterior,
            likelihood="gaussian",
            fg_scale=0.1,
            reduction="sample",
        )

    def mask_kl(self, out: SceneOutput) -> Tensor:
        """KL of the masks against ``mask_prior`` in nats, times its weight: [B]."""
        prior = math.log(self.mask_prior / (1 - self.mask_prior))
        return self.mask_weight * fgbg_cuda.bernoulli_kl(out.mask_logits, prior, reduction="sample")

    @torch.no_grad()
    def scene_pictures(self) -> dict[str, Tensor]:
        """What is known of the scene, images [C, H, W] in [0, 1] by name: the background, the noise of its
        pixels (white is the largest), and the background where each z is two standard deviations off."""
        pictures = {"background": self.mean, "noise": self.noise / self.noise.max()}
        for k, (component, spread) in enumerate(zip(self.components, self.spread, strict=True)):
            for side, sign in ((-2, "-"), (2, "+")):
                pictures[f"z[{k}] = {sign}2 std"] = self.mean + side * spread * component
        return {name: picture.clamp(0, 1) for name, picture in pictures.items()}

    @torch.no_grad()
    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, C, H, W], from the posterior means of the latents.

        The foreground is what is in front, on black: the image times its mask.
        """
        return Separation(
            *(torch.cat(layers) for layers in zip(*map(self._separate, _parts(x)), strict=True))
        )

    def _separate(self, x: Tensor) -> Separation:
        out = self(x, sample=False)
        mask = smooth_mask(out.mask_logits + out.nats, x)
        shown = mask * out.foreground + (1 - mask) * out.background
        return Separation(mask * x, out.background.clamp(0, 1), mask, shown.clamp(0, 1))


def _parts(frames: Tensor) -> tuple[Tensor, ...]:
    """Frames [N, C, H, W], a few at a time: whatever is made of them, a movie's would not fit into memory."""
    return frames.split(max(1, PIXELS_AT_ONCE // frames.shape[-2:].numel()))


def _windows(layers: tuple[Tensor, ...], side: int, seed: int, first: int) -> list[Tensor]:
    """A square of each image of each layer [B, C, H, W], at one place in all layers; all of H or W where that
    is shorter. ``first`` is the number of the first image.
    """
    spans = layers[0].shape[-2:]
    places = []
    for k in range(len(layers[0])):
        rng = np.random.default_rng([seed, first + k])
        starts = [rng.integers(max(0, span - side) + 1) for span in spans]
        places.append(tuple(slice(start, start + side) for start in starts))
    return [
        torch.stack([image[:, y, x] for image, (y, x) in zip(layer, places, strict=True)]) for layer in layers
    ]


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.SiLU())


def _halve(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.SiLU())


def _pooled(x: Tensor) -> Tensor:
    """The means of 8 x 8 pixels of x [N, C, H, W]: [N, all of them]."""
    return F.avg_pool2d(x, STRIDE, ceil_mode=True, count_include_pad=False).flatten(1)
