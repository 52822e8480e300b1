"""Scores against the truth, one number per image, and what thresholding the image would score."""

from __future__ import annotations

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import Tensor


def _overlap(mask: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, truth = mask.flatten(1) > 0.5, truth.flatten(1) > 0.5
    return (mask & truth).sum(1).double(), mask.sum(1).double(), truth.sum(1).double()


def mask_iou(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks [B, ...], each cut at 0.5: [B]. Two empty masks agree: 1."""
    both, a, b = _overlap(mask, truth)
    union = a + b - both
    return torch.where(union > 0, both / union.clamp(min=1), 1.0).float()


def mask_dice(mask: Tensor, truth: Tensor) -> Tensor:
    """Dice coefficient of masks [B, ...], each cut at 0.5: [B]. Two empty masks agree: 1."""
    both, a, b = _overlap(mask, truth)
    return torch.where(a + b > 0, 2 * both / (a + b).clamp(min=1), 1.0).float()


def foreground_mse(foreground: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error where the true mask [B, 1, H, W] is set (nowhere else is it defined): [B].

    ``truth`` is the noise-free foreground, [B, C, H, W] or what broadcasts to it.
    """
    mask = (mask > 0.5).expand_as(foreground)
    error = (foreground - truth).square() * mask
    return error.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def background_mse(background: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over the whole image, the hidden part included: [B]."""
    return (background - truth).square().flatten(1).mean(1)


def threshold_scores(image: Tensor, truth: Tensor, levels: int = 99) -> dict[str, float]:
    """Mean mask IoU of thresholding gray images [B, 1, H, W], each the better of both polarities.

    - ``otsu``: Otsu's threshold of each image;
    - ``oracle_global``: one threshold for all images, the best for these very truths;
    - ``oracle_per_image``: the best threshold and polarity of each image for its own truth.
    """
    otsu = torch.tensor([threshold_otsu(i.numpy()) for i in image[:, 0]]).view(-1, 1, 1, 1)
    per_level = torch.stack(
        [
            torch.stack([mask_iou(image > level, truth), mask_iou(image <= level, truth)])
            for level in np.linspace(0, 1, levels + 2)[1:-1]
        ]
    )  # [levels, polarity, B]
    return {
        "otsu": max(mask_iou(m, truth).mean().item() for m in (image > otsu, image <= otsu)),
        "oracle_global": per_level.mean(-1).max().item(),
        "oracle_per_image": per_level.flatten(0, 1).amax(0).mean().item(),
    }
