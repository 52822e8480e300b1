"""Writing the layers of images as they come, in the format that the images have."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..data.images import TIFF_SUFFIXES, ArrayStack, ImageFolder, Images, TiffStack
from ..errors import InputError

LAYERS = ("foreground", "background", "mask")


@contextlib.contextmanager
def layer_writer(images: Images, out: str | Path, overwrite: bool = False) -> Iterator[Writer]:
    """Where the layers of ``images`` go: ``writer.write(i, layers)`` for i = 0, 1, ... in turn.

    They get their names in ``out`` when the block is left, all being written: what is there is whole.

    Raises:
        FileExistsError: a result is there already, and ``overwrite`` is not set.
    """
    out = Path(out)
    kind = {ImageFolder: FolderWriter, TiffStack: TiffWriter, ArrayStack: ArrayWriter}[type(images)]
    unfinished = out / ".unfinished"
    writer = kind(images, unfinished)
    there = [target for target in writer.targets if (out / target).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{out / there[0]} is there already, and nothing is overwritten unasked")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        for target in writer.targets:
            (unfinished / target).parent.mkdir(parents=True, exist_ok=True)
        writer.open()
        try:
            yield writer
        finally:
            writer.close()
        for target in writer.targets:
            (out / target).parent.mkdir(exist_ok=True)
            os.replace(unfinished / target, out / target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Writer:
    """Writes to ``folder``; ``targets`` are the files that will be in it."""

    targets: list[Path]

    def __init__(self, images: Images, folder: Path) -> None:
        self.images, self.folder = images, folder

    def open(self) -> None: ...

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        """The foreground, background and mask of frame i, each [H, W, C or 1]."""
        raise NotImplementedError

    def close(self) -> None: ...


class FolderWriter(Writer):
    """``mask/NAME.png`` and so on; TIFF for TIFF and PNG for the rest, as JPEG would blur the edges."""

    def __init__(self, images: ImageFolder, folder: Path) -> None:
        super().__init__(images, folder)
        self.names = [p.name if p.suffix.lower() in TIFF_SUFFIXES else f"{p.stem}.png" for p in images.paths]
        if len(set(self.names)) < len(self.names):
            twice = next(name for k, name in enumerate(self.names) if name in self.names[:k])
            raise InputError(f"two images in {images.path} would both be written as {twice}")
        self.targets = [Path(layer, name) for layer in LAYERS for name in self.names]

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        import imageio.v3
        import tifffile

        for layer, pixels in zip(LAYERS, layers, strict=True):
            path = self.folder / layer / self.names[i]
            if path.suffix.lower() in TIFF_SUFFIXES:
                tifffile.imwrite(path, pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            else:
                imageio.v3.imwrite(path, pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


class TiffWriter(Writer):
    """``mask.tif`` and so on, one uncompressed page a frame, in BigTIFF if larger than 4 GB."""

    def __init__(self, images: TiffStack, folder: Path) -> None:
        super().__init__(images, folder)
        self.targets = [Path(f"{layer}.tif") for layer in LAYERS]

    def open(self) -> None:
        import tifffile

        frame = self.images.frame(0)
        big = len(self.images) * (frame.nbytes + 1000) > 2**32 - 2**25  # with room for each page's header
        self.files = [tifffile.TiffWriter(self.folder / target, bigtiff=big) for target in self.targets]

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        for file, pixels in zip(self.files, layers, strict=True):
            if pixels.shape[-1] == 1:
                file.write(pixels[..., 0], contiguous=True, photometric="minisblack")
            else:
                file.write(pixels, contiguous=True, photometric="rgb")

    def close(self) -> None:
        for file in self.files:
            file.close()


class ArrayWriter(Writer):
    """``mask.npy`` and so on, memory-mapped; for an .npz too, as that format cannot be written in parts.

    The foreground and background have the shape of the input, the mask is T x H x W.
    """

    def __init__(self, images: ArrayStack, folder: Path) -> None:
        super().__init__(images, folder)
        self.targets = [Path(f"{layer}.npy") for layer in LAYERS]

    def open(self) -> None:
        count, stored = len(self.images), self.images.stored
        self.files = [
            np.lib.format.open_memmap(self.folder / target, "w+", self.images.frame(0).dtype, (count, *shape))
            for target, shape in zip(self.targets, (stored, stored, stored[:2]), strict=True)
        ]
        for file in self.files:  # a full disk is an error now; found when a page is touched, it is a crash
            with open(file.filename, "rb+") as reserved:
                os.posix_fallocate(reserved.fileno(), 0, file.offset + file.nbytes)

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        for file, pixels in zip(self.files, layers, strict=True):
            file[i] = pixels.reshape(file.shape[1:])

    def close(self) -> None:
        for file in self.files:
            file.flush()
        del self.files
