"""Writing the layers of images as they come: in their format, and with what their files say of themselves."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import (
    TIFF_SUFFIXES,
    ArrayStack,
    Hdf5Stack,
    ImageFolder,
    Images,
    Picture,
    TiffStack,
    Video,
    as_stored,
    split_hdf5,
)
from ..errors import InputError

LAYERS = ("foreground", "background", "mask")

# Of ImageJ's metadata, those that hold for every layer, and those of what the values mean and how they are
# shown, which do not hold for a mask.
IMAGEJ_ALL = "unit yunit zunit spacing finterval fps tunit xorigin yorigin zorigin".split()
IMAGEJ_VALUES = "cf c0 c1 vunit min max".split()
LOSSLESS = "NONE LZW ADOBE_DEFLATE DEFLATE PACKBITS ZSTD LZMA".split()


@contextlib.contextmanager
def layer_writer(images: Images, out: str | Path, overwrite: bool = False) -> Iterator[Writer]:
    """Where the layers of ``images`` go: ``writer.write(i, layers)`` for i = 0, 1, ... in turn.

    They get their names in ``out`` when the block is left, all being written: what is there is whole.

    Raises:
        FileExistsError: a result is there already, and ``overwrite`` is not set.
        InputError: a result would replace an image that is read, or cannot be written.
    """
    out = Path(out).expanduser()
    unfinished = out / ".unfinished"
    writer = WRITERS[type(images)](images, unfinished)
    there = [out / target for target in writer.targets if (out / target).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} is there already, and nothing is overwritten unasked")
    source = split_hdf5(images.path)[0].resolve()
    for path in there:
        if path.is_dir():
            raise InputError(f"{path} is a folder, and a layer would get its name: expected another folder")
        if source in (path.resolve(), path.resolve().parent):
            raise InputError(
                f"{path} is an image that is read and would be replaced: expected another folder"
            )
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
    except OSError as error:
        raise InputError(f"the layers cannot be written to {out} ({error})") from error
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
        import PIL.Image
        import tifffile

        image = self.images.file(i)
        for layer, pixels in zip(LAYERS, layers, strict=True):
            path = self.folder / layer / self.names[i]
            if isinstance(image, Picture) and pixels.dtype == np.uint16 and pixels.shape[-1] == 3:
                import imagecodecs  # which has read it: Pillow knows no more than 8 bits of a colour

                path.write_bytes(imagecodecs.png_encode(pixels, level=3))
            elif isinstance(image, Picture):
                # Level 3 takes a quarter of the time of the default for files that are 2 % larger.
                dpi = {"dpi": image.dpi} if image.dpi else {}
                PIL.Image.fromarray(_flat(pixels)).save(path, compress_level=3, **dpi)
            else:
                pixels = as_stored(pixels, image.orientation)
                with tifffile.TiffWriter(path) as file:
                    file.write(_flat(pixels, image.planar), **tiff_options(image, layer, pixels))


def _flat(pixels: np.ndarray, planar: bool = False) -> np.ndarray:
    """[H, W], [H, W, 3], or [3, H, W] if planar, of [H, W, C]."""
    if pixels.shape[-1] == 1:
        return pixels[..., 0]
    return np.moveaxis(pixels, -1, 0) if planar else pixels


class TiffWriter(Writer):
    """``mask.tif`` and so on, a page a frame, in BigTIFF if larger than 4 GB."""

    def __init__(self, images: TiffStack | Video, folder: Path) -> None:
        super().__init__(images, folder)
        self.targets = [Path(f"{layer}.tif") for layer in LAYERS]

    def open(self) -> None:
        import tifffile

        frame = self.images.frame(0)
        big = len(self.images) * (frame.nbytes + 1000) > 2**32 - 2**25  # with room for each page's header
        self.files = [tifffile.TiffWriter(self.folder / target, bigtiff=big) for target in self.targets]
        self.options: dict[str, dict[str, Any]] = {}

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        for file, layer, pixels in zip(self.files, LAYERS, layers, strict=True):
            pixels = as_stored(pixels, self.images.orientation)
            if i == 0:
                self.options[layer] = tiff_options(self.images, layer, pixels)
            file.write(_flat(pixels, self.images.planar), **self.options[layer])
            self.options[layer]["description"] = None  # the first page's is for all

    def close(self) -> None:
        for file in self.files:
            file.close()


def tiff_options(images: TiffStack | Video, layer: str, pixels: np.ndarray) -> dict[str, Any]:
    """How tifffile is to write pages [H, W, C] of a layer: with the tags and metadata of ``images``."""
    import tifffile

    tags = dict(images.tags)
    photometric, colormap = tags.pop("photometric", None), tags.pop("colormap", None)
    none = tifffile.COMPRESSION.NONE
    if tags.setdefault("compression", none).name not in LOSSLESS:
        tags |= {"compression": tifffile.COMPRESSION.ADOBE_DEFLATE, "predictor": None}
    if pixels.shape[-1] == 3:
        tags |= {"photometric": "rgb", "planarconfig": "separate" if images.planar else "contig"}
    elif layer == "mask" or photometric not in (
        tifffile.PHOTOMETRIC.MINISWHITE,
        tifffile.PHOTOMETRIC.PALETTE,
    ):
        tags["photometric"] = "minisblack"
    else:
        tags |= {"photometric": photometric, "colormap": colormap}
    if images.orientation != 1:
        tags["extratags"] = [(274, "H", 1, images.orientation, True)]
    return {
        "contiguous": pixels.dtype != bool and tags["compression"] == none,
        "metadata": None,  # tifffile's own would be of one page
        "description": _description(images, layer, pixels),
        **tags,
    }


def _description(images: TiffStack | Video, layer: str, pixels: np.ndarray) -> bytes | None:
    """ImageJ's or OME's text of the first page, about all of them, if the file had one."""
    import tifffile

    height, width, samples = pixels.shape
    axes, shape, stored = "YXS", pixels.shape, (len(images), 1, 1, height, width, samples)
    if images.planar and samples == 3:
        axes, shape, stored = "SYX", (3, height, width), (len(images), 3, 1, height, width, 1)
    if len(images) > 1:
        axes, shape = images.axis + axes, (len(images), *shape)
    if samples == 1:
        axes, shape = axes.replace("S", ""), shape[:-1]
    if axes[0] not in "TZYS":  # neither format knows another
        return None
    if images.kind == "imagej":
        kept = IMAGEJ_ALL if layer == "mask" else IMAGEJ_ALL + IMAGEJ_VALUES
        values = {name: images.metadata[name] for name in kept if name in images.metadata}
        return tifffile.imagej_description(shape, axes, **values).replace("µ", "\\u00B5").encode()
    if images.kind == "ome":
        kept = ("Name", "PhysicalSize", "TimeIncrement")
        values = {name: value for name, value in images.metadata.items() if name.startswith(kept) and value}
        ome = tifffile.OmeXml()
        ome.addimage(pixels.dtype, shape, stored, axes=axes, **values)
        return ome.tostring(declaration=True).encode()
    return None


class ArrayWriter(Writer):
    """``mask.npy`` and so on, memory-mapped; for an .npz too, as that format cannot be written in parts.

    The foreground and background have the shape of the input, the mask is T x H x W.
    """

    def __init__(self, images: ArrayStack, folder: Path) -> None:
        super().__init__(images, folder)
        self.targets = [Path(f"{layer}.npy") for layer in LAYERS]

    def open(self) -> None:
        self.files = [
            np.lib.format.open_memmap(self.folder / target, "w+", self.images.frame(0).dtype, shape)
            for target, shape in zip(self.targets, array_shapes(self.images), strict=True)
        ]
        for file in self.files:  # a full disk is an error now; found when a page is touched, it is a crash
            if hasattr(os, "posix_fallocate"):  # macOS has none
                with open(file.filename, "rb+") as reserved:
                    os.posix_fallocate(reserved.fileno(), 0, file.offset + file.nbytes)

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        for file, pixels in zip(self.files, layers, strict=True):
            file[i] = pixels.reshape(file.shape[1:])

    def close(self) -> None:
        for file in self.files:
            file.flush()
        del self.files


def array_shapes(images: ArrayStack | Hdf5Stack) -> list[tuple[int, ...]]:
    """Of the three layers: an axis of channels is there if the images have one, but not for the mask."""
    channels, height, width = images.shape
    with_channels = images.channel is None and (images.outer + images.inner)[-1][0] == "S"
    image = (len(images), height, width, *([channels] if with_channels else []))
    return [image, image, image[:3]]


class Hdf5Writer(Writer):
    """``mask.h5`` and so on, with a data set of the name, compression and attributes of the input's."""

    def __init__(self, images: Hdf5Stack, folder: Path) -> None:
        super().__init__(images, folder)
        self.targets = [Path(f"{layer}.h5") for layer in LAYERS]

    def open(self) -> None:
        self.files = [self.images.h5py.File(self.folder / target, "w") for target in self.targets]
        self.data = []
        for file, shape in zip(self.files, array_shapes(self.images), strict=True):
            data = file.create_dataset(
                self.images.dataset,
                shape,
                self.images.frame(0).dtype,
                chunks=(1, *shape[1:]),
                compression=self.images.compression,
            )
            data.attrs.update(self.images.attributes)
            self.data.append(data)

    def write(self, i: int, layers: tuple[np.ndarray, ...]) -> None:
        for data, pixels in zip(self.data, layers, strict=True):
            data[i] = pixels.reshape(data.shape[1:])

    def close(self) -> None:
        for file in self.files:
            file.close()


WRITERS: dict[type[Images], type[Writer]] = {
    ImageFolder: FolderWriter,
    TiffStack: TiffWriter,
    Video: TiffWriter,
    ArrayStack: ArrayWriter,
    Hdf5Stack: Hdf5Writer,
}
