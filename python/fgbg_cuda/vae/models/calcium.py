"""A model of calcium imaging: cells that light up, each a footprint times a trace, over a slow background."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.feature import peak_local_max
from torch import Tensor, nn

import fgbg_cuda

from ..errors import InputError, positive
from .layered import Latent, Separation
from .local_tones import SPREAD
from .scene import check_place, check_start, spread_of

LEAST_NOISE = 1 / 255 / 12**0.5  # standard deviation of what rounding to 8 bits takes off
NOISE_LEFT = 0.06  # of how bright cells are, of what the blur leaves of a pixel's noise
SEEN = 3.5  # standard deviations by which a peak of the activity stands out, to be a cell's
CERTAIN = 20.0  # of a cell's trace over its noise, of what is kept
FAINT = 0.2  # of the median cell's trace: what is fainter is what the background leaves
ROUNDS = 3  # of looking for cells, each in what the cells found so far leave
SAME = 0.8  # correlation of two overlapping cells' traces from which they are one
SWEEPS = 10  # of the traces of a frame


class CalciumOutput(NamedTuple):
    """What the model says about a batch; no latent is sampled."""

    cells: Tensor  # [B, 1, H, W], the sum of footprints times traces
    traces: Tensor  # [B, cells], what each cell adds to a frame where its footprint is largest
    activity: Tensor  # [B, 1, H, W], the frame over its background
    kl_fg: Tensor  # [B], 0
    kl_bg: Tensor  # [B], 0
    z_fg: tuple[Latent, ...]  # none
    z_bg: tuple[Latent, ...]  # none


class CalciumModel(nn.Module):
    r"""Cells over a background that changes slowly in space: :math:`x = b + \sum_k A_k c_k + noise`.

    - The background b of a frame is each pixel's minimum over the movie, and on top of it what remains of the
      blurred frame when all that is smaller than a cell is taken off: a morphological opening with an octagon
      of 1.5 cells across (as in Lu et al., "MIN1PIPE", 2018). The blur is no wider than the noise asks for.
    - A footprint :math:`A_k \ge 0` lies within a disk around its cell. They start from peaks of the activity
      x - b, by hierarchical alternating least squares (Cichocki & Phan, 2009), and are then learned.
    - Its trace :math:`c_k \ge 0` is not encoded but solved for each frame: non-negative least squares.

    What :meth:`separate` calls foreground is the mean of what footprints and traces explain and of the
    activity as it is, for cells that were not found; the mask is its share of the larger of the two.

    Call :meth:`start` before training: it finds the cells.

    Args:
        shape: (1, H, W) of the frames.
        cell: diameter of a cell in pixels.

    Raises:
        InputError: an option is out of range, or the frames have colours.
    """

    one_scene = True  # it separates frames of that size alone, as wholes

    def __init__(self, shape: tuple[int, int, int] = (1, 128, 128), cell: float = 7.0) -> None:
        super().__init__()
        positive(cell=cell)
        if shape[0] != 1:
            raise InputError(f"the frames have {shape[0]} channels, expected 1 (data.channel chooses one)")
        if 1.5 * cell > min(shape[1:]):
            raise InputError(
                f"cell is {cell:g}, but the frames are {shape[1]} x {shape[2]}: expected pixels, at most two "
                "thirds of a frame's side"
            )
        self.cell = cell
        self.footprints = nn.Parameter(torch.zeros(0, *shape[1:]))
        self.register_buffer("support", torch.zeros(0, *shape[1:], dtype=torch.bool))
        self.register_buffer("floor", torch.zeros(shape))
        self.register_buffer("known", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("blur", torch.tensor(0.0))
        self.register_buffer("noise", torch.tensor(1.0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # How many cells there are, the movie tells.
        count = len(state_dict[f"{prefix}footprints"])
        self.footprints = nn.Parameter(self.footprints.new_zeros(count, *self.footprints.shape[1:]))
        self.support = self.support.new_zeros(count, *self.support.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def start(self, frames: Tensor) -> None:
        """Finds the cells in frames [N, 1, H, W], in their order.

        Warns if there are none.

        Raises:
            InputError: the frames have another shape than the model, or are fewer than 2.
        """
        check_start(frames, self.floor, 2)
        device = self.floor.device
        frames = frames.to(device)
        self.floor.copy_(frames.min(0).values)
        changing = (frames != frames[0]).any(0)  # not the black edges that motion correction leaves
        self.known.copy_(changing | ~changing.any())
        steps = (frames[1:] - frames[:-1])[:, self.known]
        # Which is 0 where most pixels mostly keep their value.
        self.noise.copy_((spread_of(steps.flatten()) / 2**0.5).clamp(min=LEAST_NOISE))
        # A blur of standard deviation b leaves 1 / (2 sqrt(pi) b) of white noise.
        most = self.cell / 6
        self.blur.fill_(most)
        bright = quantile_of(self.activity(frames)[:, self.known], 0.99)
        white = white_noise(frames, self.known)
        self.blur.copy_((white / (2 * math.pi**0.5 * NOISE_LEFT * bright + 1e-12)).clamp(max=most))
        activity = self.activity(frames)[:, 0]
        footprints, support = find_cells(activity.cpu().numpy(), self.cell)
        self.footprints = nn.Parameter(torch.from_numpy(footprints).to(device))
        self.support = torch.from_numpy(support).to(device)
        if not len(footprints):
            warnings.warn(
                f"no cell of about {self.cell:g} pixels across was found, and none will be learned: "
                "try another cell",
                stacklevel=2,
            )

    def activity(self, x: Tensor) -> Tensor:
        """What the blurred frames [B, 1, H, W] have over their background."""
        blurred = blurred_within(x - self.floor, self.known, float(self.blur))
        opened = opened_within(blurred, self.known, round(1.5 * self.cell / 2))
        return (blurred - opened).where(self.known, 0)

    def _footprints(self) -> Tensor:
        return self.footprints.clamp(min=0) * self.support

    @torch.no_grad()
    def cells(self) -> Tensor:
        """The footprints, with 1 as the largest value of each: [cells, H, W]."""
        footprints = self._footprints()
        return footprints / footprints.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]

    @torch.no_grad()
    def scene_pictures(self) -> dict[str, Tensor]:
        """What is known of the scene, images [1, H, W] in [0, 1] by name: each pixel's minimum, the cells."""
        cells = self.cells().amax(0) if len(self.footprints) else torch.zeros_like(self.floor[0])
        return {"minimum": self.floor.clamp(0, 1), "cells": cells[None]}

    @staticmethod
    def _solved(footprints: Tensor, activity: Tensor) -> Tensor:
        """Traces [B, cells] that explain activity [B, 1, H, W] best, by coordinate descent."""
        a, y = footprints.flatten(1), activity.flatten(1)
        gram, seen = a @ a.T, y @ a.T
        traces = torch.zeros_like(seen)
        for _ in range(SWEEPS):
            for k in range(len(a)):
                step = (seen[:, k] - traces @ gram[:, k]) / gram[k, k].clamp(min=1e-12)
                traces[:, k] = (traces[:, k] + step).clamp(min=0)
        return traces

    def forward(
        self, x: Tensor, sample: bool = True, seed: int | None = None, first: int = 0
    ) -> CalciumOutput:
        """What footprints and traces say of x [B, 1, H, W]; nothing is random."""
        check_place(x, self.floor)
        footprints = self._footprints()
        with torch.no_grad():
            activity = self.activity(x)
            traces = self._solved(footprints, activity)
        cells = (traces @ footprints.flatten(1)).view_as(x)
        zero = x.new_zeros(len(x))
        return CalciumOutput(
            cells, traces * footprints.detach().flatten(1).amax(1), activity, zero, zero, (), ()
        )

    def reconstruction(self, out: CalciumOutput) -> Tensor:
        """-log p(activity | cells) in nats, Gaussian with one noise for all pixels: [B]."""
        return fgbg_cuda.reconstruction_loss(
            out.cells, out.activity, likelihood="gaussian", scale=self.noise, reduction="sample"
        )

    @torch.no_grad()
    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, 1, H, W]: see :meth:`layers`."""
        return self.layers(self(x), x)

    @staticmethod
    def layers(out: CalciumOutput, x: Tensor) -> Separation:
        """The layers of x [B, 1, H, W], of which ``out`` is what the model says.

        The foreground is the cells as they shine before black, the background what the frame has less its
        activity: it keeps the frame's noise.
        """
        found = 0.5 * (out.cells + out.activity)
        most = torch.maximum(out.cells, out.activity)
        mask = found / most.clamp(min=1e-6)
        return Separation(found.clamp(max=1), (x - most).clamp(0, 1), mask, (x - most + found).clamp(0, 1))


def white_noise(frames: Tensor, known: Tensor) -> Tensor:
    """The standard deviation of the noise that pixels [N, 1, H, W] do not share with their neighbours: []."""
    steps = frames[1:] - frames[:-1]
    around = (steps[..., :-2, 1:-1] + steps[..., 2:, 1:-1] + steps[..., 1:-1, :-2] + steps[..., 1:-1, 2:]) / 4
    rest = (steps[..., 1:-1, 1:-1] - around)[:, known[:, 1:-1, 1:-1]]
    return spread_of(rest.flatten()) / (2 * 1.25) ** 0.5  # two frames; a pixel and a quarter of four


def blurred_within(x: Tensor, known: Tensor, width: float) -> Tensor:
    """x [B, 1, H, W] blurred by a Gaussian, from its pixels in ``known`` [1, H, W] alone."""
    reach = math.ceil(3 * width)
    if width < 0.2:  # a neighbour's weight would be less than 1e-5
        return x
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / width) ** 2).to(x)
    weights /= weights.sum()

    def blurred(x: Tensor) -> Tensor:
        x = F.conv2d(x, weights[None, None, :, None], padding=(reach, 0))
        return F.conv2d(x, weights[None, None, None], padding=(0, reach))

    share = known[None].to(x)
    return blurred(x * share) / blurred(share).clamp(min=1e-6)


def opened_within(x: Tensor, known: Tensor, radius: int) -> Tensor:
    """x [B, 1, H, W] without what an octagon of that radius does not fit under, which covers ``known`` alone.

    The morphological opening, the maximum of minima. An octagon is squares and diamonds one after the other.
    """
    squares = round((2**0.5 - 1) * radius)
    lowest = _lowest(x.where(known, torch.inf), squares, radius - squares)
    return -_lowest((-lowest).where(known, torch.inf), squares, radius - squares)


def _lowest(x: Tensor, squares: int, diamonds: int) -> Tensor:
    """The minimum over an octagon around each pixel."""
    for _ in range(squares):
        x = -F.max_pool2d(-x, 3, 1, 1)
    for _ in range(diamonds):
        beside = F.max_pool2d(-x, (1, 3), 1, (0, 1))
        x = -torch.maximum(beside, F.max_pool2d(-x, (3, 1), 1, (1, 0)))
    return x


def quantile_of(x: Tensor, q: float) -> Tensor:
    """A quantile of all of x, of a part of it where there is much: torch sorts no more than 2^24 numbers."""
    return x.flatten()[:: max(1, x.numel() // 2**22)].quantile(q)


def find_cells(activity: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Footprints of the cells in activity [T, H, W] >= 0, and the disks in which they lie: both [N, H, W].

    Peaks of the largest activity (blurred over space and time) that stand out are cells. Their footprints and
    traces are fitted, and what they leave is searched again. Then those that overlap and go together are made
    one, and what is too small or too faint is left out. A footprint's largest value is 1.
    """
    height, width = activity.shape[1:]
    flat = activity.reshape(len(activity), -1)
    y, x = np.indices((height, width))
    changing = (activity != activity[0]).any(0)  # the rest, such as black edges, tells nothing of noise
    if not changing.any():
        return np.zeros((0, height, width), np.float32), np.zeros((0, height, width), bool)
    noise = SPREAD * np.median(np.abs(np.diff(activity[:, changing], axis=0))) / 2**0.5 + 1e-12
    places = np.zeros((0, 2), int)
    a, c = np.zeros((0, flat.shape[1]), np.float32), np.zeros((0, len(flat)), np.float32)
    support = np.zeros(a.shape, bool)
    for _ in range(ROUNDS):
        left = activity - (c.T @ a).reshape(activity.shape)
        image = ndimage.gaussian_filter(left, (2, 1, 1)).max(0)
        middle = np.median(image[changing])
        least = middle + SEEN * SPREAD * np.median(np.abs(image[changing] - middle))
        apart = max(1, round(cell / 3))
        peaks = peak_local_max(image, min_distance=apart, threshold_abs=least, exclude_border=False)
        if len(places):
            nearest = np.hypot(*(peaks[:, None] - places[None]).transpose(2, 0, 1)).min(1)
            peaks = peaks[nearest > cell / 3]
        if not len(peaks):
            break
        patches = [left[:, max(v - 1, 0) : v + 2, max(h - 1, 0) : h + 2].mean((1, 2)) for v, h in peaks]
        traces = np.stack(patches)
        c = np.concatenate([c, np.maximum(traces - np.quantile(traces, 0.2, axis=1, keepdims=True), 0)])
        a = np.concatenate([a, np.zeros((len(peaks), flat.shape[1]), np.float32)])
        disks = np.stack([np.hypot(y - v, x - h) <= 0.85 * cell for v, h in peaks])
        support = np.concatenate([support, disks.reshape(len(peaks), -1)])
        places = np.concatenate([places, peaks])
        _fit(flat, a, c, support, sweeps=6)
    a, c, support = _merged(flat, a, c, support)
    _fit(flat, a, c, support, sweeps=4)
    peaks = a.max(1, keepdims=True) + 1e-12
    a, c = a / peaks, c * peaks
    area = (a > 0.3).sum(1)
    bright = np.quantile(c, 0.99, axis=1) - np.median(c, axis=1)
    certain = bright * np.linalg.norm(a, axis=1) > CERTAIN * noise
    kept = (area >= 0.14 * cell**2) & certain  # a sixth of a disk's area
    kept &= bright > FAINT * np.median(bright[kept]) if kept.any() else kept
    return a[kept].reshape(-1, height, width), support[kept].reshape(-1, height, width)


def _fit(flat: np.ndarray, a: np.ndarray, c: np.ndarray, support: np.ndarray, sweeps: int) -> None:
    """Hierarchical alternating least squares of flat [T, P] = c.T @ a, in place: a within its support."""

    def descend(ours: np.ndarray, theirs: np.ndarray, data: np.ndarray, allowed: np.ndarray | None) -> None:
        seen, gram = theirs @ data, theirs @ theirs.T
        for _ in range(2):
            for k in range(len(ours)):
                step = (seen[k] - gram[k] @ ours) / max(gram[k, k], 1e-9)
                ours[k] = np.maximum(ours[k] + step, 0)
                if allowed is not None:
                    ours[k] *= allowed[k]

    for _ in range(sweeps):
        descend(a, c, flat, support)
        descend(c, a, flat.T, None)


def _merged(
    flat: np.ndarray, a: np.ndarray, c: np.ndarray, support: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of which two overlap and go together are made one."""
    while len(a) > 1:
        unit = a / np.linalg.norm(a, axis=1, keepdims=True).clip(1e-12)
        overlap = unit @ unit.T
        np.fill_diagonal(overlap, 0)
        centred = c - c.mean(1, keepdims=True)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
        same = (overlap > 0.1) & (centred @ centred.T > SAME) | (overlap > 0.6)
        if not same.any():
            break
        i, j = np.unravel_index((overlap * same).argmax(), overlap.shape)
        support[i] |= support[j]
        a[i] = np.maximum(a[i], a[j])
        a, c, support = (np.delete(values, j, axis=0) for values in (a, c, support))
        _fit(flat, a, c, support, sweeps=2)
    return a, c, support
