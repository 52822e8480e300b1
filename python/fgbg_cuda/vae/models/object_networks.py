"""Networks of the layered VAE for one flat-toned object of limited extent in front of a smooth background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, whole
from .networks import Gaussian, Networks

BRIGHT = 1.7  # log-odds of the tone that training starts with
# Of the third moment, see contrast. Chosen on discs over photographs of grass, gravel and brick, on pictures
# of nuclei and coins, and on lines and dots of 1 to 3 pixels on a plain ground: right for all of these.
LEAST_FLAT = 0.04


@dataclass(frozen=True)
class ObjectNetworks(Networks):
    """For an object that is flat in tone, compact and cheap to describe, over what is drawn coarsely.

    Args:
        fg_latents: foreground latents in each 8 x 8 pixels, beside those of the tone and of the place.
        bg_latents: background latents in each ``bg_cell`` x ``bg_cell`` pixels.
        width: channels of the foreground's networks, a multiple of 4.
        bg_cell: 8, 16 or 32 pixels, see :class:`BackgroundDecoder`: larger than what is not to be background.
        tone: whether the object is ``"bright"`` or ``"dark"`` before what is around it; ``"auto"``: the first
            batch of the training tells (:func:`contrast`), unless objects are thin strokes before a texture.
        objects: ``"one"`` in each image of the training, or ``"many"``, each with a tone of its own. The
            networks know one tone and one place; of many they find the background, and the masks are those
            of :func:`~fgbg_cuda.vae.models.local_tones.local_tones`, where boundaries run at half an
            object's height.
    """

    fg_latents: int = 8
    bg_latents: int = 2
    width: int = 32
    bg_cell: int = 8
    tone: Literal["auto", "bright", "dark"] = "auto"
    objects: Literal["one", "many"] = "one"

    def __post_init__(self) -> None:
        whole(1, **{name: value for name, value in asdict(self).items() if name not in ("tone", "objects")})
        if self.objects not in ("one", "many"):
            raise InputError(f"objects is {self.objects!r}, expected one or many")
        if self.tone not in ("auto", "bright", "dark"):
            raise InputError(f"tone is {self.tone!r}, expected auto, bright or dark")
        if self.width % 4:
            raise InputError(f"width is {self.width}, expected a multiple of 4")
        if self.bg_cell not in (8, 16, 32):
            raise InputError(f"bg_cell is {self.bg_cell}, expected 8, 16 or 32")

    @property
    def size_multiple(self) -> int:
        return self.bg_cell

    @property
    def tone_reach(self) -> float | None:
        return self.bg_cell / 8 if self.objects == "many" else None

    def start(self, model: nn.Module, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
        if self.tone == "auto":
            sign = reduce(contrast(x, self.bg_cell))
        else:
            sign = x.new_full((x.shape[1],), 1.0 if self.tone == "bright" else -1.0)
        model.fg_decoder.start(sign)

    def build(self, shape: tuple[int, int, int], likelihood: str) -> tuple[nn.Module, ...]:
        if likelihood == "bernoulli":
            raise InputError("likelihood 'bernoulli' takes logits, but ObjectNetworks give intensities")
        channels = shape[0]
        return (
            ForegroundEncoder(channels, self.fg_latents, self.width),
            ForegroundDecoder(channels, self.fg_latents, self.width),
            BackgroundEncoder(channels, self.bg_latents, self.bg_cell),
            BackgroundDecoder(channels, self.bg_latents, self.bg_cell),
        )


def contrast(x: Tensor, cell: int) -> Tensor:
    """Whether what stands out from the scene in images x [B, C, H, W] is bright (> 0) or dark (< 0): [C].

    Objects cover less of an image than what is behind them, so it is a third moment that tells, of what x
    differs by from its means over ``cell`` x ``cell`` pixels. A texture may be skewed itself, but is not flat
    as objects are: taken is the mean of m^3 (m^2 / (m^2 + v))^8, of the mean m and variance v of each 5 x 5
    pixels. Where that is next to nothing beside the third moment of all pixels, since objects are too thin
    for 5 x 5 pixels to be flat in them, the latter is taken. (So thin objects before a texture mislead it, as
    the demo's digits before grass: there the tone is to be given.)
    """
    means = F.avg_pool2d(x, cell, ceil_mode=True, count_include_pad=False)
    rest = x - F.interpolate(means, size=x.shape[-2:], mode="bilinear")
    rest = rest - rest.mean((2, 3), keepdim=True)
    around = nn.AvgPool2d(min(5, *x.shape[-2:]), stride=1)
    mean = around(rest)
    squares = around(rest.square())  # m^2 + v
    flat = (mean.square() / squares.clamp(min=1e-12)).clamp(max=1).pow(8)
    of_flat, of_all = flat * mean.pow(3), rest.pow(3)
    known = of_flat.abs().mean((0, 2, 3)) > LEAST_FLAT * of_all.abs().mean((0, 2, 3))
    return torch.where(known, of_flat.mean((0, 2, 3)), of_all.mean((0, 2, 3)))


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
        pooled = torch.cat([(weights @ seen.flatten(2).mT)[:, 0] for seen in (fine, pixels)], dim=1)
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
        # scene (or darker, see start). Started at mid-gray, the flat tone settles on the most common gray
        # of the texture.
        nn.init.constant_(self.high[0].bias, -3.0)
        nn.init.constant_(self.tone[-1].bias, BRIGHT)

    @torch.no_grad()
    def start(self, contrast: Tensor) -> None:
        """Lets training start with an object that is darker than the scene where ``contrast`` [C] < 0."""
        self.tone[-1].bias.copy_(torch.where(contrast < 0, -BRIGHT, BRIGHT))

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
            raise InputError(f"x is {x.shape[-2]} x {x.shape[-1]}, expected multiples of {self.cell}")
        mu, logvar = self.net(x).chunk(2, dim=1)
        return mu, logvar


class BackgroundDecoder(nn.Module):
    """p(background | z_bg): drawn at 1/cell of the resolution and interpolated, so objects do not fit.

    z_bg [B, latents, H/cell, W/cell] -> [B, C, H, W]. ``cell``, 8, 16 or 32 pixels, is to be larger than what
    is not to fit: a stroke with the default of 8, a whole cell nucleus of 25 pixels with 32.
    """

    def __init__(self, channels: int = 1, latents: int = 2, cell: int = 8) -> None:
        super().__init__()
        self.cell = cell
        self.net = nn.Sequential(conv(latents, 16), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        low = self.net(z)
        return torch.sigmoid(F.interpolate(low, scale_factor=self.cell, mode="bilinear"))
