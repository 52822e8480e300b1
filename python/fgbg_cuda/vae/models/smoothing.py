"""Masks whose neighbouring pixels belong together where they look alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

COUPLING = 8.0  # nats by which two neighbours that look the same prefer to be of one layer
STEPS = 8


def smooth_mask(logits: Tensor, x: Tensor) -> Tensor:
    r"""The posterior of masks with log-odds ``logits`` [B, 1, H, W] under a random field: [B, 1, H, W].

    A pixel and each of its eight neighbours that belong to different layers cost :math:`J w`, with
    :math:`w = e^{-|x_i - x_j|^2 / 2 s^2} / distance` (Boykov & Jolly, "Interactive graph cuts", 2001) and s
    twice the root mean square of the differences between neighbours in the image x [B, C, H, W]: a boundary
    is cheap where the image has one. What is returned is the mean-field approximation of the posterior
    (Kraehenbuehl & Koltun, "Fully connected CRFs", 2011), which begins with sigmoid(logits).
    """
    squares = [(x - other).square().sum(1, keepdim=True) for other, _ in _neighbours(x)]
    variance = (4 * sum(squares) / len(squares)).mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
    weights = [
        torch.exp(-square / (2 * variance)) * (COUPLING / distance)
        for square, (_, distance) in zip(squares, _neighbours(x), strict=True)
    ]
    mask = torch.sigmoid(logits)
    for _ in range(STEPS):
        pull = sum(w * (2 * other - 1) for w, (other, _) in zip(weights, _neighbours(mask), strict=True))
        mask = torch.sigmoid(logits + pull)
    return mask


def _neighbours(x: Tensor) -> Iterator[tuple[Tensor, float]]:
    """x shifted to each of the eight neighbours, the edge repeated, and how far they are."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    for dy in range(3):
        for dx in range(3):
            if (dy, dx) != (1, 1):
                yield padded[..., dy : dy + height, dx : dx + width], math.hypot(dy - 1, dx - 1)
