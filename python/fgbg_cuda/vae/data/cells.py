"""The synthetic sets of the thesis: ten small cells in focus, and large discs behind them.

F. Eichin, "Separation of Foreground and Background Signal in Variational Autoencoders", bachelor
thesis, Freiburg, 2020: images of 60x60 pixels, one channel; ten 6x6 cells of value 0.9, each active with
probability 0.5; noise N(0.3, 0.4^2) per pixel; one round disc of diameter 30 and value 0.6, or two. Signals
add. Each set is scaled to [0, 1] by its minimum and maximum and then binarised at 0.5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, whole
from .loaders import SPLITS, InMemorySplits

SIZE = 60
CELL_SIDE, CELL_VALUE, CELL_PROBABILITY = 6, 0.9, 0.5
DISC_DIAMETER, DISC_VALUE = 30, 0.6
NOISE_MEAN, NOISE_STD = 0.3, 0.4

# Centre (y, x) of each disc, in pixels, pixel i reaching from i to i + 1: bottom left, top right.
DISC_CENTRES = ((45.0, 15.0), (15.0, 45.0))
# How likely each disc of a set is to be active.
SETS = {"X90": (0.9,), "X50": (0.5,), "X90,20": (0.9, 0.2)}

# Top left corner (y, x) of each cell. The thesis tabulates none, only that some are under the disc: here
# three wholly under the bottom left disc, two under the top right one, and five that touch neither.
CELL_CORNERS = (
    (34, 15), (42, 5), (49, 17),
    (7, 38), (17, 47),
    (4, 5), (15, 18), (27, 26), (37, 35), (49, 46),
)  # fmt: skip
NO_DISC = -1
# Which disc each cell lies under, as an index into DISC_CENTRES.
CELLS_UNDER_DISC = (0, 0, 0, 1, 1, NO_DISC, NO_DISC, NO_DISC, NO_DISC, NO_DISC)


class CellsBatch(NamedTuple):
    """Images and their truth. Training reads ``image`` alone; the rest is for scoring."""

    image: Tensor  # [B, 1, 60, 60], 0 or 1
    mask: Tensor  # [B, 1, 60, 60] bool: an active cell is here
    cells: Tensor  # [B, 10] bool: the cell is active
    discs: Tensor  # [B, discs] bool: the disc is active
    covered: Tensor  # [B, 10] bool: an active disc lies behind the cell, active or not
    foreground: Tensor  # [B, 1, 60, 60] P(x = 1) of each pixel if the active cells were all there is
    background: Tensor  # [B, 1, 60, 60] P(x = 1) of each pixel if the active discs were all there is


def cell_masks() -> np.ndarray:
    """The pixels of each cell: bool [10, 60, 60]."""
    masks = np.zeros((len(CELL_CORNERS), SIZE, SIZE), bool)
    for mask, (y, x) in zip(masks, CELL_CORNERS, strict=True):
        mask[y : y + CELL_SIDE, x : x + CELL_SIDE] = True
    return masks


def disc_masks(count: int = len(DISC_CENTRES)) -> np.ndarray:
    """The pixels of the first ``count`` discs, those with their centre inside: bool [count, 60, 60]."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    masks = [np.hypot(y - cy, x - cx) < DISC_DIAMETER / 2 for cy, cx in DISC_CENTRES[:count]]
    return np.stack(masks)


class NoisySplit(NamedTuple):
    """The images of a split before they are scaled, and which cells and discs are active in them."""

    noisy: np.ndarray  # [N, 60, 60]
    cells: np.ndarray  # bool [N, 10]
    discs: np.ndarray  # bool [N, discs]


def draw(name: str, count: int, *, seed: int, split: str) -> NoisySplit:
    """``count`` images of set ``name``, unscaled; the same for the same arguments on every machine."""
    if name not in SETS:
        raise InputError(f"name: got {name!r}, takes one of {', '.join(SETS)}")
    rng = np.random.default_rng([seed, list(SETS).index(name), SPLITS.index(split)])
    cells = rng.random((count, len(CELL_CORNERS))) < CELL_PROBABILITY
    discs = rng.random((count, len(SETS[name]))) < SETS[name]
    noisy = rng.normal(NOISE_MEAN, NOISE_STD, (count, SIZE, SIZE))
    noisy += foreground_signal(cells) + background_signal(discs)
    return NoisySplit(noisy, cells, discs)


def foreground_signal(cells: np.ndarray) -> np.ndarray:
    """What active cells [N, 10] add to each pixel: [N, 60, 60]."""
    return CELL_VALUE * np.tensordot(cells, cell_masks(), 1)


def background_signal(discs: np.ndarray) -> np.ndarray:
    """What active discs [N, discs] add to each pixel: [N, 60, 60]."""
    return DISC_VALUE * np.tensordot(discs, disc_masks(discs.shape[1]), 1)


def pixel_probability(signal: Tensor, threshold: float) -> Tensor:
    """P(x = 1) of pixels with this noise-free signal, Phi((signal + 0.3 - threshold) / 0.4), float64.

    It is the noise-free image in the units of the binarised ones: their mean over the noise.
    """
    return torch.special.ndtr((signal.double() + NOISE_MEAN - threshold) / NOISE_STD)


def covered_cells(discs: np.ndarray) -> np.ndarray:
    """Which cells have an active disc behind them, from the discs' activities [N, discs]: bool [N, 10]."""
    none = np.zeros((len(discs), len(DISC_CENTRES) + 1 - discs.shape[1]), bool)
    # Discs that the set lacks are never active; nor is NO_DISC, the last column.
    return np.concatenate([discs, none], axis=1)[:, CELLS_UNDER_DISC]


class CellsUnderDisc(InMemorySplits):
    """One of the thesis's sets, X90, X50 or X90,20, with the truth about cells and discs.

    The set itself, all of its 2000 images, is for training. Validation and test images are drawn beyond
    them by the same recipe from streams of their own, and scaled by the minimum and maximum of the set: with
    those, an image is held out without the set being any smaller than the thesis's.

    Args:
        name: "X90", "X50" or "X90,20": how often each disc is active, in percent.
        seed: fixes every image and the order in which training sees them.
        train, val, test: number of images in each split.
        batch_size: images in a batch.

    After :meth:`setup`, ``splits`` holds a :class:`CellsBatch` each for "train", "val" and "test", and
    ``threshold`` the value at which the noisy images were cut: the middle of their range.
    """

    def __init__(
        self,
        name: str = "X90",
        seed: int = 0,
        train: int = 2000,
        val: int = 500,
        test: int = 1000,
        batch_size: int = 25,
    ) -> None:
        super().__init__()
        whole(0, seed=seed)
        whole(1, train=train, val=val, test=test, batch_size=batch_size)
        self.save_hyperparameters()
        self.splits: dict[str, CellsBatch] = {}
        self.threshold: float | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        h = self.hparams
        drawn = {split: draw(h.name, h[split], seed=h.seed, split=split) for split in SPLITS}
        low, high = drawn["train"].noisy.min(), drawn["train"].noisy.max()
        self.threshold = float(low + 0.5 * (high - low))
        self.splits = {split: self._batch(images) for split, images in drawn.items()}

    def _batch(self, images: NoisySplit) -> CellsBatch:
        noisy, cells, discs = images
        foreground, background = (
            torch.from_numpy(s[:, None]) for s in (foreground_signal(cells), background_signal(discs))
        )
        return CellsBatch(
            image=torch.from_numpy(noisy[:, None] > self.threshold).float(),
            mask=foreground > 0,
            cells=torch.from_numpy(cells),
            discs=torch.from_numpy(discs),
            covered=torch.from_numpy(covered_cells(discs)),
            foreground=pixel_probability(foreground, self.threshold).float(),
            background=pixel_probability(background, self.threshold).float(),
        )

    def describe(self) -> dict[str, Any]:
        """What separating further images needs to know; the module puts it into its checkpoints."""
        return {"shape": tuple(self.splits["train"].image.shape[1:]), "intensity_range": None}
