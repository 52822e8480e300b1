"""Networks of the layered VAE for many small objects that stay where they are, over large smooth ones.

As the cells of a recording do, over what is out of focus. What tells the layers apart is their latents:
a foreground latent reaches a few pixels only, so that a large object is dear to describe by them, while
the few background latents reach the whole image and are too few to describe the cells.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fgbg_cuda

from ..errors import InputError, whole
from .networks import Gaussian, Networks

STRIDE = 6  # pixels from one foreground latent to the next
# Log-odds of the foreground where the latents say nothing. So low that, when training starts, what is large
# is left to the background, which finds it sooner: the foreground need not unlearn it.
EMPTY = -6.0


@dataclass(frozen=True)
class CellNetworks(Networks):
    """For many small objects that stay where they are, over few large smooth ones.

    Args:
        cell_latents: foreground latents in each 6 x 6 pixels.
        cell_width: channels of the foreground's networks.
        light_latents: background latents, for the whole image.
    """

    # Names that ObjectNetworks does not have: on the command line, the values of those would be kept.
    cell_latents: int = 1
    cell_width: int = 16
    light_latents: int = 2

    size_multiple = STRIDE

    def __post_init__(self) -> None:
        whole(1, **asdict(self))

    def build(self, shape: tuple[int, int, int], likelihood: str) -> tuple[nn.Module, ...]:
        channels, *size = shape
        value = 2.0 if likelihood == "bernoulli" else 0.5  # logits span a wider range than [0, 1]
        return (
            CellsEncoder(channels, self.cell_latents, self.cell_width, size),
            CellsDecoder(channels, self.cell_latents, self.cell_width, size, value),
            ScatteredLightEncoder(channels, self.light_latents, size=size),
            ScatteredLightDecoder(channels, self.light_latents, size=size),
        )


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Places of foreground latents on images of ``size`` (H, W).

    Raises:
        ValueError: H or W is no multiple of 6.
    """
    height, width = size
    if height % STRIDE or width % STRIDE:
        raise InputError(f"size is {height} x {width}, expected multiples of {STRIDE}")
    return height // STRIDE, width // STRIDE


def check_size(x: Tensor, size: tuple[int, int]) -> None:
    if tuple(x.shape[-2:]) != tuple(size):
        raise InputError(
            f"x has shape {list(x.shape)}, but these networks were made for {size[0]} x {size[1]}"
        )


class CellsEncoder(nn.Module):
    """q(z_fg | x): x [B, C, H, W] -> one (mu, logvar) pair, each [B, latents, H/6, W/6].

    A latent sees 16 x 16 pixels. There is no normalisation layer: its statistics, taken over the whole
    image, would tell every latent about the background. Most places have no cell to tell of; :meth:`prune`
    switches their latents off for good, so that their posterior is exactly the prior.

    Args:
        channels: C of the images.
        latents: latent channels at each place of the grid.
        width: channels of the hidden layers.
        size: (H, W), multiples of 6. Each place has biases of its own, as a cell is always at the same place.
    """

    def __init__(
        self, channels: int = 1, latents: int = 1, width: int = 16, size: tuple[int, int] = (60, 60)
    ) -> None:
        super().__init__()
        self.size, grid = size, grid_of(size)
        self.local = nn.Sequential(
            nn.Conv2d(channels, width, 7, stride=3, padding=2),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 2, stride=2),
        )
        self.place = nn.Parameter(torch.zeros(1, 2 * width, *grid))
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(2 * width, 2 * latents, 1))
        self.register_buffer("used", torch.ones(1, latents, *grid))  # 0 where switched off
        self.register_buffer("kl", torch.zeros(1, latents, *grid))  # nats per image, of late

    def forward(self, x: Tensor) -> tuple[Gaussian]:
        check_size(x, self.size)
        mu, logvar = self.head(self.local(x) + self.place).chunk(2, dim=1)
        logvar = logvar.clamp(-8, 4)  # so that the first steps cannot overflow exp(logvar)
        mu, logvar = mu * self.used, logvar * self.used
        if self.training:
            with torch.no_grad():
                kl = fgbg_cuda.gaussian_kl(mu, logvar, reduction="none").mean(0, keepdim=True)
                self.kl.lerp_(kl, 0.02)  # a mean over the last 50 steps or so
        return ((mu, logvar),)

    def prune(self, least: float) -> None:
        """Switch off every latent that has told less than ``least`` nats per image in the latest steps."""
        self.used.mul_(self.kl >= least)


class CellsDecoder(nn.Module):
    """p(mask, foreground | z_fg): z_fg [B, latents, H/6, W/6] -> [B, C, H, W] and mask logits [B, 1, H, W].

    The foreground has one positive value, learned, in each channel: the mask says where. At z = 0, the mean
    of the prior, that is nowhere: what is always there would cost no nats in the foreground either, and
    belongs to the background.

    Args:
        channels, latents, width, size: as in :class:`CellsEncoder`.
        value: of the foreground when training starts: a difference of logits, or of intensities.
    """

    def __init__(
        self,
        channels: int = 1,
        latents: int = 1,
        width: int = 16,
        size: tuple[int, int] = (60, 60),
        value: float = 2.0,
    ) -> None:
        super().__init__()
        grid = grid_of(size)
        self.lift = nn.Conv2d(latents, 2 * width, 3, padding=1)
        # Places differ from the start: of several that could draw a cell, one soon does it best.
        self.place = nn.Parameter(torch.randn(1, 2 * width, *grid))
        self.draw = nn.Sequential(
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 1, 7, stride=3, padding=2, bias=False),
        )
        self.raw_value = nn.Parameter(torch.full((1, channels, 1, 1), math.log(math.expm1(value))))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._draw(z) - self._draw(torch.zeros_like(z[:1])) + EMPTY
        return F.softplus(self.raw_value).expand(len(z), -1, *logits.shape[-2:]), logits

    def _draw(self, z: Tensor) -> Tensor:
        return self.draw(self.lift(z) + self.place)


class ScatteredLightEncoder(nn.Module):
    """q(z_bg | x): x [B, C, H, W] (multiples of 6) -> (mu, logvar), each [B, latents], of the whole image."""

    def __init__(
        self, channels: int = 1, latents: int = 2, width: int = 32, size: tuple[int, int] = (60, 60)
    ) -> None:
        super().__init__()
        self.size, inputs = size, channels * math.prod(grid_of(size))
        self.net = nn.Sequential(
            nn.AvgPool2d(STRIDE),
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, 2 * latents),
        )

    def forward(self, x: Tensor) -> Gaussian:
        check_size(x, self.size)
        mu, logvar = self.net(x).chunk(2, dim=1)
        return mu, logvar.clamp(-8, 4)


class ScatteredLightDecoder(nn.Module):
    """p(background | z_bg): z_bg [B, latents] -> [B, C, H, W].

    Drawn at 1/3 of the resolution and interpolated.
    """

    def __init__(
        self, channels: int = 1, latents: int = 2, width: int = 32, size: tuple[int, int] = (60, 60)
    ) -> None:
        super().__init__()
        self.size = size
        low = (channels, size[0] // 3, size[1] // 3)
        self.net = nn.Sequential(
            nn.Linear(latents, width), nn.SiLU(), nn.Linear(width, math.prod(low)), nn.Unflatten(1, low)
        )

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(self.net(z), size=self.size, mode="bilinear")
