"""Separating frames of any size with a model that was trained on another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.layered import Separation

# Less work costs accuracy: with half a side (77 tiles of 64 on 240 x 376, not 40) the mask IoU is higher by
# 0.007 +- 0.004 on frames with 26 nuclei each, with a third (54 tiles) as high as with half.
OVERLAP = 0.3
PIXELS_AT_ONCE = 96 * 64 * 64  # of the tiles that a model gets in one call: enough to keep all cores busy


def separate_tiles(
    separate: Callable[[Tensor], Separation], x: Tensor, size: tuple[int, int] | None
) -> Separation:
    """The layers of x [B, C, H, W], from tiles as large as the images that the model was trained on.

    What a model has learned holds for the amount of scene that it saw: a frame larger than ``size`` (height,
    width) is cut into tiles of that size which overlap by :data:`OVERLAP` of their side or a little more, so
    that an object which is no larger is whole in one of them. What they say of a pixel is averaged,
    weighted by sin^2 across each tile, as a model sees least at an edge. A frame that is smaller is padded
    to that size with its border pixels (a reflection would show objects twice), and the layers are cut to
    the frame again. ``size=None`` takes the frame as one tile.
    """
    frame = x.shape[-2:]
    tile = size or frame
    below, beside = (max(0, side - whole) for side, whole in zip(tile, frame, strict=True))
    if below or beside:
        x = F.pad(x, (0, beside, 0, below), mode="replicate")
    starts = [_starts(whole, side) for whole, side in zip(x.shape[-2:], tile, strict=True)]
    if all(len(places) == 1 for places in starts):
        found = separate(x)
    else:
        found = _blend(separate, x, tile, starts)
    return Separation(*(layer[..., : frame[0], : frame[1]] for layer in found))


def _starts(whole: int, side: int) -> list[int]:
    """Where tiles begin that cover ``whole`` evenly."""
    count = math.ceil((whole - side) / (side * (1 - OVERLAP))) + 1
    return np.linspace(0, whole - side, count).round().astype(int).tolist()


def _blend(
    separate: Callable[[Tensor], Separation], x: Tensor, tile: tuple[int, int], starts: list[list[int]]
) -> Separation:
    ramps = [torch.sin(math.pi * (torch.arange(side) + 0.5) / side).square() for side in tile]
    weight = torch.outer(*ramps).to(x)
    total, sums = torch.zeros_like(x[0, 0]), None
    places = [
        (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
        for top, left in itertools.product(*starts)
    ]
    together = max(1, PIXELS_AT_ONCE // (len(x) * math.prod(tile)))
    for first in range(0, len(places), together):
        some = places[first : first + together]
        found = separate(torch.cat([x[place] for place in some]))
        if sums is None:
            sums = [x.new_zeros(len(x), layer.shape[1], *x.shape[-2:]) for layer in found]
        for layer_sum, layer in zip(sums, found, strict=True):
            for place, part in zip(some, layer.chunk(len(some)), strict=True):
                layer_sum[place].addcmul_(weight, part)
        for place in some:
            total[place] += weight
    return Separation(*(layer_sum / total for layer_sum in sums))
