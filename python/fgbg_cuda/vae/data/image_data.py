"""Training on a user's own images, with or without true masks."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, whole
from .images import ImageFolder, Images, open_images
from .intensity import Intensity, IntensityRange, Labels, measure, warn_of_other_intensities
from .loaders import SPLITS, Batches, ResumableLoader, ShuffledBatches, overfits

# In an epoch, at the least: what a few epochs learn is not to depend on how many images there are.
BATCHES = 50


class ImageBatch(NamedTuple):
    """Images alone."""

    image: Tensor  # [B, C, H, W] in [0, 1]


class MaskedImageBatch(NamedTuple):
    """Images and their true masks, which are for scoring."""

    image: Tensor  # [B, C, H, W] in [0, 1]
    mask: Tensor  # [B, 1, H, W], 1 on the foreground, 0 elsewhere


class ImagesDataModule(L.LightningDataModule):
    """A folder or file of images, cut into training, validation and test set.

    The sets follow from ``seed``. Neighbouring frames of a movie are nearly equal, so those of a stack are
    not dealt out one by one: validation and test get one run of successive frames each, at a place given by
    the seed (the movie's end being joined to its start), and at most three pairs of neighbours are parted.
    The images of a folder are dealt out at random, unless ``movie`` says that they too are one. One or two
    images are cut across into three parts, one for each set. If they are too small for that, all sets
    have crops of the whole, and a warning says so.

    The batches are the same for any number of workers, and a batch is shared out among processes.

    Args:
        images: the folder or file, see :func:`~fgbg_cuda.vae.data.images.open_images`.
        masks: true masks, for scores: a folder of images with the names of those in ``images`` (the suffix
            may differ), or a stack of as many frames. They are read by index, whatever the colours of a
            palette: what is not 0 is foreground.
        crop: side in pixels of the square taken at random from each image. It moves from epoch to epoch in
            training and stays put for validation and test. A side of an image that is shorter is
            taken whole, with a warning. Default: whole images.
        intensity_range: the values that become 0 and 1, others being clipped, or a text, "0,4095"; "auto"
            measures them. Default: those of the data type, see
            :class:`~fgbg_cuda.vae.data.intensity.Intensity`. They are stored in the checkpoint.
        batch_size: images in a batch, all processes together.
        val_fraction, test_fraction: parts of the images held out, at least one image each.
        movie: whether the images are successive. Default: those of a stack are, those of a folder not.
        seed: fixes the sets, their order and the crops.
        num_workers: processes that read images ahead of the training.
        channel: the one that is read of images with several, counted from 0. Default: there is one, or RGB.
        crops_per_image: how often an epoch has each training image, each time with another crop. Default:
            once, or as often as it takes for an epoch to have 50 batches. Validation and test have as many
            crops of an image; whole images they have once.
    """

    def __init__(
        self,
        images: str,
        masks: str | None = None,
        crop: int | None = None,
        intensity_range: IntensityRange = None,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        movie: bool | None = None,
        seed: int = 0,
        num_workers: int = 0,
        channel: int | None = None,
        crops_per_image: int | None = None,
    ) -> None:
        super().__init__()
        whole(0, seed=seed, num_workers=num_workers)
        whole(1, batch_size=batch_size)
        given = {"crop": crop, "crops_per_image": crops_per_image}
        whole(1, **{name: value for name, value in given.items() if value is not None})
        images, masks = str(images), None if masks is None else str(masks)  # a checkpoint takes no Path
        self.save_hyperparameters()
        self.splits: dict[str, Crops] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        h = self.hparams
        # Whatever the values are, the images have to open for them to be measured.
        given = (0, 1) if h.intensity_range == "auto" else h.intensity_range
        images = open_images(h.images, Intensity(given), h.channel)
        sample = images.sample()
        if h.intensity_range == "auto":
            images.intensity = Intensity(measure(sample))
        else:
            warn_of_other_intensities(str(h.images), sample, images.intensity)
        self.trained = images.intensity.occupied(sample)
        masks = None if h.masks is None else open_masks(h.masks, images)
        height, width = images.shape[1:]
        size = (height, width) if h.crop is None else (min(h.crop, height), min(h.crop, width))
        if h.crop is not None and size != (h.crop, h.crop):
            warnings.warn(
                f"crop is {h.crop}, but the images in {h.images} are {height} x {width}: "
                f"{size[0]} x {size[1]} is taken",
                stacklevel=2,
            )
        parts, regions = self._divide(images)
        count = len(parts["train"])
        per_image = h.crops_per_image or max(1, math.ceil(BATCHES * h.batch_size / count))
        if count * per_image < h.batch_size:
            raise InputError(
                f"batch_size is {h.batch_size}, but an epoch has only {count} training images, "
                f"{per_image} times: expected a larger crops_per_image or smaller batches"
            )
        self.splits = {
            name: Crops(
                images,
                masks,
                parts[name],
                size,
                regions[name],
                per_image if name == "train" or size != (height, width) else 1,
                (h.seed, SPLITS.index(name)),
            )
            for name in SPLITS
        }

    def _divide(self, images: Images) -> tuple[dict[str, np.ndarray], dict[str, tuple[slice, slice]]]:
        """The images of each set, and the rows and columns that it has of them."""
        h, (height, width) = self.hparams, images.shape[1:]
        everywhere = dict.fromkeys(SPLITS, (slice(0, height), slice(0, width)))
        if len(images) > 2:
            movie = not isinstance(images, ImageFolder) if h.movie is None else h.movie
            return split(len(images), h.val_fraction, h.test_fraction, movie, h.seed), everywhere
        if h.crop is None:
            raise InputError(
                f"{h.images} has {len(images)} images, expected 3 or more, or of still images "
                "a crop, for training, validation and test to have parts of them"
            )
        regions = split_area((height, width), h.crop, h.val_fraction, h.test_fraction)
        if regions is None:
            warnings.warn(
                f"the images in {h.images} are {height} x {width}, too small for three parts with room for a "
                f"crop of {h.crop}: validation and test have pixels that are trained on",
                stacklevel=3,
            )
        return dict.fromkeys(SPLITS, np.arange(len(images))), regions or everywhere

    def describe(self) -> dict[str, Any]:
        """What separating further images needs to know; the module puts it into its checkpoints."""
        train = self.splits["train"]
        return {
            "shape": (train.images.shape[0], *train.size),
            "intensity_range": train.images.intensity.range,
            "trained_intensities": self.trained,
        }

    def frames(self, count: int) -> Tensor:
        """At most ``count`` whole training images, spread evenly over them: [N, C, H, W] in [0, 1].

        Raises:
            InputError: the batches are of crops.
        """
        train = self.splits["train"]
        if train.size != train.images.shape[1:]:
            raise InputError(
                f"crop is {self.hparams.crop}, but a model of one scene learns from whole frames: "
                "expected None"
            )
        some = np.linspace(0, len(train.indices) - 1, min(count, len(train.indices))).round().astype(int)
        return torch.stack([train.images[i] for i in train.indices[some]])

    def train_dataloader(self) -> DataLoader:
        if overfits(self):
            return self._eval_loader("train")
        count, h = len(self.splits["train"]), self.hparams
        return self._loader(ResumableLoader, "train", ShuffledCrops(count, h.batch_size, h.seed))

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def _eval_loader(self, name: str) -> DataLoader:
        return self._loader(DataLoader, name, Batches(len(self.splits[name]), self.hparams.batch_size))

    def _loader(self, kind: type[DataLoader], name: str, batches: Batches) -> DataLoader:
        workers = self.hparams.num_workers
        return kind(
            self.splits[name],
            sampler=batches,
            batch_size=None,  # an item of the dataset is a batch
            num_workers=workers,
            persistent_workers=workers > 0,
            # A loader draws a number for its workers, from the global generator if it has none of its own:
            # the noise of the training would then depend on their number.
            generator=torch.Generator(),
        )


class Crops(Dataset[NamedTuple]):
    """Batches of crops, ``per_image`` of each of ``indices``: item ``[k, ...]`` or ``[(k, epoch), ...]``.

    Where in the ``region`` (rows and columns) a crop lies follows from the seeds, k and the epoch, whoever
    reads it and when.
    """

    def __init__(
        self,
        images: Images,
        masks: Images | None,
        indices: np.ndarray,
        size: tuple[int, int],
        region: tuple[slice, slice],
        per_image: int,
        seeds: tuple[int, int],
    ) -> None:
        self.images, self.masks, self.indices = images, masks, indices
        self.size, self.region, self.per_image, self.seeds = tuple(size), region, per_image, seeds

    def __len__(self) -> int:
        return len(self.indices) * self.per_image

    def __getitem__(self, keys: list[int] | list[tuple[int, int]]) -> ImageBatch | MaskedImageBatch:
        places = [self._place(*np.atleast_1d(key)) for key in keys]
        image = torch.stack([self.images.window(*place) for place in places])
        if self.masks is None:
            return ImageBatch(image)
        return MaskedImageBatch(image, torch.stack([self.masks.window(*place) for place in places]))

    def _place(self, k: int, epoch: int = 0) -> tuple[int, slice, slice]:
        repeat, number = divmod(int(k), len(self.indices))
        i, (seed, part) = int(self.indices[number]), self.seeds
        rng = np.random.default_rng([seed, i, epoch, len(SPLITS) * repeat + part])
        starts = [
            rng.integers(side.start, side.stop - length + 1)
            for side, length in zip(self.region, self.size, strict=True)
        ]
        return i, *(slice(start, start + side) for start, side in zip(starts, self.size, strict=True))


class ShuffledCrops(ShuffledBatches):
    """Shuffled batches of (index, epoch): the crop's place goes along, as workers do not know the epoch."""

    def __iter__(self):
        for batch in super().__iter__():
            yield [(k, self.epoch) for k in batch]


def _held_out(count: int, val: float, test: float, least: int) -> list[int]:
    """How many of ``count`` are for validation and for test."""
    if not (val >= 0 and test >= 0 and val + test < 1):  # nor NaN
        raise InputError(
            f"val_fraction is {val:g} and test_fraction {test:g}, expected fractions that leave images to "
            "train on"
        )
    return [max(least, round(count * fraction)) for fraction in (val, test)]


def split(count: int, val: float, test: float, movie: bool, seed: int) -> dict[str, np.ndarray]:
    """The numbers below ``count`` in three sets, each in ascending order; see :class:`ImagesDataModule`."""
    held_out = _held_out(count, val, test, 1)
    if sum(held_out) >= count:
        raise InputError(
            f"val_fraction is {val:g} and test_fraction {test:g} of {count} images, expected fractions that "
            "leave images to train on"
        )
    rng = np.random.default_rng(seed)
    order = np.roll(np.arange(count), rng.integers(count)) if movie else rng.permutation(count)
    val, test, train = np.split(order, np.cumsum(held_out))
    return {name: np.sort(part) for name, part in zip(SPLITS, (train, val, test), strict=True)}


def split_area(
    size: tuple[int, int], crop: int, val: float, test: float
) -> dict[str, tuple[slice, slice]] | None:
    """The rows and columns of three parts of an image, across its longer side; None: a crop does not fit."""
    longer = int(np.argmax(size))
    held_out = _held_out(size[longer], val, test, crop)
    ends = np.cumsum([0, size[longer] - sum(held_out), *held_out]).tolist()
    if ends[1] < crop:
        return None
    whole = [slice(0, side) for side in size]
    return {
        name: tuple(slice(start, end) if axis == longer else whole[axis] for axis in (0, 1))
        for name, (start, end) in zip(SPLITS, itertools.pairwise(ends), strict=True)
    }


def open_masks(path: str | Path, images: Images) -> Images:
    """The masks of ``images``: see :class:`ImagesDataModule`.

    Warns if they cover nothing or nearly everything.

    Raises:
        InputError: another number or size, a mask with no image, or no labels.
    """
    masks = open_images(path, Labels())
    masks[0]  # says whether these are labels
    if len(masks) != len(images) or masks.shape[1:] != images.shape[1:]:
        raise InputError(
            f"{path} has {len(masks)} masks of {masks.shape[1]} x {masks.shape[2]}, "
            f"expected {len(images)} of {images.shape[1]} x {images.shape[2]} as in {images.path}"
        )
    if isinstance(masks, ImageFolder) and isinstance(images, ImageFolder) and images.path.is_dir():
        for mask, image in zip(masks.paths, images.paths, strict=True):
            if mask.stem != image.stem:
                raise InputError(f"{mask} stands beside {image}, expected a mask of that name")
    share = np.mean([np.mean(mask != 0) for mask in masks.sample()])
    if not 0.001 <= share <= 0.9:
        warnings.warn(
            f"the masks in {path} cover {share:.2%} of the images: expected 0 on the background alone",
            stacklevel=3,
        )
    return masks
