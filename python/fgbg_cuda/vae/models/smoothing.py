"""Masks whose neighbouring pixels belong together where they look alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COUPLING = 8.0  # nats by which two neighbours that look the same prefer to be of one layer
STEPS = 8
# (dy, dx) to half of the eight neighbours; the others are those for whom this pixel is one.
NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))


@torch.no_grad()
def smooth_mask(logits: Tensor, x: Tensor) -> Tensor:
    r"""The posterior of masks with log-odds ``logits`` [B, 1, H, W] under a random field: [B, 1, H, W].

    A pixel and each of its eight neighbours that belong to different layers cost :math:`J w`, with
    :math:`w = e^{-|x_i - x_j|^2 / 2 s^2} / distance` (Boykov & Jolly, "Interactive graph cuts", 2001) and s
    twice the root mean square of the differences between neighbours in the image x [B, C, H, W]: a boundary
    is cheap where the image has one. Beyond the border stands the border. What is returned is the mean-field
    approximation of the posterior (Kraehenbuehl & Koltun, "Fully connected CRFs", 2011), which begins with
    sigmoid(logits). There are no gradients.
    """
    # All images as one row of pixels, each image with a border of one pixel: a neighbour is equally far ahead
    # of every pixel. What comes out at the border's own places is of no use, and is overwritten.
    batch, height, width = len(x), *x.shape[-2:]
    row = width + 2
    ahead = [dy * row + dx for dy, dx in NEIGHBOURS]
    first, end = row + 1, batch * (height + 2) * row - row - 1

    def inside(pixels: Tensor) -> Tensor:
        return pixels.view(batch, height + 2, row)[:, 1:-1, 1:-1]

    look = F.pad(x, (1, 1, 1, 1), mode="replicate").transpose(0, 1).flatten(1)
    apart = [(look.roll(-step, 1) - look).square_().sum(0) for step in ahead]
    both_ways = (inside(d + d.roll(step)) for d, step in zip(apart, ahead, strict=True))
    variance = (4 * sum(both_ways).mean((1, 2)) / 8).clamp(min=1e-12)
    pulls = [
        (d.view(batch, -1) / (-2 * variance[:, None])).exp_().mul_(COUPLING / math.hypot(*to)).flatten()
        for d, to in zip(apart, NEIGHBOURS, strict=True)
    ]
    given = F.pad(logits.to(torch.promote_types(logits.dtype, x.dtype)), (1, 1, 1, 1)).flatten()
    log_odds, spin = given.clone(), torch.empty_like(given)
    for _ in range(STEPS):
        torch.mul(log_odds, 0.5, out=spin).tanh_()  # 2 sigmoid(log_odds) - 1
        _repeat_border(spin.view(batch, height + 2, row))
        log_odds.copy_(given)
        for pull, step in zip(pulls, ahead, strict=True):
            log_odds[first:end].addcmul_(pull[first:end], spin[first + step : end + step])
            log_odds[first:end].addcmul_(pull[first - step : end - step], spin[first - step : end - step])
    return inside(log_odds).sigmoid()[:, None]


def _repeat_border(images: Tensor) -> None:
    """Overwrites the outermost pixels of images [B, H, W] with those inside of them."""
    images[:, 0], images[:, -1] = images[:, 1], images[:, -2]
    images[:, :, 0], images[:, :, -1] = images[:, :, 1], images[:, :, -2]
