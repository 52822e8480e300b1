"""Masks of many objects, each with a tone of its own, over a background that is known."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .smoothing import smooth_mask

SPREAD = 1.4826  # a Gaussian's standard deviation over its median absolute deviation
FIRST_COST = 2.0  # nats that the background may cost more in a pixel than a foreground of any tone
MOST_FIRST = 6.0  # nats, so that a bright pixel does not outvote its neighbours
LEAST_NOISE = 0.01  # standard deviation, of the whole range
DECODED = 0.02  # of a window: the weight of the decoded tone, which is all there is far from any object
STEPS = 3


def local_tones(x: Tensor, background: Tensor, tone: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    r"""The masks [B, 1, H, W] and the foreground's tones [B, C, H, W] of images x [B, C, H, W].

    Both layers are Gaussian with the same noise s, 1.4826 times the median of ``|x - background|``, and the
    foreground's mean f is the same within ``reach`` pixels. In turn, starting with what differs from the
    background to the side that ``tone`` does:

    - f is the weighted mean of the foreground around a pixel, ``(G * (m x) + w tone) / (G * m + w)``, with G
      a Gaussian window of standard deviation ``reach`` and w a small weight of the decoded tone;
    - the mask m has log-odds ``(|x - b|^2 - |x - f|^2) / 2 s^2``, on which neighbours that look alike agree
      (:func:`~fgbg_cuda.vae.models.smoothing.smooth_mask`): its boundary runs at half an object's height.

    (Two regions with local means: Li et al., "Minimization of region-scalable fitting energy for image
    segmentation", IEEE Transactions on Image Processing 17 (2008).)
    """
    rest = x - background
    noise = (SPREAD * rest.abs().flatten(2).median(2).values[..., None, None]).clamp(min=LEAST_NOISE)
    surprise = (rest / noise).square().sum(1, keepdim=True) / 2 - FIRST_COST
    towards = (rest * (tone - background)).sum(1, keepdim=True) > 0
    mask = smooth_mask(torch.where(towards, surprise, -FIRST_COST).clamp(max=MOST_FIRST), x)
    for _ in range(STEPS):
        tones = (_window(mask * x, reach) + DECODED * tone) / (_window(mask, reach) + DECODED)
        nats = (rest.square() - (x - tones).square()) / (2 * noise.square())
        mask = smooth_mask(nats.sum(1, keepdim=True), x)
    return mask, tones


def _window(x: Tensor, std: float) -> Tensor:
    """The mean of x [B, C, H, W] in a Gaussian window around each pixel, the border repeated."""
    radius = math.ceil(3 * std)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.softmax(-0.5 * (offsets / std).square(), 0)
    rows = x.flatten(0, 1)[:, None]
    rows = F.conv2d(F.pad(rows, (radius, radius, 0, 0), mode="replicate"), weights[None, None, None])
    rows = F.conv2d(F.pad(rows, (0, 0, radius, radius), mode="replicate"), weights[None, None, :, None])
    return rows.view_as(x)
