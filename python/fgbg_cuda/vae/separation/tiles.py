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


def separate_tiles(
    separate: Callable[[Tensor], Separation], x: Tensor, size: tuple[int, int] | None
) -> Separation:
    """The layers of x [B, C, H, W], from tiles as large as the images that the model was trained on.

    What a model has learned holds for the amount of scene that it saw: a frame larger than ``size`` (height,
    width) is cut into tiles of that size which overlap by half, and what they say of a pixel is averaged,
    weighted by sin^2 across each tile, as a model sees least at an edge. A frame that is smaller is padded
    to that size with its border pixels (a reflection would show objects twice), and the layers are cut to
    the frame again. ``size=None`` takes the frame as one tile.
    """
    frame = x.shape[-2:]
    tile = size or frame
    x = F.pad(x, [0, max(0, tile[1] - frame[1]), 0, max(0, tile[0] - frame[0])], mode="replicate")
    starts = [_starts(whole, side) for whole, side in zip(x.shape[-2:], tile, strict=True)]
    if all(len(places) == 1 for places in starts):
        found = separate(x)
    else:
        found = _blend(separate, x, tile, starts)
    return Separation(*(layer[..., : frame[0], : frame[1]] for layer in found))


def _starts(whole: int, side: int) -> list[int]:
    """Where tiles begin that cover ``whole`` evenly and overlap by half or a little more."""
    return np.linspace(0, whole - side, math.ceil(2 * (whole - side) / side) + 1).round().astype(int).tolist()


def _blend(
    separate: Callable[[Tensor], Separation], x: Tensor, tile: tuple[int, int], starts: list[list[int]]
) -> Separation:
    ramps = [torch.sin(math.pi * (torch.arange(side) + 0.5) / side).square() for side in tile]
    weight = torch.outer(*ramps).to(x)
    total, sums = torch.zeros_like(x[0, 0]), None
    for top, left in itertools.product(*starts):
        place = (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
        found = separate(x[place])
        if sums is None:
            sums = [layer.new_zeros(*layer.shape[:2], *x.shape[-2:]) for layer in found]
        for layer_sum, layer in zip(sums, found, strict=True):
            layer_sum[place] += weight * layer
        total[place] += weight
    return Separation(*(layer_sum / total for layer_sum in sums))
