"""A user's own images: a folder of files, a TIFF stack or a NumPy array, read one frame at a time."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .intensity import Intensity

FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TIFF_SUFFIXES = (".tif", ".tiff")
ARRAY_SUFFIXES = (".npy", ".npz")


class Images(Dataset[Tensor]):
    """Frames of one size, grayscale (C = 1) or RGB (C = 3): item i is float32 [C, H, W] in [0, 1].

    Made by :func:`open_images`. Only what is asked for is read, so a stack may be larger than memory.

    Attributes:
        path: the folder or file.
        shape: (C, H, W).
        intensity: how values map to [0, 1].
    """

    path: Path
    shape: tuple[int, int, int]
    intensity: Intensity

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def frame(self, i: int) -> np.ndarray:
        """Frame i as it is stored, [H, W, C]; memory-mapped where the format allows."""

    @abstractmethod
    def name(self, i: int) -> str:
        """How frame i is called in messages."""

    def __getitem__(self, i: int) -> Tensor:
        return self.window(i, slice(None), slice(None))

    def window(self, i: int, rows: slice, columns: slice) -> Tensor:
        """A part of frame i: float32 [C, h, w] in [0, 1]."""
        pixels = self.intensity.to_unit(self.frame(i)[rows, columns], self.name(i))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def sample(self, count: int = 32) -> list[np.ndarray]:
        """``count`` frames, or all if there are fewer, evenly spread and always the same."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return [self.frame(i) for i in chosen]


def open_images(path: str | Path, intensity: Intensity = Intensity()) -> Images:  # noqa: B008  (frozen)
    """The images at ``path``:

    - a folder of PNG, JPEG and TIFF images, in the order of their names, or a single PNG or JPEG (of an
      RGB PNG of 16 bits the upper 8 are read: a TIFF keeps all);
    - a TIFF stack (.tif, .tiff), T x H x W or T x H x W x 3;
    - an array file (.npy, .npz with one array in it), T x H x W or T x H x W x C. An .npz is read into
      memory as a whole, as its format knows no other way.

    Raises:
        InputError: naming the folder or file, what it is, and what is accepted.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix in TIFF_SUFFIXES:
            return TiffStack(path, intensity)
        if suffix in ARRAY_SUFFIXES:
            return ArrayStack(path, intensity)
    if path.is_dir() or (path.is_file() and suffix in FILE_SUFFIXES):
        return ImageFolder(path, intensity)
    raise InputError(
        f"{path} is not there, expected a folder of images or a file"
        if not path.exists()
        else f"{path} is none of {', '.join(FILE_SUFFIXES + ARRAY_SUFFIXES)}, nor a folder of images"
    )


class ImageFolder(Images):
    """The images of a folder, all of one size; other files and folders in it are passed over.

    Every image is read once at the start, so that a bad one stops the program before training and not
    hours into it.
    """

    def __init__(self, folder: str | Path, intensity: Intensity = Intensity()) -> None:  # noqa: B008
        self.path, self.intensity = Path(folder), intensity
        if self.path.is_file():
            self.paths = [self.path]
        elif self.path.is_dir():
            self.paths = sorted(
                path
                for path in self.path.iterdir()
                if path.suffix.lower() in FILE_SUFFIXES and not path.name.startswith(".")
            )
        else:
            raise InputError(f"{folder} is not a folder, expected a folder of images")
        if not self.paths:
            raise InputError(
                f"{folder} holds no image, expected files that end in {', '.join(FILE_SUFFIXES)}"
            )
        self.shape = tuple(self[0].shape)
        for i, path in enumerate(self.paths):
            shape = tuple(self[i].shape)
            if shape != self.shape:
                raise InputError(
                    f"{path} is {_size(shape)}, expected {_size(self.shape)} as {self.paths[0].name}: "
                    "the images of a folder have one size and one number of channels"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def frame(self, i: int) -> np.ndarray:
        return read_image(self.paths[i])

    def name(self, i: int) -> str:
        return str(self.paths[i])


def _size(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{height} x {width} {'grayscale' if channels == 1 else 'RGB'}"


def read_image(path: str | Path) -> np.ndarray:
    """One image as it is stored: [H, W, C], C being 1 or 3.

    Raises:
        InputError: naming the file, what it is, and what is accepted.
    """
    import imageio.v3  # comes with scikit-image, as does tifffile
    import tifffile

    try:
        if Path(path).suffix.lower() in TIFF_SUFFIXES:
            pixels = tifffile.imread(path)
        else:
            pixels = imageio.v3.imread(path, plugin="pillow")
    except Exception as error:  # each format's reader has exceptions of its own for a damaged file
        raise InputError(
            f"{path} cannot be read, expected a whole PNG, JPEG or TIFF image ({_why(error)})"
        ) from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise InputError(
            f"{path} is an array of {_times(pixels.shape)}, expected grayscale (height x width) "
            "or RGB (height x width x 3), without transparency"
        )
    return _native(pixels)


def _why(error: Exception) -> str:
    return " ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "no size"


def _native(pixels: np.ndarray) -> np.ndarray:
    """In the byte order of this machine: microscopes write either, and torch takes only this one."""
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


class Stack(Images):
    """The frames of one file, an array [T, H, W] or [T, H, W, C]."""

    def __init__(self, path: Path, intensity: Intensity, shape: tuple[int, ...]) -> None:
        self.path, self.intensity = path, intensity
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
            raise InputError(
                f"{path} is an array of {_times(shape)}, expected frames x height x width, "
                "or frames x height x width x 1 or 3"
            )
        self.count, *self.stored = shape  # a frame is stored as [H, W] or [H, W, C]
        height, width, *channels = self.stored
        self.shape = (*(channels or [1]), height, width)

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"frame {i} of {self.path}"

    def _channels_last(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(*self.shape[1:], self.shape[0])


class ArrayStack(Stack):
    """The frames of a .npy file, memory-mapped, or of an .npz file with one array in it."""

    def __init__(self, path: Path, intensity: Intensity) -> None:
        try:
            array = np.load(path, mmap_mode="r")
            if isinstance(array, np.lib.npyio.NpzFile):
                with array as archive:
                    names = archive.files
                    array = archive[names[0]] if len(names) == 1 else None
        except Exception as error:  # a damaged file shows in many ways
            raise InputError(
                f"{path} cannot be read, expected a whole {path.suffix} array file ({_why(error)})"
            ) from error
        if array is None:
            raise InputError(f"{path} holds {len(names)} arrays ({', '.join(names)}), expected one")
        super().__init__(path, intensity, array.shape)
        self.array = array

    def frame(self, i: int) -> np.ndarray:
        return _native(self._channels_last(self.array[i]))


class TiffStack(Stack):
    """The pages of a TIFF file: memory-mapped if stored in one piece, else read and unpacked one by one."""

    def __init__(self, path: Path, intensity: Intensity) -> None:
        import tifffile

        try:
            with tifffile.TiffFile(path) as tiff:
                series = tiff.series
                first = series[0]
                kinds = {(s.axes, s.shape, s.dtype) for s in series}
            self.array = None
            if len(series) == 1 and first.dataoffset is not None:
                self.array = tifffile.memmap(path, mode="r")
        except Exception as error:
            raise InputError(f"{path} cannot be read, expected a whole TIFF file ({_why(error)})") from error
        if len(kinds) > 1:
            raise InputError(
                f"{path} has images of {len(kinds)} different sizes or types, expected one stack"
            )
        # One series holds a whole movie; pages that were written one by one each make a series of their own.
        sizes = [("T", len(series)), *zip(first.axes, first.shape, strict=True)]
        kept = [(axis, size) for axis, size in sizes if axis in "YX" or size > 1]
        axes = "".join(axis for axis, _ in kept).removesuffix("S")
        if not axes.endswith("YX") or len(axes) > 3:
            raise InputError(
                f"{path} has axes {' x '.join(f'{axis}={size}' for axis, size in kept)}, "
                "expected one series of pages, each grayscale or RGB"
            )
        shape = tuple(size for _, size in kept)
        super().__init__(path, intensity, shape if len(axes) == 3 else (1, *shape))
        if self.array is not None:
            self.array = self.array.reshape(self.count, -1)
        self.opened: tuple[int, tifffile.TiffFile] | None = None

    def frame(self, i: int) -> np.ndarray:
        if self.array is not None:
            return _native(self._channels_last(self.array[i]))
        # A worker that inherits an open file shares its position with the others: each opens its own.
        if self.opened is None or self.opened[0] != os.getpid():
            import tifffile

            self.opened = (os.getpid(), tifffile.TiffFile(self.path))
        tiff = self.opened[1]
        try:
            page = (tiff.series[0].pages if len(tiff.series) == 1 else tiff.pages)[i].asarray()
        except Exception as error:
            raise InputError(f"{self.name(i)} cannot be read ({_why(error)})") from error
        return _native(self._channels_last(page))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": None}
