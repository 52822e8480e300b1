"""The double-ELBO model of the thesis, section 2.9: the baseline that the layered VAE has to beat."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fgbg_cuda

from ..errors import InputError, whole
from .layered import Latent, Separation, draw_latent, draw_seed, quantile

SHAPE = (1, 60, 60)  # of the images: the layers below are made for it
PLACES = 8  # of foreground latents, along each side
RECENT = 1000  # training images whose z2 says how far its latents reach
ENDS = (0.05, 0.95)  # the quantiles of them that count as a latent's ends
WINDOW = 30  # of the sum-pooling that makes the background's target


class DoubleELBOOutput(NamedTuple):
    """What the two decoders say about a batch, and what the latents cost (nats per image)."""

    foreground: Tensor  # [B, 1, 60, 60] logits of the image
    background: Tensor  # [B, 1, 2, 2] logits of the pooled image
    kl_fg: Tensor  # [B]
    kl_bg: Tensor  # [B]
    z_fg: tuple[Latent, ...]  # one map, [B, fg_latents, 8, 8]
    z_bg: tuple[Latent, ...]  # one vector, [B, bg_latents]


def pooled(x: Tensor) -> Tensor:
    """g(x): the mean of each 30x30 window, contrast-stretched: [B, 1, 60, 60] -> [B, 1, 2, 2].

    sigmoid(12 (sum / 900 - 0.5)).
    """
    return torch.sigmoid(12 * (F.avg_pool2d(x, WINDOW) - 0.5))


class DoubleELBO(nn.Module):
    r"""Two VAEs on one image: one with a small receptive field for the foreground, one with a large one.

    F. Eichin, "Separation of Foreground and Background Signal in Variational Autoencoders", bachelor
    thesis, Freiburg, 2020, section 2.9. With every latent a priori N(0, 1) and Bernoulli likelihoods p,

    - foreground: z1 ~ q(z1 | x); its decoder reconstructs x:
      :math:`ELBO_1 = E \log p(x | \tilde z_1) - KL(q(z_1|x) \| N(0,1))`;
    - background: z2 ~ s(z2 | x); its decoder reconstructs :func:`pooled`, 2x2 numbers in [0, 1] that the
      Bernoulli takes as soft targets: :math:`ELBO_2 = E \log p(g(x) | \tilde z_2) - KL(s(z_2|x) \| N(0,1))`;
    - interaction: one dense layer mixes [z1; z2] into the decoders' inputs, :math:`\tilde z_1, \tilde z_2`;
    - loss = :math:`-(ELBO_1 + \lambda ELBO_2) + 0.01 \|W\|^2`, lambda = 450, W the decoders' weights.

    Where the description leaves a choice, this is it:

    - The four foreground latents are four channels of the 8x8 places in which the convolutions end, so that
      each sees the 18x18 pixels about it and no more: mu and logvar are the last convolution's outputs, 4
      channels each. The one background latent is a number for the whole image, from a dense layer.
    - The interaction layer is one dense layer over all the foreground's 4 * 64 numbers and the background's
      one, linear, with a bias and as wide as its input. (Shared by the places, it could not draw a disc:
      z2 would shift all places alike.) Without interaction into the background decoder,
      :math:`\tilde z_2 = z_2`.
    - The foreground decoder mirrors its encoder as transposed convolution 2x2 -> 16, relu,
      nearest-neighbour enlargement 9 -> 20 for the pooling, transposed convolution 6x6.
    - W are the weights, not the biases, of both decoders; the interaction layer is not among them.
    - Images with an inactive background, up-weighted: see :meth:`image_weights`.
    - Lambda weighs the reconstruction in :math:`ELBO_2` alone, see :class:`DoubleELBOModule`.

    What it does on the thesis's sets, and what else was tried: ``results/thesis/README.md``.

    Args:
        shape: of the images: (1, 60, 60), for which the layers are made.
        fg_latents: latents at each of the 8x8 places.
        bg_latents: latents of the whole image.
        background_sees_foreground: False: no interaction into the background decoder, as the thesis proposes.

    Raises:
        ValueError: the images have another shape.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = SHAPE,
        fg_latents: int = 4,
        bg_latents: int = 1,
        background_sees_foreground: bool = True,
    ) -> None:
        super().__init__()
        if tuple(shape) != SHAPE:
            raise InputError(f"the images are {shape} (C, H, W), but a DoubleELBO takes {SHAPE}")
        whole(1, fg_latents=fg_latents, bg_latents=bg_latents)
        self.fg_encoder = nn.Sequential(
            nn.Conv2d(1, 16, 6, stride=3, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(16, 2 * fg_latents, 2),
        )
        self.bg_encoder = nn.Sequential(
            nn.Conv2d(1, 2, 30, stride=2, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(6),
            nn.Flatten(),
            nn.Linear(2 * 3 * 3, 2 * bg_latents),
        )
        self.bg_latents = bg_latents
        numbers = fg_latents * PLACES * PLACES
        mixed = numbers + bg_latents
        self.interaction = nn.Linear(mixed, mixed if background_sees_foreground else numbers)
        self.fg_decoder = nn.Sequential(
            nn.ConvTranspose2d(fg_latents, 16, 2),
            nn.ReLU(),
            nn.Upsample(size=20),
            nn.ConvTranspose2d(16, 1, 6, stride=3, padding=2, output_padding=1),
        )
        self.bg_decoder = nn.Sequential(nn.Linear(bg_latents, 4), nn.Unflatten(1, (1, 2, 2)))
        # Posterior means of z2, before any training those that N(0, 1) would have.
        prior = torch.special.ndtri((torch.arange(RECENT) + 0.5) / RECENT)
        self.register_buffer("recent_z_bg", prior[:, None].repeat(1, bg_latents))

    def forward(
        self, x: Tensor, sample: bool = True, seed: int | None = None, first: int = 0
    ) -> DoubleELBOOutput:
        """Encode and decode x [B, 1, 60, 60]: as :meth:`LayeredVAE.forward`."""
        if tuple(x.shape[1:]) != SHAPE:
            raise InputError(f"x has shape {list(x.shape)}, expected [B, 1, 60, 60]")
        seeds = (None, None)
        if sample:
            seed = draw_seed() if seed is None else seed
            seeds = (seed, seed + 1)
        z_fg, kl_fg = draw_latent(*self.fg_encoder(x).chunk(2, dim=1), seeds[0], first)
        z_bg, kl_bg = draw_latent(*self.bg_encoder(x).chunk(2, dim=1), seeds[1], first)
        if self.training:
            seen = z_bg.mu.detach().to(self.recent_z_bg)
            # In place: DistributedDataParallel keeps the buffers it found.
            self.recent_z_bg.copy_(torch.cat([self.recent_z_bg, seen])[-RECENT:])
        for_fg, for_bg = self._interact(z_fg.z, z_bg.z)
        return DoubleELBOOutput(
            self.fg_decoder(for_fg), self.bg_decoder(for_bg), kl_fg, kl_bg, (z_fg,), (z_bg,)
        )

    def _interact(self, z_fg: Tensor, z_bg: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the two decoders."""
        flat = z_fg.flatten(1)
        mixed = self.interaction(torch.cat([flat, z_bg], dim=1))
        for_fg, for_bg = mixed[:, : flat.shape[1]], mixed[:, flat.shape[1] :]
        return for_fg.view(z_fg.shape), for_bg if for_bg.shape[1] else z_bg

    @torch.no_grad()
    def decode(self, z_fg: Tensor, z_bg: Tensor) -> Tensor:
        """The image that the foreground decoder makes of latents, [B, ...] each."""
        return torch.sigmoid(self.fg_decoder(self._interact(z_fg, z_bg)[0]))

    def reconstruction(self, out: DoubleELBOOutput, x: Tensor) -> Tensor:
        """-log p(x | z) of the foreground decoder, in nats: [B]."""
        return _bernoulli_nats(out.foreground, x)

    def pooled_reconstruction(self, out: DoubleELBOOutput, x: Tensor) -> Tensor:
        """-log p(g(x) | z) of the background decoder, in nats: [B]."""
        return _bernoulli_nats(out.background, pooled(x))

    def decoder_weights_squared(self) -> Tensor:
        """The sum of the squares of both decoders' weights."""
        decoders = (self.fg_decoder, self.bg_decoder)
        return sum(p.square().sum() for d in decoders for p in d.parameters() if p.dim() > 1)

    @staticmethod
    def image_weights(x: Tensor, inactive_weight: float) -> Tensor:
        """How much each image of a batch counts, with mean 1: [B].

        The thesis proposes to up-weight images with an inactive background, not how to tell them without the
        truth. Here an image is one if its brightest window lies in the lower half of the batch's range.
        """
        brightest = pooled(x).flatten(1).amax(1)
        inactive = brightest < (brightest.min() + brightest.max()) / 2
        weights = torch.where(inactive, inactive_weight, 1.0)
        return weights / weights.mean()

    @torch.no_grad()
    def inactive_background(self, z_fg: Tensor) -> Tensor:
        """The z2 that says, with this z1 [B, fg_latents, 8, 8]: no background: [B, bg_latents].

        Light adds, so that without the background the image is darkest: each latent of z2 is at that end of
        its range where the image is the darker, the others at their medians. Its range is what it had on the
        images last seen in training, from the 5 % quantile to the 95 %. So the background may be inactive in
        as few as a tenth of the images: then that end is the middle of those.
        """
        low, high, middle = (quantile(self.recent_z_bg, q, dim=0) for q in (*ENDS, 0.5))
        inactive = []
        for latent in range(self.bg_latents):
            brightness = []
            for end in (low, high):
                z = middle.clone()
                z[latent] = end[latent]
                brightness.append(self.decode(z_fg, z.expand(len(z_fg), -1)).flatten(1).mean(1))
            inactive.append(torch.where(brightness[0] < brightness[1], low[latent], high[latent]))
        return torch.stack(inactive, dim=1)

    @torch.no_grad()
    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, 1, 60, 60], from the posterior means of the latents.

        The foreground is the image that the foreground decoder makes of z1 where z2 is
        :meth:`inactive_background`: what of the background it still shows, z1 holds. The composite is the
        one that it makes of both, the reconstruction of x. The model has no mask: the foreground stands in
        for it. The background is the mean of each window that the background decoder stands for, g undone:
        0.5 + logit / 12.
        """
        out = self(x, sample=False)
        z_fg = out.z_fg[0].mu
        foreground = self.decode(z_fg, self.inactive_background(z_fg))
        windows = (0.5 + out.background / 12).clamp(0, 1)
        background = F.interpolate(windows, scale_factor=WINDOW)
        return Separation(foreground, background, foreground, torch.sigmoid(out.foreground))


def _bernoulli_nats(logits: Tensor, target: Tensor) -> Tensor:
    mask = torch.ones_like(target)
    return fgbg_cuda.masked_reconstruction_loss(
        logits, None, target, mask=mask, likelihood="bernoulli", reduction="sample"
    )
