"""Training on a user's own images, with or without true masks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from ..separation.tiles import MULTIPLE
from .images import ImageFolder, Images, open_images
from .intensity import Intensity, IntensityRange, measure
from .loaders import SPLITS, Batches, ResumableLoader, ShuffledBatches


class ImageBatch(NamedTuple):
    """Images alone."""

    image: Tensor  # [B, C, H, W] in [0, 1]


class MaskedImageBatch(NamedTuple):
    """Images and their true masks, which are for scoring."""

    image: Tensor  # [B, C, H, W] in [0, 1]
    mask: Tensor  # [B, 1, H, W], 1 on the foreground, 0 elsewhere


class ImagesDataModule(L.LightningDataModule):
    """A folder, TIFF stack or array file of images, cut into training, validation and test set.

    The sets follow from ``seed``. Neighbouring frames of a movie are nearly equal, so those of a stack are
    not dealt out one by one: validation and test get one run of successive frames each, at a place given by
    the seed (the movie's end being joined to its start), and at most three pairs of neighbours are parted.
    The images of a folder are dealt out at random, unless ``movie`` says that they too are one.

    The batches are the same for any number of workers, and a batch is shared out among processes.

    Args:
        images: the folder or file, see :func:`~fgbg_cuda.vae.data.images.open_images`.
        masks: true masks, for scores: a folder of images with the names of those in ``images`` (the suffix
            may differ), or a stack of as many frames. What is not 0 is foreground.
        crop: side in pixels of the square taken at random from each image, a multiple of 8. It moves from
            epoch to epoch in training and stays put for validation and test. Default: whole images.
        intensity_range: the values that become 0 and 1, others being clipped; "auto" measures them. Default:
            those of the data type, see :class:`~fgbg_cuda.vae.data.intensity.Intensity`. They are stored
            in the checkpoint.
        batch_size: images in a batch, all processes together.
        val_fraction, test_fraction: parts of the images held out, at least one image each.
        movie: whether the images are successive. Default: those of a stack are, those of a folder not.
        seed: fixes the sets, their order and the crops.
        num_workers: processes that read images ahead of the training.
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
    ) -> None:
        super().__init__()
        images, masks = str(images), None if masks is None else str(masks)  # a checkpoint takes no Path
        self.save_hyperparameters()
        self.splits: dict[str, Crops] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        h = self.hparams
        if isinstance(h.intensity_range, (tuple, list)):
            images = open_images(h.images, Intensity(tuple(h.intensity_range)))
        elif h.intensity_range == "auto":
            # Whatever the values are, the images have to open for them to be measured.
            images = open_images(h.images, Intensity((0, 1)))
            images.intensity = Intensity(measure(images.sample()))
        else:
            images = open_images(h.images)
            warn_if_dark(images)
        masks = None if h.masks is None else open_masks(h.masks, images)
        size = images.shape[1:] if h.crop is None else (h.crop, h.crop)
        if any(side % MULTIPLE or side < MULTIPLE for side in size) or any(
            side > whole for side, whole in zip(size, images.shape[1:], strict=True)
        ):
            raise InputError(
                f"crop is {h.crop}, but the images in {h.images} are {images.shape[1]} x {images.shape[2]}: "
                f"expected a multiple of {MULTIPLE} that fits into them (None takes whole images, whose "
                "sides then have to be such multiples)"
            )
        movie = not isinstance(images, ImageFolder) if h.movie is None else h.movie
        parts = split(len(images), h.val_fraction, h.test_fraction, movie, h.seed)
        if len(parts["train"]) < h.batch_size:
            raise InputError(
                f"batch_size is {h.batch_size}, but {h.images} has only {len(parts['train'])} training images"
            )
        self.splits = {name: Crops(images, masks, part, size, h.seed) for name, part in parts.items()}

    def describe(self) -> dict[str, Any]:
        """What separating further images needs to know; the module puts it into its checkpoints."""
        train = self.splits["train"]
        shape = (train.images.shape[0], *train.size)
        return {"shape": shape, "intensity_range": train.images.intensity.range}

    def train_dataloader(self) -> DataLoader:
        count, h = len(self.splits["train"].indices), self.hparams
        return self._loader(ResumableLoader, "train", ShuffledCrops(count, h.batch_size, h.seed))

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def _eval_loader(self, name: str) -> DataLoader:
        return self._loader(
            DataLoader, name, Batches(len(self.splits[name].indices), self.hparams.batch_size)
        )

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
    """Batches of crops of the images ``indices``: item ``[k, ...]`` or ``[(k, epoch), ...]``.

    Where a crop lies follows from the seed, the image and the epoch, whoever reads it and when.
    """

    def __init__(
        self, images: Images, masks: Images | None, indices: np.ndarray, size: tuple[int, int], seed: int
    ) -> None:
        self.images, self.masks, self.indices = images, masks, indices
        self.size, self.seed = tuple(size), seed

    def __getitem__(self, keys: list[int] | list[tuple[int, int]]) -> ImageBatch | MaskedImageBatch:
        places = [self._place(*np.atleast_1d(key)) for key in keys]
        image = torch.stack([self.images.window(*place) for place in places])
        if self.masks is None:
            return ImageBatch(image)
        return MaskedImageBatch(image, torch.stack([self.masks.window(*place) for place in places]))

    def _place(self, k: int, epoch: int = 0) -> tuple[int, slice, slice]:
        i = int(self.indices[k])
        corner = np.random.default_rng([self.seed, i, epoch]).integers(
            np.subtract(self.images.shape[1:], self.size) + 1
        )
        return i, *(slice(start, start + side) for start, side in zip(corner, self.size, strict=True))


class ShuffledCrops(ShuffledBatches):
    """Shuffled batches of (index, epoch): the crop's place goes along, as workers do not know the epoch."""

    def __iter__(self):
        for batch in super().__iter__():
            yield [(k, self.epoch) for k in batch]


def split(count: int, val: float, test: float, movie: bool, seed: int) -> dict[str, np.ndarray]:
    """The numbers below ``count`` in three sets, each in ascending order; see :class:`ImagesDataModule`."""
    held_out = [max(1, round(count * fraction)) for fraction in (val, test)]
    if min(val, test) < 0 or val + test >= 1 or sum(held_out) >= count:
        raise InputError(
            f"val_fraction is {val:g} and test_fraction {test:g} of {count} images, expected fractions that "
            "leave images to train on"
        )
    rng = np.random.default_rng(seed)
    order = np.roll(np.arange(count), rng.integers(count)) if movie else rng.permutation(count)
    val, test, train = np.split(order, np.cumsum(held_out))
    return {name: np.sort(part) for name, part in zip(SPLITS, (train, val, test), strict=True)}


class Labels(Intensity):
    """Masks of any integer type, labels of objects included: what is not 0 becomes 1."""

    def to_unit(self, pixels: np.ndarray, where: str) -> np.ndarray:
        if pixels.dtype.kind not in "bui":
            raise InputError(
                f"{where} has values of type {pixels.dtype}, expected a mask of integers or bool"
            )
        return (pixels != 0).any(-1, keepdims=True).astype(np.float32)


def open_masks(path: str | Path, images: Images) -> Images:
    """The masks of ``images``: see :class:`ImagesDataModule`.

    Raises:
        InputError: another number or size, or a mask with no image.
    """
    masks = open_images(path, Labels())
    if len(masks) != len(images) or masks.shape[1:] != images.shape[1:]:
        raise InputError(
            f"{path} has {len(masks)} masks of {masks.shape[1]} x {masks.shape[2]}, "
            f"expected {len(images)} of {images.shape[1]} x {images.shape[2]} as in {images.path}"
        )
    if isinstance(masks, ImageFolder) and isinstance(images, ImageFolder):
        for mask, image in zip(masks.paths, images.paths, strict=True):
            if mask.stem != image.stem:
                raise InputError(f"{mask} stands beside {image}, expected a mask of that name")
    return masks


def warn_if_dark(images: Images) -> None:
    """Cameras of 10 to 14 bits save 16-bit files: most of the range of the data type is then empty."""
    frames = images.sample()
    _, high = images.intensity.bounds(frames[0].dtype)
    if frames[0].dtype.kind == "u" and (most := max(int(frame.max()) for frame in frames)) < high / 8:
        warnings.warn(
            f"no pixel of {images.path} is brighter than {most} of {high:g}: "
            'the model may see nothing but black; try intensity_range="auto"',
            stacklevel=2,
        )
