"""What a user's images are: a folder of files, or a TIFF, array, HDF5 or video file, read frame by frame."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .intensity import Intensity

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
TIFF_SUFFIXES = (".tif", ".tiff")
ARRAY_SUFFIXES = (".npy", ".npz")
HDF5_SUFFIXES = (".h5", ".hdf5")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".mkv")

# The axes of a file have the letters that tifffile gives them; an array's last one is S, as colours are.
FRAME_AXES = "TZIQ"  # time, depth, a sequence of images, an axis without a name
CHANNEL_AXES = "CS"  # channels, and samples of a pixel: colours

# What the tag of TIFF and EXIF says, in the order in which it is undone: rows and columns are exchanged, then
# rows run backwards, then columns.
ORIENTATIONS = {
    1: (False, 1, 1),
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
RECENT_BYTES = 2**28  # of frames that are kept for the next crops from them

Sizes = list[tuple[str, int]]  # the letter and length of each axis


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, ...] as a viewer shows them."""
    exchanged, rows, columns = ORIENTATIONS[orientation]
    return (pixels.swapaxes(0, 1) if exchanged else pixels)[::rows, ::columns]


def as_stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of :func:`upright`."""
    exchanged, rows, columns = ORIENTATIONS[orientation]
    pixels = pixels[::rows, ::columns]
    return pixels.swapaxes(0, 1) if exchanged else pixels


@contextlib.contextmanager
def reading(what: str | Path, path: Path) -> Iterator[None]:
    """Whatever the reader of a format says of a file that it cannot read, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise InputError(
                    f"{path} is a pointer of Git LFS and not the file itself, which `git lfs pull` fetches"
                ) from error
        why = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        raise InputError(f"{what} cannot be read ({why})") from error


def extra(module: str, name: str, path: Path) -> ModuleType:
    """A module that comes with the extra ``name`` of this package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'to read {path}, pip install "fgbg_cuda[{name}]" ({module} is missing)') from error


class Images(Dataset[Tensor]):
    """Frames of one size, grayscale (C = 1) or RGB (C = 3): item i is float32 [C, H, W] in [0, 1].

    Made by :func:`open_images`. Only what is asked for is read, so a stack may be larger than memory. No file
    stays open from one read to the next, but for memory-mapped ones and videos; those close when
    the object is no longer used.

    Attributes:
        path: the folder or file.
        shape: (C, H, W).
        intensity: how values map to [0, 1].
        channel: the one that was chosen of several, or None.
    """

    path: Path
    shape: tuple[int, int, int]
    intensity: Intensity
    channel: int | None

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        self.path, self.intensity, self.channel = path, intensity, channel
        self.recent: dict[int, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the file for itself.
        return type(self), (self.path, self.intensity, self.channel)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def frame(self, i: int) -> np.ndarray:
        """The values of frame i as the file has them, upright: [H, W, C]; memory-mapped where possible."""

    @abstractmethod
    def name(self, i: int) -> str:
        """How frame i is called in messages."""

    def __getitem__(self, i: int) -> Tensor:
        return self.window(i, slice(None), slice(None))

    def window(self, i: int, rows: slice, columns: slice) -> Tensor:
        """A part of frame i: float32 [C, h, w] in [0, 1]. Frames lately asked for are not read again."""
        frame = self.recent.pop(i) if i in self.recent else self.frame(i)
        self.recent[i] = frame
        if len(self.recent) > max(1, RECENT_BYTES // frame.nbytes):
            del self.recent[next(iter(self.recent))]
        pixels = self.intensity.to_unit(frame[rows, columns], self.name(i))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def sample(self, count: int = 32) -> list[np.ndarray]:
        """``count`` frames, or all if there are fewer, evenly spread and always the same."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return [self.frame(i) for i in chosen]


def open_images(
    path: str | Path,
    intensity: Intensity = Intensity(),  # noqa: B008  (frozen)
    channel: int | None = None,
) -> Images:
    """The images at ``path``:

    - a folder of PNG, JPEG, BMP and TIFF images, in the order of their names, or one such image. EXIF's
      orientation is undone, a palette looked up;
    - a folder of TIFF files that together are one OME-TIFF, as Micro-Manager writes it, or one of these;
    - a TIFF stack (.tif, .tiff). Frames are its time or depth or pages, channels those of its axes. Values
      are those stored, whatever their display: a palette or MINISWHITE does not change them;
    - an array file (.npy, .npz with one array in it), T x H x W or T x H x W x C. An .npz is read into
      memory as a whole, as its format knows no other way;
    - such an array in an HDF5 file, ``file.h5:/path/in/it``, or ``file.h5`` with no other in it (h5py);
    - a video (.avi, .mp4, .mov, .mkv; PyAV).

    ``channel`` chooses one of several channels, counted from 0; without it there is one, or RGB.

    Raises:
        InputError: naming the folder or file, what it is, and what is accepted.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = image_files(path)
        first = TiffStack(files[0], intensity, channel) if files[0].suffix.lower() in TIFF_SUFFIXES else None
        if first is None or len(first.members) == 1:
            return ImageFolder(path, intensity, channel)
        if others := {file.name for file in files} - first.members:
            raise InputError(
                f"{path} holds the OME-TIFF of {files[0].name} and also {min(others)}, expected one of both"
            )
        return first
    file, _ = split_hdf5(path)
    if not file.is_file():
        raise InputError(f"{file} is not there, expected a folder of images or a file")
    if file.suffix.lower() in PICTURE_SUFFIXES:
        return ImageFolder(path, intensity, channel)
    return _reader(file)(path, intensity, channel)


def _reader(file: Path) -> type[Stack]:
    for suffixes, reader in READERS.items():
        if file.suffix.lower() in suffixes:
            return reader
    accepted = ", ".join(suffix for suffixes in READERS for suffix in suffixes)
    raise InputError(f"{file} is none of {accepted}, nor a folder of images")


class Stack(Images):
    """The frames of one file.

    A file is read in pieces (:meth:`piece`), which the axes ``outer`` number; a piece has the axes ``inner``.
    A frame is the part of a piece with its number and channel.

    Raises:
        InputError: the axes are other than those of frames, of channels if one is chosen, and RGB.
    """

    def __init__(
        self,
        path: Path,
        intensity: Intensity,
        channel: int | None,
        outer: Sizes,
        inner: Sizes,
        orientation: int = 1,
    ) -> None:
        super().__init__(path, intensity, channel)
        self.outer, self.inner = outer, inner
        self.orientation = orientation if orientation in ORIENTATIONS else 1  # 0 and other nonsense: as it is
        sizes = outer + inner
        has = " x ".join(f"{axis}={size}" for axis, size in sizes)
        many = [(axis, size) for axis, size in sizes if size > 1 and axis not in "YX"]
        frames = [(axis, size) for axis, size in many if axis in FRAME_AXES]
        channels = [(axis, size) for axis, size in many if axis in CHANNEL_AXES]
        if any(size == 0 for _, size in sizes) or [axis for axis, _ in inner if axis in "YX"] != ["Y", "X"]:
            raise InputError(f"{path} has axes {has}, expected images of Y x X pixels")
        if max(len(frames), len(channels)) > 1 or len(many) > len(frames) + len(channels):
            raise InputError(
                f"{path} has axes {has}, expected beside Y and X one axis of frames at the most "
                "(T, Z or a sequence) and one of channels (C) or colours (S)"
            )
        self.axis, self.count = frames[0] if frames else ("T", 1)
        self.planar = "S" in dict(inner) and inner[-1][0] != "S"  # colour by colour
        axis, count = channels[0] if channels else ("S", 1)
        if channel is None and count > 1 and (axis, count) != ("S", 3):
            raise InputError(
                f"{path} has {count} channels (axes {has}), expected one, or RGB: "
                f"channel chooses one, from 0 to {count - 1}"
            )
        if channel is not None and not 0 <= channel < count:
            raise InputError(f"channel is {channel}, but {path} has {count} (axes {has}), counted from 0")
        height, width = (dict(inner)[axis] for axis in "YX")
        if ORIENTATIONS[self.orientation][0]:
            height, width = width, height
        self.shape = (1 if channel is not None else count, height, width)

    @abstractmethod
    def piece(self, index: tuple[int, ...]) -> np.ndarray:
        """The piece with these numbers along ``outer``; it has the axes ``inner``."""

    def __len__(self) -> int:
        return self.count

    def frame(self, i: int) -> np.ndarray:
        i = range(self.count)[i]

        def places(sizes: Sizes) -> tuple[Any, ...]:
            chosen = {**dict.fromkeys(FRAME_AXES, i), **dict.fromkeys(CHANNEL_AXES, self.channel)}
            found = [0 if size == 1 and axis not in "YX" else chosen.get(axis) for axis, size in sizes]
            return tuple(slice(None) if place is None else place for place in found)

        with reading(self.name(i), self.path):
            pixels = self.piece(places(self.outer))[places(self.inner)]
        if self.shape[0] == 1:
            pixels = pixels[..., None]
        elif self.planar:
            pixels = np.moveaxis(pixels, 0, -1)
        # In the byte order of this machine: microscopes write either, and torch takes only this one.
        return upright(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), self.orientation)

    def name(self, i: int) -> str:
        return f"frame {i} of {self.path}" if self.count > 1 else str(self.path)


class Picture(Stack):
    """A PNG, JPEG or BMP image. Masks are read by index, images by the colours of a palette.

    Attributes:
        dpi: pixels to an inch, (x, y), or None.
    """

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        import PIL.Image

        with reading(path, path), PIL.Image.open(path) as image:
            mode, deep = image.mode, ";16B" in str(image.tile)
            orientation = image.getexif().get(0x0112, 1)
            frames = getattr(image, "n_frames", 1)
            # In a phone's JPEG (MPO) other things follow the picture, such as a map of depths.
            if frames > 1 and image.format != "MPO":
                raise InputError(
                    f"{path} has {frames} frames ({image.format}), of which a picture is one: "
                    "expected them in a TIFF stack, an array or a video"
                )
            if intensity.by_index and image.format in ("JPEG", "MPO"):
                raise InputError(
                    f"{path} is a JPEG, whose compression changes labels: expected PNG, TIFF or an array"
                )
            self.dpi = image.info.get("dpi")
            if mode == "P" and not intensity.by_index:
                colours = np.reshape(image.getpalette(), (-1, 3))
                gray = (colours == colours[:, :1]).all() and "transparency" not in image.info
                image = image.convert("L" if gray else "RGBA" if "transparency" in image.info else "RGB")
            if deep:  # a PNG of 16 bits: Pillow gives the upper 8 if it has colours
                import imagecodecs

                self.pixels = imagecodecs.png_decode(path.read_bytes())
            else:
                self.pixels = np.asarray(image)
            if image.mode in ("LA", "RGBA"):
                opaque = np.iinfo(self.pixels.dtype).max
                if (self.pixels[..., -1] == opaque).all():
                    self.pixels = self.pixels[..., :-1]  # nothing shines through
        if mode not in ("1", "L", "I", "I;16", "P", "RGB", "LA", "RGBA"):
            raise InputError(f"{path} is a {mode} image, expected grayscale or RGB")
        inner = list(zip("YXS", self.pixels.shape, strict=False))
        super().__init__(path, intensity, channel, [], inner, orientation)

    def piece(self, index: tuple[int, ...]) -> np.ndarray:
        return self.pixels


def array_axes(what: str, shape: tuple[int, ...]) -> Sizes:
    """The axes of a plain array, which says nothing about them itself."""
    one_image = len(shape) == 3 and shape[2] in (3, 4)  # in colours
    channels_first = len(shape) == 4 and shape[3] > min(shape[1:3])
    if len(shape) not in (3, 4) or one_image or channels_first:
        size = " x ".join(map(str, shape)) or "no size"
        raise InputError(
            f"{what} is an array of {size}, expected frames x height x width, "
            "or frames x height x width x channels"
        )
    return list(zip("TYXS", shape, strict=False))


class ArrayStack(Stack):
    """The frames of a .npy file, memory-mapped, or of an .npz file with one array in it."""

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        with reading(path, path):
            array = np.load(path, mmap_mode="r")
            if isinstance(array, np.lib.npyio.NpzFile):
                with array as archive:
                    names = archive.files
                    if len(names) != 1:
                        raise InputError(
                            f"{path} holds {len(names)} arrays ({', '.join(names)}), expected one"
                        )
                    array = archive[names[0]]
        self.array = array
        super().__init__(path, intensity, channel, [], array_axes(str(path), array.shape))

    def piece(self, index: tuple[int, ...]) -> np.ndarray:
        return self.array


def split_hdf5(path: Path) -> tuple[Path, str | None]:
    """``file.h5:/path`` as the file and the data set; anything else as the file alone."""
    found = re.fullmatch(r"(.+\.(?:h5|hdf5)):(.+)", str(path), re.IGNORECASE)
    return (Path(found[1]), found[2]) if found else (path, None)


class Hdf5Stack(Stack):
    """The frames of a data set in an HDF5 file."""

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        self.h5py = extra("h5py", "hdf5", path)
        self.file, self.dataset = split_hdf5(path)
        with reading(path, self.file), self.h5py.File(self.file) as file:
            found: list[str] = []
            file.visititems(lambda name, item: found.append(f"/{name}") if hasattr(item, "shape") else None)
            if self.dataset is None and len(found) == 1:
                (self.dataset,) = found
            if self.dataset is None or not hasattr(file.get(self.dataset), "shape"):
                raise InputError(
                    f"{path} names no data set, expected {self.file}:/NAME, "
                    f"where this file has {', '.join(found) or 'none'}"
                )
            data = file[self.dataset]
            # What the layers get as well: the kind of compression, and attributes such as the pixel size.
            self.compression, self.attributes = data.compression, dict(data.attrs)
            for links in ("DIMENSION_LIST", "REFERENCE_LIST"):  # to data sets of this file
                self.attributes.pop(links, None)
            frames, *inner = array_axes(str(path), data.shape)
            # Of a chunk the whole is unpacked, whatever is asked for: its frames are kept if they are few.
            together = data.chunks[0] if data.chunks else 1
            self.together = together if together * data[0].nbytes <= RECENT_BYTES else 1
            self.unpacked = (-1, np.empty(0))
        super().__init__(path, intensity, channel, [frames], inner)

    def piece(self, index: tuple[int, ...]) -> np.ndarray:
        number, place = divmod(index[0], self.together)
        if self.unpacked[0] != number:
            with self.h5py.File(self.file) as file:
                first = number * self.together
                self.unpacked = number, file[self.dataset][first : first + self.together]
        return self.unpacked[1][place].copy()  # a view would keep them all in memory


class TiffStack(Stack):
    """The pages of a TIFF file: memory-mapped if stored in one piece, else read and unpacked one by one.

    Attributes:
        members: the names of the files with the pages, which are several for some OME-TIFFs.
        kind: what wrote the metadata: "ome", "imagej", or else how tifffile calls it.
        metadata: those of ImageJ, or of OME's Pixels element.
        tags: what the layers' files say in their TIFF tags too, as arguments of tifffile's ``write``.
    """

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        import tifffile

        with reading(path, path), _damage_as_error(path), tifffile.TiffFile(path) as tiff:
            series = tiff.series
            first, page = series[0], series[0].keyframe
            if len({(s.axes, s.shape, s.dtype) for s in series}) > 1:
                raise InputError(f"{path} has images of different sizes or types, expected one stack")
            self.members = {path.name}
            axes, shape = first.get_axes(squeeze=True), first.get_shape(squeeze=True)
            # What YCbCr means is undone where a JPEG is unpacked, and only there.
            jpeg = page.compression in (6, 7, 33007, 34892)
            colours = tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR
            if page.photometric not in colours[: 1 + jpeg]:
                axes = axes.replace("S", "C")  # samples that are no colours
            sizes = list(zip(axes, shape, strict=True))
            if len(series) == 1 and first.dataoffset is not None:
                self.pieces = tifffile.memmap(path, mode="r").reshape(shape)
                outer, inner = [], sizes
            else:
                self.pieces = [page for s in series for page in s]
                if None in self.pieces:
                    raise InputError(f"{path} is not whole: {_what_ome_misses(path, tiff.ome_metadata)}")
                self.members = {page.parent.filename for page in self.pieces}
                numbering = len(sizes) - len(page.shape)
                outer, inner = sizes[:numbering], sizes[numbering:]
                if len(series) > 1:  # pages that were written one by one each make a series of their own
                    outer = [("I", len(series)), *outer]
            self._read_metadata(tiff, first, page)
            orientation = page.tags.valueof(274, default=1)
        super().__init__(path, intensity, channel, outer, inner, orientation)

    def _read_metadata(self, tiff: Any, series: Any, page: Any) -> None:
        import tifffile

        self.kind, self.metadata = series.kind, {}
        if self.kind == "imagej":
            self.metadata = tiff.imagej_metadata
        elif self.kind == "ome":
            image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
            image = image[0] if isinstance(image, list) else image
            self.metadata = {"Name": image.get("Name"), **image["Pixels"]}
        self.tags = {"photometric": page.photometric, "compression": page.compression}
        if page.compression != tifffile.COMPRESSION.NONE:
            self.tags["predictor"] = page.predictor
        if page.colormap is not None:
            self.tags["colormap"] = page.colormap
        if 282 in page.tags and 283 in page.tags:
            self.tags["resolution"] = (page.tags[282].value, page.tags[283].value)
            self.tags["resolutionunit"] = page.tags.valueof(296, default=2)

    def piece(self, index: tuple[int, ...]) -> np.ndarray:
        if not self.outer:
            return self.pieces if isinstance(self.pieces, np.ndarray) else self._page(0)
        return self._page(int(np.ravel_multi_index(index, [size for _, size in self.outer])))

    def _page(self, number: int) -> np.ndarray:
        page = self.pieces[number]
        file = page.parent.filehandle
        file.open()
        try:
            return page.asarray()
        finally:
            file.close()


class _Complaints(logging.Handler):
    """Keeps what is logged as an error, but of single tags, which says nothing about the image."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "TiffTag" not in record.getMessage():
            self.texts.append(record.getMessage())


@contextlib.contextmanager
def _damage_as_error(path: Path) -> Iterator[None]:
    """An InputError where tifffile finds a file damaged: it only logs that, and gives what is left of it."""
    logger, complaints = logging.getLogger("tifffile"), _Complaints()
    logger.addHandler(complaints)
    try:
        yield
    finally:
        logger.removeHandler(complaints)
    if complaints.texts:
        raise InputError(f"{path} cannot be read ({complaints.texts[0]})")


def _what_ome_misses(path: Path, ome: str) -> str:
    names = sorted(set(re.findall(r'FileName="([^"]+)"', ome)))
    lost = [name for name in names if not (path.parent / name).exists()]
    if lost:
        return f"its OME metadata names {len(names)} files, of which {lost[0]} is not beside it"
    return "its OME metadata counts more images than are there"


class Video(Stack):
    """The frames of a video, grayscale if its pixels are, else RGB. Its metadata are ImageJ's of a TIFF."""

    kind = "imagej"
    tags: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        self.av = extra("av", "video", path)
        with reading(path, path):
            with self._open(path) as (container, stream):
                # The time of each frame tells it from the others; decoding them all finds damage now.
                self.times = [frame.pts for frame in container.decode(stream)]
                rate = stream.average_rate
                if not self.times:
                    raise InputError(f"{path} has no pictures")
                # FFmpeg ends quietly where a file does; Matroska notes a duration but no number of frames.
                end = (self.times[-1] or 0) * stream.time_base + (2 / rate if rate else 0)
                noted = (container.duration or 0) / self.av.time_base
                if len(self.times) < stream.frames or (not stream.frames and end < noted):
                    header = f"{stream.frames} frames" if stream.frames else f"{noted:g} s"
                    warnings.warn(
                        f"{path} has {len(self.times)} frames, its header says {header}: it may be cut off",
                        stacklevel=4,
                    )
            with self._open(path) as (container, stream):
                first = self._pixels(next(container.decode(stream)))
        if None in self.times or any(np.diff(self.times) <= 0):
            raise InputError(
                f"{path} has frames without times of their own, expected one that can be sought in"
            )
        self.metadata = {"fps": float(rate), "finterval": float(1 / rate)} if rate else {}
        # Of each process that reads: the next frame's number, and the frames from there on. One that is
        # forked must neither share its parent's place in the file nor close it: FFmpeg would wait for
        # threads that it does not have.
        self.readers: dict[int, tuple[int, Iterator[Any]]] = {}
        inner = list(zip("YXS", first.shape, strict=False))
        super().__init__(path, intensity, channel, [("T", len(self.times))], inner)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[tuple[Any, Any]]:
        # Without a protocol, FFmpeg takes what stands before a colon for one.
        with self.av.open(f"file:{path}") as container:
            if not container.streams.video:
                raise InputError(f"{path} has no pictures")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # a fork has none of the others, and would wait for them
            yield container, stream

    @staticmethod
    def _pixels(frame: Any) -> np.ndarray:
        pixels = frame.to_ndarray(format=None if frame.format.name.startswith("gray") else "rgb24")
        return np.rot90(pixels, round(frame.rotation / 90))

    def _frames_from(self, i: int) -> Iterator[Any]:
        # What is sought is a time of decoding, and a frame that was packed between others needs those before
        # it: where the frame does not come, it takes to start earlier.
        back = 0
        while back <= 2 * i + 4:
            with self._open(self.path) as (container, stream):
                if back <= i:
                    container.seek(self.times[i - back], stream=stream)
                frames = itertools.dropwhile(
                    lambda frame: frame.pts < self.times[i], container.decode(stream)
                )
                first = next(frames, None)
                if first is not None and first.pts == self.times[i]:
                    yield first
                    yield from frames
                    return
            back = 2 * back + 4
        raise InputError(f"{self.name(i)} is not found by its time")

    def piece(self, index: tuple[int, ...]) -> np.ndarray:
        (i,) = index
        place, frames = self.readers.pop(os.getpid(), (None, None))
        if place != i:
            frames = self._frames_from(i)
        frame = next(frames)
        if i + 1 < self.count:
            self.readers[os.getpid()] = (i + 1, frames)
        return self._pixels(frame)


READERS: dict[tuple[str, ...], type[Stack]] = {
    PICTURE_SUFFIXES: Picture,
    TIFF_SUFFIXES: TiffStack,
    ARRAY_SUFFIXES: ArrayStack,
    HDF5_SUFFIXES: Hdf5Stack,
    VIDEO_SUFFIXES: Video,
}


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names; other files and folders are passed over."""
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURE_SUFFIXES + TIFF_SUFFIXES
        and not path.is_dir()  # a link to nothing is an image that is missing, and said to be
        and not path.name.startswith(".")
    )
    if not found:
        accepted = ", ".join(PICTURE_SUFFIXES + TIFF_SUFFIXES)
        raise InputError(f"{folder} holds no image, expected files that end in {accepted}")
    return found


class ImageFolder(Images):
    """The images of a folder, or one image, all of one size.

    Every image is read once at the start, so that a bad one stops the program before training and not
    hours into it.
    """

    def __init__(self, path: Path, intensity: Intensity, channel: int | None) -> None:
        super().__init__(path, intensity, channel)
        self.paths = [self.path] if self.path.is_file() else image_files(self.path)
        for i, path in enumerate(self.paths):
            image = self.file(i)
            self.shape = image.shape if i == 0 else self.shape
            if len(image) > 1:
                raise InputError(
                    f"{path} has {len(image)} frames, expected the files of a folder to be one each"
                )
            if image.shape != self.shape:
                raise InputError(
                    f"{path} is {_size(image.shape)}, expected {_size(self.shape)} as {self.paths[0].name}: "
                    "the images of a folder have one size and one number of channels"
                )
            intensity.to_unit(image.frame(0), str(path))

    def file(self, i: int) -> Stack:
        """The file with image i."""
        return _reader(self.paths[i])(self.paths[i], self.intensity, self.channel)

    def __len__(self) -> int:
        return len(self.paths)

    def frame(self, i: int) -> np.ndarray:
        # A copy, as every frame that stays memory-mapped would keep its file open.
        return np.array(self.file(i).frame(0))

    def name(self, i: int) -> str:
        return str(self.paths[i])


def _size(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{height} x {width} {'grayscale' if channels == 1 else 'RGB'}"
