"""The layered VAE: a foreground and a background, each with latents of its own, in one image."""

from __future__ import annotations

import math
import pkgutil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fgbg_cuda

from ..errors import InputError, positive
from .local_tones import local_tones
from .networks import Gaussian, Networks
from .object_networks import ObjectNetworks

COMPOSITIONS = ("mixture", "masked", "blended")
LIKELIHOODS = ("gaussian", "laplace", "bernoulli")
DARK = 0.1  # no lower: the darkest pixels are where the decoder overshoots, beside a bright object


class Latent(NamedTuple):
    """A sample of q(z | x), or its mean, and the diagonal Gaussian that it comes from: all [B, ...]."""

    z: Tensor
    mu: Tensor
    logvar: Tensor


def draw_seed() -> int:
    """A seed from torch's CPU generator, with room above it for the streams of a model's latents."""
    return int(torch.randint(2**62, ()))


def draw_latent(mu: Tensor, logvar: Tensor, seed: int | None, first: int) -> tuple[Latent, Tensor]:
    """A sample of q(z | x), or its mean if ``seed`` is None, and the KL to N(0, 1) in nats, [B].

    The batch may be a part of a larger one: its images get the noise that they have in the whole, where
    ``first`` is the place of the first of them.
    """
    if seed is None:
        return Latent(mu, mu, logvar), fgbg_cuda.gaussian_kl(mu, logvar, reduction="sample")
    offset = first * mu.shape[1:].numel()
    z, kl = fgbg_cuda.sample_gaussian(mu, logvar, seed=seed, offset=offset, reduction="sample")
    return Latent(z, mu, logvar), kl


def quantile(x: Tensor, q: float, dim: int) -> Tensor:
    """As torch's own, which takes neither bfloat16 nor float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).quantile(q, dim).to(x.dtype)


class LayeredOutput(NamedTuple):
    """What the decoders say about a batch, and what the latents cost (nats per image)."""

    foreground: Tensor  # [B, C, H, W] what a pixel of the foreground shows: a mean, or logits if Bernoulli
    background: Tensor  # [B, C, H, W] the same of the background
    mask_logits: Tensor  # [B, 1, H, W] log-odds, given the latents, that the foreground is here
    kl_fg: Tensor  # [B]
    kl_bg: Tensor  # [B]
    z_fg: tuple[Latent, ...]
    z_bg: tuple[Latent, ...]


class Separation(NamedTuple):
    """The layers found in a batch of images, all [B, C or 1, H, W]."""

    foreground: Tensor  # what is in front, on black; if additive, the image that it makes by itself
    background: Tensor
    mask: Tensor  # posterior probability that the pixel shows the foreground; its opacity if blended
    composite: Tensor  # the image that the layers make


class LayeredVAE(nn.Module):
    r"""Unsupervised separation of an image into foreground, background and mask.

    Generative model, with every latent a priori N(0, 1):

    - ``z_fg``, decoded to the log-odds ``l`` of a mask and to what a foreground pixel shows, ``fg``;
    - ``z_bg``, decoded to what a background pixel shows, ``bg``;
    - an image x, made of the two by the ``composition``. With p(x | fg) the pixel likelihood and
      :math:`\sigma` the sigmoid:

      - ``"mixture"``: each pixel i belongs to the foreground, m_i ~ Bernoulli(sigmoid(l_i)), or not, and the
        masks are summed out exactly: :math:`\sum_i \log(\sigma(l_i) p(x_i|fg_i) + \sigma(-l_i) p(x_i|bg_i))`.
        (A factorised q(m | x) with a Bernoulli KL against sigmoid(l) has this sum as its optimum, reached
        at the exact posterior, which :meth:`separate` returns as the mask.)
      - ``"masked"``: the masks are latents with q(m_i | z) = Bernoulli(sigmoid(l_i)):
        :math:`\sum_i \sigma(l_i) \log p(x_i|fg_i) + \sigma(-l_i) \log p(x_i|bg_i)` minus
        KL(q(m) || Bernoulli(``mask_prior``)).
      - ``"blended"``: :math:`\log p(x | \sigma(l) fg + \sigma(-l) bg)`, the mask being an opacity.

    The negative ELBO, in nats per image, is minus that plus KL(q(z_fg|x) || N(0,1)) +
    KL(q(z_bg|x) || N(0,1)). What tells the layers apart are the networks. The default ones are for an object
    that is flat in tone (``fg_scale`` is small), compact and cheap to describe, while the
    background is anything, coarsely drawn (``bg_scale`` is learned and takes up the texture).

    Images of any size are taken: they are padded with their border pixels to what the networks take, and the
    layers are cut to the images again.

    Args:
        shape: (C, H, W) of the images. (Of the networks that come along, those for cells alone ask for H, W.)
        networks: :class:`ObjectNetworks`, :class:`CellNetworks`, or your own :class:`Networks`.
        composition: "mixture", "masked" or "blended".
        likelihood: of a pixel: "gaussian", "laplace", or "bernoulli", for which the decoders give logits and
            there are no scales.
        additive: the foreground adds to the background (fluorescence does) in place of hiding it: the
            decoder's foreground is what it adds, to the mean or to the logits.
        explain_away: the foreground encoder sees not x but what the background leaves unexplained,
            (x - E[x | bg]) / std[x | bg], so that z_fg need not carry what z_bg does.
        mask_prior: prior probability of the foreground; "masked" needs one; "blended" may have one, which
            then is a penalty (still a bound, less tight).
        fg_scale: standard deviation (Laplace: diversity) of a foreground pixel: sensor noise plus edge
            pixels.
        learn_fg_scale: learn the foreground's scale too, one for each channel, from ``fg_scale`` on. It then
            no longer keeps texture out of the foreground; and where all of the foreground is one value, as
            saturated pixels are, it falls as long as training lasts.

    Raises:
        ValueError: naming the option, what it got, and what it takes.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 64, 64),
        networks: Networks = ObjectNetworks(),  # noqa: B008  (frozen)
        composition: str = "mixture",
        likelihood: str = "gaussian",
        additive: bool = False,
        explain_away: bool = False,
        mask_prior: float | None = None,
        fg_scale: float = 0.035,
        learn_fg_scale: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(networks, dict):  # of a checkpoint
            networks = pkgutil.resolve_name(networks["class_path"])(**networks["init_args"])
        if composition not in COMPOSITIONS:
            raise InputError(f"composition is {composition!r}, expected one of {', '.join(COMPOSITIONS)}")
        if likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood is {likelihood!r}, expected one of {', '.join(LIKELIHOODS)}")
        if mask_prior is not None and not 0 < mask_prior < 1:
            raise InputError(f"mask_prior is {mask_prior}, expected a probability between 0 and 1")
        if mask_prior is None and composition == "masked":
            raise InputError("mask_prior is None, but the composition 'masked' needs a prior of its masks")
        if mask_prior is not None and composition == "mixture":
            raise InputError("mask_prior: the composition 'mixture' has a prior already, decoded from z_fg")
        positive(fg_scale=fg_scale)
        if learn_fg_scale and (likelihood == "bernoulli" or composition == "blended"):
            kind = "likelihood 'bernoulli'" if likelihood == "bernoulli" else "composition 'blended'"
            raise InputError(f"learn_fg_scale: the {kind} has no scale of the foreground")
        self.composition, self.likelihood, self.mask_prior = composition, likelihood, mask_prior
        self.additive, self.explain_away = additive, explain_away
        self.target_fg_scale = fg_scale
        self.networks = networks
        self.size_multiple = networks.size_multiple
        channels, *size = shape
        self.channels = channels
        padded = (channels, *(side + -side % self.size_multiple for side in size))
        self.fg_encoder, self.fg_decoder, self.bg_encoder, self.bg_decoder = networks.build(
            padded, likelihood
        )
        self.has_scales = likelihood != "bernoulli"
        self.learn_fg_scale = learn_fg_scale
        if learn_fg_scale:
            self.log_fg_scale = nn.Parameter(torch.full((channels,), math.log(fg_scale)))
        elif self.has_scales:
            self.register_buffer("fixed_fg_scale", torch.full((channels,), fg_scale))
        if self.has_scales:
            self.log_bg_scale = nn.Parameter(torch.full((channels,), math.log(0.14)))

    @property
    def fg_scale(self) -> Tensor:
        """Standard deviation (Laplace: diversity) of a foreground pixel: [C]."""
        return self.log_fg_scale.exp() if self.learn_fg_scale else self.fixed_fg_scale

    @torch.no_grad()
    def set_fg_scale(self, value: float) -> None:
        """Sets it, for every channel; if it is learned, learning goes on from there."""
        if self.learn_fg_scale:
            self.log_fg_scale.fill_(math.log(value))
        else:
            self.fixed_fg_scale.fill_(value)

    @property
    def bg_scale(self) -> Tensor:
        """Standard deviation (Laplace: diversity) of a background pixel, learned: [C]."""
        return self.log_bg_scale.exp()

    def forward(
        self, x: Tensor, sample: bool = True, seed: int | None = None, first: int = 0
    ) -> LayeredOutput:
        """Encode and decode x [B, C, H, W], from samples of the latents or from their means.

        The noise of an image follows from ``seed`` (default: drawn from torch's generator) and from its
        place in the batch. If x is a part of a batch, ``first`` is the place of its first image in the whole.
        """
        if not sample:
            seed = None
        elif seed is None:
            seed = draw_seed()
        if x.shape[1] != self.channels:
            raise InputError(f"x has {x.shape[1]} channels, expected {self.channels} as in the model's shape")
        height, width = x.shape[-2:]
        below, beside = (-side % self.size_multiple for side in (height, width))
        if below or beside:
            x = F.pad(x, (0, beside, 0, below), mode="replicate")
        # The background has the noise of ``seed``, the foreground's latents that of the seeds after it.
        z_bg, kl_bg = self._latents((self.bg_encoder(x),), seed, first)
        background = self.bg_decoder(*(latent.z for latent in z_bg))
        seen = self._unexplained(x, background) if self.explain_away else x
        z_fg, kl_fg = self._latents(self.fg_encoder(seen), None if seed is None else seed + 1, first)
        foreground, mask_logits = self.fg_decoder(*(latent.z for latent in z_fg))
        if self.additive:
            foreground = background + foreground
        layers = (foreground, background, mask_logits)
        if below or beside:
            layers = (layer[..., :height, :width] for layer in layers)
        return LayeredOutput(*layers, kl_fg, kl_bg, z_fg, z_bg)

    @staticmethod
    def _latents(
        posteriors: tuple[Gaussian, ...], seed: int | None, first: int
    ) -> tuple[tuple[Latent, ...], Tensor]:
        pairs = (draw_latent(*q, None if seed is None else seed + k, first) for k, q in enumerate(posteriors))
        latents, kl = zip(*pairs, strict=True)
        return latents, sum(kl)

    @torch.no_grad()
    def decode(self, *z: Tensor) -> Tensor:
        """The image that latents make, [B, ...] each: the foreground's, then the background's."""
        *z_fg, z_bg = z
        background = self.bg_decoder(z_bg)
        foreground, mask_logits = self.fg_decoder(*z_fg)
        if self.additive:
            foreground = background + foreground
        return self._compose(torch.sigmoid(mask_logits), foreground, background)

    def _unexplained(self, x: Tensor, background: Tensor) -> Tensor:
        """(x - E[x | bg]) / std[x | bg]: mean 0 and variance 1 where the background is all there is."""
        if self.likelihood == "bernoulli":
            log_variance = F.logsigmoid(background) + F.logsigmoid(-background)
            return (x - torch.sigmoid(background)) * torch.exp(-0.5 * log_variance)
        std = self.bg_scale * (math.sqrt(2) if self.likelihood == "laplace" else 1)
        return (x - background) / std[:, None, None]

    def reconstruction(self, out: LayeredOutput, x: Tensor) -> Tensor:
        """Negative log-likelihood of x [B, C, H, W] under the two layers, in nats: [B]."""
        layers = (out.foreground, out.background, x)
        options = {"mask_logits": out.mask_logits, "likelihood": self.likelihood, "reduction": "sample"}
        if self.composition == "blended":
            if self.has_scales:
                options["scale"] = self.bg_scale
            return fgbg_cuda.blended_reconstruction_loss(*layers, **options)
        if self.has_scales:
            options |= {"fg_scale": self.fg_scale, "bg_scale": self.bg_scale}
        if self.composition == "masked":
            return fgbg_cuda.masked_reconstruction_loss(*layers, **options)
        return fgbg_cuda.mixture_reconstruction_loss(*layers, **options)

    def mask_kl(self, out: LayeredOutput) -> Tensor | None:
        """KL of the masks against ``mask_prior``, in nats: [B]; None where there is no such prior."""
        if self.mask_prior is None:
            return None
        prior_logit = math.log(self.mask_prior / (1 - self.mask_prior))
        return fgbg_cuda.bernoulli_kl(out.mask_logits, prior_logit, reduction="sample")

    def supervised_reconstruction(self, out: LayeredOutput, x: Tensor, mask: Tensor) -> Tensor:
        """-log p(x, mask | z) in nats, [B], where the true mask [B, 1, H, W] (bool) is known.

        Each pixel is charged to its own layer, and the mask to its log-odds.
        """
        options = {"fg_scale": self.fg_scale, "bg_scale": self.bg_scale} if self.has_scales else {}
        nats = fgbg_cuda.masked_reconstruction_loss(
            out.foreground,
            out.background,
            x,
            mask=mask,
            likelihood=self.likelihood,
            reduction="sample",
            **options,
        )
        return nats + self._nats(out.mask_logits, mask.to(x.dtype), "bernoulli").flatten(1).sum(1)

    def mean(self, layer: Tensor) -> Tensor:
        """E[x | layer] of the foreground or background of a :class:`LayeredOutput`."""
        return torch.sigmoid(layer) if self.likelihood == "bernoulli" else layer

    @torch.no_grad()
    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, C, H, W], from the posterior means of the latents.

        An additive foreground by itself is what it would show over the background where that is dark: over
        its 10 % quantile in the image. Where the networks have a ``tone_reach``, foreground and mask are
        those of :func:`~fgbg_cuda.vae.models.local_tones.local_tones`.
        """
        out = self(x, sample=False)
        reach = self.networks.tone_reach
        if reach is not None and self.composition == "mixture" and self.has_scales and not self.additive:
            mask, tones = local_tones(x, out.background, out.foreground, reach)
            return Separation(mask * tones, out.background, mask, self._compose(mask, tones, out.background))
        logits = out.mask_logits
        if self.composition == "mixture":
            # The responsibility of the foreground: prior log-odds plus log p(x | fg) - log p(x | bg).
            scales = (self.bg_scale, self.fg_scale) if self.has_scales else (1.0, 1.0)
            logits = logits + (
                self._nats(out.background, x, self.likelihood, scales[0])
                - self._nats(out.foreground, x, self.likelihood, scales[1])
            )
        mask = torch.sigmoid(logits)
        foreground, background = self.mean(out.foreground), self.mean(out.background)
        composite = self._compose(mask, out.foreground, out.background)
        if self.additive:
            dark = quantile(out.background.flatten(2), DARK, dim=2)[:, :, None, None]
            foreground = self._compose(mask, dark + out.foreground - out.background, dark)
        else:
            foreground = mask * foreground
        return Separation(foreground, background, mask, composite)

    def _compose(self, mask: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
        """E[x] of layers as the decoders give them, where the mask is what :meth:`separate` finds."""
        if self.composition == "blended":
            return self.mean(mask * foreground + (1 - mask) * background)
        return mask * self.mean(foreground) + (1 - mask) * self.mean(background)

    @staticmethod
    def _nats(layer: Tensor, x: Tensor, likelihood: str, scale: Tensor | float = 1.0) -> Tensor:
        """-log p(x | layer) of each pixel, channels joint: [B, 1, H, W]."""
        mask = torch.ones_like(x[:, :1])
        nats = fgbg_cuda.masked_reconstruction_loss(
            layer, None, x, mask=mask, likelihood=likelihood, fg_scale=scale, reduction="none"
        )
        return nats.sum(1, keepdim=True)
