"""A user's own images: every format, intensities, splits, crops, masks, and what is said of bad ones."""

from __future__ import annotations

import itertools
import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

import imageio.v3 as iio  # noqa: E402
import PIL.Image  # noqa: E402
import PIL.ImageOps  # noqa: E402
import tifffile  # noqa: E402
from ome_files import write_ome_set  # noqa: E402

from fgbg_cuda.__main__ import main  # noqa: E402
from fgbg_cuda.vae import (  # noqa: E402
    ImagesDataModule,
    Intensity,
    LayeredVAEModule,
    ObjectNetworks,
    open_images,
)
from fgbg_cuda.vae.data import image_data  # noqa: E402
from fgbg_cuda.vae.data.intensity import measure  # noqa: E402


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    dtype = np.dtype(dtype)
    values = np.random.default_rng(0).random(shape)
    return (values if dtype.kind == "f" else values * np.iinfo(dtype).max).astype(dtype)


def save_stack(path: Path, movie: np.ndarray, **options) -> Path:
    if path.suffix == ".npy":
        np.save(path, movie)
    elif path.suffix == ".npz":
        np.savez(path, movie)
    else:
        photometric = "rgb" if movie.ndim == 4 else "minisblack"
        tifffile.imwrite(path, movie, photometric=photometric, **options)
    return path


# ---- reading ----


INTEGERS = [np.uint8, np.uint16, ">u2", np.int16, ">i2", np.int32, np.uint32]
TYPES = [*INTEGERS, bool, np.float16, np.float32, np.float64, ">f4"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(5, 8, 12), (5, 8, 12, 3), (1, 8, 12)])
@pytest.mark.parametrize("name", ["movie.npy", "movie.npz", "movie.tif"])
def test_stacks_of_every_kind_give_their_frames(tmp_path, name, shape, dtype):
    movie = (noise(*shape) / 255 > 0.5) if dtype is bool else noise(*shape, dtype=dtype)
    if name.endswith("tif") and len(shape) == 4 and dtype is bool:
        pytest.skip("tifffile writes no RGB images of bool")
    images = open_images(save_stack(tmp_path / name, movie))
    assert len(images) == shape[0]
    assert images.shape == ((3 if len(shape) == 4 else 1), 8, 12)
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if movie.dtype.kind in "iu" else (0, 1)
    for i, frame in enumerate(movie):
        raw = images.frame(i)
        assert raw.dtype == movie.dtype.newbyteorder("=")
        np.testing.assert_array_equal(raw, frame.reshape(8, 12, -1))
        expected = (frame.reshape(8, 12, -1).astype(np.float64) - low) / (high - low)
        np.testing.assert_array_equal(images[i], expected.transpose(2, 0, 1).astype(np.float32))


LZW = {"compression": "lzw"}
PREDICTED_LZW = {"compression": "lzw", "predictor": True}  # ImageJ's: of the differences of neighbours
IMAGEJ = {"imagej": True, "metadata": {"axes": "TYX"}}


@pytest.mark.parametrize("options", [{"compression": "zlib"}, LZW, PREDICTED_LZW, {"bigtiff": True}, IMAGEJ])
def test_tiff_variants(tmp_path, options):
    if "lzw" in options.values():
        pytest.importorskip("imagecodecs")
    movie = noise(6, 16, 24, dtype=np.uint16)
    images = open_images(save_stack(tmp_path / "movie.tif", movie, **options))
    np.testing.assert_array_equal(np.stack([images.frame(i)[..., 0] for i in range(6)]), movie)


@pytest.mark.parametrize("options", [{"contiguous": True}, {"contiguous": False}, {"compression": "zlib"}])
@pytest.mark.parametrize("metadata", [None, {}])
def test_pages_written_one_by_one(tmp_path, options, metadata):
    movie = noise(6, 16, 24)
    with tifffile.TiffWriter(tmp_path / "movie.tif") as tiff:
        for frame in movie:
            tiff.write(frame, metadata=metadata, **options)
    images = open_images(tmp_path / "movie.tif")
    np.testing.assert_array_equal(np.stack([images.frame(i)[..., 0] for i in range(6)]), movie)


def test_a_single_image_is_a_set_of_one(tmp_path):
    iio.imwrite(tmp_path / "a.png", noise(8, 12, 3))
    assert open_images(tmp_path / "a.png").shape == (3, 8, 12)
    iio.imwrite(tmp_path / "a.tif", noise(8, 12))
    assert len(open_images(tmp_path / "a.tif")) == 1


@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 3)])
@pytest.mark.parametrize("options", [LZW, PREDICTED_LZW])
def test_folders_of_packed_tiffs(tmp_path, options, shape):
    pytest.importorskip("imagecodecs")
    pictures = noise(3, *shape, dtype=np.uint16)
    for i, pixels in enumerate(pictures):
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, **options)
    images = open_images(tmp_path)
    np.testing.assert_array_equal(
        np.stack([images.frame(i) for i in range(3)]), pictures.reshape(3, 16, 24, -1)
    )


def test_a_movie_larger_than_memory_opens_at_once(tmp_path):
    """128 GiB of zeros that take no room on disk: any attempt to read it all would fail."""
    path = tmp_path / "movie.npy"
    movie = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(2**16, 1024, 1024))
    movie[-1, 5, 7] = 65535
    movie.flush()
    images = open_images(path)
    assert len(images) == 2**16
    assert images[-1].sum() == 1
    data = ImagesDataModule(path, crop=64, batch_size=4, intensity_range=(0, 100))
    data.setup()
    assert next(iter(data.val_dataloader())).image.shape == (4, 1, 64, 64)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("movie.npy", lambda p: np.save(p, noise(8, 8)), "an array of 8 x 8, expected frames x height"),
        ("movie.npy", lambda p: np.save(p, noise(9, 8, 3)), "an array of 9 x 8 x 3, expected frames x heigh"),
        (
            "movie.npy",
            lambda p: np.save(p, noise(2, 8, 8, 4)),
            r"has 4 channels \(axes T=2 x Y=8 x X=8 x S=4",
        ),
        (
            "movie.npy",
            lambda p: np.save(p, noise(5, 2, 8, 8)),
            "an array of 5 x 2 x 8 x 8, expected frames x",
        ),
        ("movie.npy", lambda p: np.save(p, noise(0, 8, 8)), "axes T=0 x Y=8 x X=8, expected images"),
        ("movie.npy", lambda p: p.write_bytes(b""), r"movie\.npy cannot be read \(EOFError: No data"),
        ("movie.npy", lambda p: np.save(p, np.array([{}])), r"movie\.npy cannot be read"),
        ("movie.npz", lambda p: p.write_bytes(b"PK"), r"movie\.npz cannot be read"),
        (
            "movie.npz",
            lambda p: np.savez(p, a=noise(2), b=noise(2)),
            r"holds 2 arrays \(a, b\), expected one",
        ),
        ("movie.tif", lambda p: p.write_bytes(b"II"), r"movie\.tif cannot be read \("),
        (
            "movie.tif",
            lambda p: [tifffile.imwrite(p, noise(8, n), append=n > 8) for n in (8, 9)],
            "has images of different sizes or types",
        ),
        ("movie.gif", lambda p: p.write_text(""), r"movie\.gif is none of \.png, .*\.mkv, nor a folder"),
        ("movie.tif", lambda p: None, "is not there, expected a folder of images or a file"),
    ],
)
def test_bad_stacks_get_one_sentence(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        open_images(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}])
def test_a_truncated_stack_is_an_error_not_a_short_movie(tmp_path, options):
    path = save_stack(tmp_path / "movie.tif", noise(9, 64, 64), **options)
    os.truncate(path, path.stat().st_size * 2 // 3)

    def read():
        return [open_images(path)[i] for i in range(9)]

    with pytest.raises(ValueError, match="cannot be read"):
        read()


def test_a_truncated_array_is_an_error(tmp_path):
    path = save_stack(tmp_path / "movie.npy", noise(9, 64, 64))
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(ValueError, match=r"movie\.npy cannot be read"):
        open_images(path)


# ---- what the axes mean ----


def tiff(path: Path, *shape: int, dtype=np.uint16, **options) -> np.ndarray:
    pixels = noise(*shape, dtype=dtype)
    tifffile.imwrite(path, pixels, **options)
    return pixels


RGB = {"photometric": "rgb", "dtype": np.uint8}
GRAY = {"photometric": "minisblack"}


@pytest.mark.parametrize(
    ("axes", "shape", "options", "channel"),
    [
        ("TYX", (5, 8, 12), {"imagej": True}, None),
        ("ZYX", (5, 8, 12), {"ome": True}, None),
        ("CYX", (2, 8, 12), {"imagej": True}, 1),
        ("CYX", (3, 8, 12), {"ome": True}, 2),
        ("TCYX", (5, 2, 8, 12), {"imagej": True}, 0),
        ("ZCYX", (5, 2, 8, 12), {"ome": True, "compression": "zlib"}, 1),
        ("CTYX", (2, 5, 8, 12), {"ome": True, "compression": "zlib"}, 1),
        ("YXS", (8, 12, 3), RGB, None),
        ("SYX", (3, 8, 12), RGB | {"planarconfig": "separate"}, None),
        ("TSYX", (5, 3, 8, 12), RGB | {"planarconfig": "separate"}, None),
        ("TSYX", (5, 3, 8, 12), RGB | {"planarconfig": "separate", "compression": "zlib"}, 2),
        ("TYXS", (5, 8, 12, 3), RGB | {"ome": True}, None),
        ("TYXS", (5, 8, 12, 3), RGB | {"compression": "zlib"}, 1),
        ("YXS", (8, 12, 4), RGB | {"extrasamples": ["unassalpha"]}, 3),
        ("YXS", (8, 12, 3), GRAY | {"planarconfig": "contig"}, 1),
        ("QYX", (5, 8, 12), GRAY, None),
    ],
)
def test_axes_say_what_is_a_frame_and_what_a_channel(tmp_path, axes, shape, options, channel):
    metadata = {"axes": axes} if options.keys() & {"ome", "imagej"} else {}
    pixels = tiff(tmp_path / "movie.tif", *shape, metadata=metadata, **options)
    order = [axes.index(a) for a in axes if a in "TZQ"] + [axes.index(a) for a in "YX"]
    order += [axes.index(a) for a in axes if a in "CS"]
    frames = pixels.transpose(order).reshape(
        -1, 8, 12, pixels.size // 96 // (5 if set(axes) & set("TZQ") else 1)
    )
    if channel is not None:
        frames = frames[..., [channel]]
    images = open_images(tmp_path / "movie.tif", channel=channel)
    assert len(images) == len(frames)
    assert images.shape == (frames.shape[-1], 8, 12)
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(images.frame(i), frame)


@pytest.mark.parametrize(
    ("axes", "shape", "options", "channel", "message"),
    [
        (
            "CYX",
            (2, 8, 12),
            {"imagej": True},
            None,
            r"has 2 channels \(axes C=2 x Y=8 x X=12\), .* from 0 to 1",
        ),
        ("CYX", (3, 8, 12), {"ome": True}, None, r"has 3 channels \(axes C=3 x"),  # no colours
        ("CYX", (2, 8, 12), {"ome": True}, 2, r"channel is 2, but .* has 2 \(axes C=2 x Y=8"),
        ("TYX", (2, 8, 12), {"ome": True}, -1, r"channel is -1, but .* has 1 "),
        (
            "TZYX",
            (3, 2, 8, 12),
            {"ome": True},
            None,
            r"has axes T=3 x Z=2 x Y=8 x X=12, .* one axis of frames",
        ),
        ("QQYX", (3, 2, 8, 12), GRAY, None, r"has axes Q=3 x Q=2 x Y=8 x X=12, .* one axis of frames"),
        ("YXS", (8, 12, 4), RGB | {"extrasamples": ["unassalpha"]}, None, r"has 4 channels .*S=4"),
        ("YXS", (8, 12, 3), GRAY | {"planarconfig": "contig"}, None, r"has 3 channels"),
    ],
)
def test_axes_that_could_mean_several_things_are_named(tmp_path, axes, shape, options, channel, message):
    metadata = {"axes": axes} if options.keys() & {"ome", "imagej"} else {}
    tiff(tmp_path / "movie.tif", *shape, metadata=metadata, **options)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "movie.tif", channel=channel)


def test_the_data_module_reads_the_channel_that_is_chosen(tmp_path):
    pixels = tiff(tmp_path / "movie.tif", 9, 2, 8, 8, imagej=True, metadata={"axes": "TCYX"})
    data = ImagesDataModule(tmp_path / "movie.tif", channel=1, batch_size=2)
    data.setup()
    assert data.describe()["shape"] == (1, 8, 8)
    shown = {image.numpy().tobytes() for batch in data.train_dataloader() for image in batch.image}
    assert shown < {(frame[1] / 65535).astype(np.float32).tobytes() for frame in pixels}


@pytest.mark.parametrize("channels", [1, 2])
def test_an_ome_tiff_of_many_files_is_one_movie(tmp_path, channels):
    pixels = noise(4, channels, 8, 12, dtype=np.uint16)
    write_ome_set(tmp_path, pixels)
    channel = None if channels == 1 else 1
    for path in (tmp_path, tmp_path / "img_channel000_time002.tif"):
        images = open_images(path, channel=channel)
        assert len(images) == 4
        for i, frame in enumerate(pixels):
            np.testing.assert_array_equal(images.frame(i)[..., 0], frame[channel or 0])
    tifffile.imwrite(tmp_path / "other.tif", pixels[0, 0])
    with pytest.raises(ValueError, match=r"holds the OME-TIFF of img_channel000_time000\.tif and also other"):
        open_images(tmp_path, channel=channel)
    os.remove(tmp_path / "img_channel000_time001.tif")
    with pytest.raises(
        ValueError, match=rf"names {4 * channels} files, of which img_channel000_time001\.tif is n"
    ):
        open_images(tmp_path / "img_channel000_time002.tif", channel=channel)


# ---- how a picture is shown ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_orientation_is_undone(tmp_path, orientation, suffix):
    stored = np.repeat(np.repeat(noise(2, 3) // 2 + 64, 8, 0), 8, 1)
    exif = PIL.Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, stored, extratags=[(274, "H", 1, orientation, True)])
    else:
        PIL.Image.fromarray(stored).save(path, exif=exif)
    PIL.Image.fromarray(stored).save(tmp_path / "known.png", exif=exif)
    with PIL.Image.open(tmp_path / "known.png" if suffix == "tif" else path) as image:
        shown = np.asarray(PIL.ImageOps.exif_transpose(image))
    assert shown.shape == ((24, 16) if orientation > 4 else (16, 24))
    np.testing.assert_array_equal(open_images(path).frame(0)[..., 0], shown)


def test_a_picture_has_the_colours_of_its_palette(tmp_path):
    indices = noise(8, 12) % 4
    for name, table in (
        ("rgb", [[9, 8, 7], [200, 0, 0], [0, 99, 0], [1, 2, 3]]),
        ("gray", [[v] * 3 for v in (9, 4, 70, 5)]),
    ):
        image = PIL.Image.fromarray(indices)
        image.putpalette(np.ravel(table).tolist())
        image.save(tmp_path / f"{name}.png")
        expected = np.array(table, np.uint8)[indices]
        expected = expected if name == "rgb" else expected[..., :1]
        np.testing.assert_array_equal(open_images(tmp_path / f"{name}.png").frame(0), expected)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_pictures_of_every_depth(tmp_path, dtype, suffix):
    if suffix == "bmp" and dtype is np.uint16:
        pytest.skip("there is no such BMP")
    pixels = noise(8, 12) > 99 if dtype is bool else noise(8, 12, dtype=dtype)
    PIL.Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(open_images(tmp_path / f"a.{suffix}").frame(0)[..., 0], pixels)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_are_read_whole(tmp_path, channels):
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = noise(8, 12, channels, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    images = open_images(tmp_path / "a.png", channel=None if channels == 3 else 3)
    np.testing.assert_array_equal(images.frame(0), pixels if channels == 3 else pixels[..., 3:])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("opaque", [True, False])
def test_an_alpha_that_hides_nothing_is_left_out(tmp_path, dtype, colours, opaque):
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = noise(8, 12, colours + 1, dtype=dtype)
    pixels[..., -1] = np.iinfo(dtype).max
    if not opaque:
        pixels[3, 4, -1] -= 1
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    if opaque:
        np.testing.assert_array_equal(open_images(tmp_path / "a.png").frame(0), pixels[..., :-1])
        return
    with pytest.raises(ValueError, match=rf"has {colours + 1} channels .*channel chooses one"):
        open_images(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_a_picture_of_several_frames_is_no_picture(tmp_path, kind):
    """An animation that is called .png: its first frame alone would be a silent loss of the others."""
    first, second = (PIL.Image.fromarray(noise(8, 12) // n) for n in (1, 2))
    first.save(tmp_path / "a.png", format=kind, save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=rf"a\.png has 2 frames \({kind}\), of which a picture is one"):
        open_images(tmp_path / "a.png")


def test_the_pictures_of_phones_are_their_first(tmp_path):
    """What a phone appends to a JPEG, such as a map of depths, is no frame."""
    first, second = (PIL.Image.fromarray(noise(8, 12, 3) // n) for n in (1, 2))
    first.save(tmp_path / "known.jpg")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    known, ours = (open_images(tmp_path / name).frame(0) for name in ("known.jpg", "a.jpg"))
    np.testing.assert_array_equal(ours, known)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_only_a_jpeg_turns_luma_and_chroma_into_colours(tmp_path, compression):
    if compression:
        pytest.importorskip("imagecodecs")
    path = tmp_path / "a.tif"
    PIL.Image.new("RGB", (16, 16), (200, 0, 0)).convert("YCbCr").save(path, compression=compression)
    if compression == "jpeg":
        np.testing.assert_allclose(open_images(path).frame(0)[0, 0], (200, 0, 0), atol=3)
    else:
        with pytest.raises(
            ValueError, match=r"has 3 channels \(axes Y=16 x X=16 x C=3\), expected one, or RGB"
        ):
            open_images(path)


# ---- HDF5 and video ----


def test_data_sets_in_hdf5_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    movie = noise(5, 8, 12, dtype=np.uint16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw/movie", data=movie, compression="gzip")
        file["table"] = np.zeros(3)
    images = open_images(f"{tmp_path}/a.h5:/raw/movie")
    np.testing.assert_array_equal(np.stack([images.frame(i)[..., 0] for i in range(5)]), movie)
    for path, message in (
        ("a.h5", r"a\.h5:/NAME, where this file has /raw/movie, /table"),
        ("a.h5:/raw", r"a\.h5:/NAME, where this file has /raw/movie, /table"),
        ("a.h5:/table", "table is an array of 3, expected frames x height"),
        ("b.h5:/table", r"b\.h5 is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / path)
    with h5py.File(tmp_path / "one.hdf5", "w") as file:
        file["movie"] = movie
    assert len(open_images(tmp_path / "one.hdf5")) == 5


@pytest.mark.parametrize("order", [range(40), (39, 0, 20, 21, 1)])
def test_a_chunk_of_an_hdf5_file_is_unpacked_once(tmp_path, monkeypatch, order):
    h5py = pytest.importorskip("h5py")
    movie = noise(40, 8, 12, dtype=np.uint16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("movie", data=movie, compression="gzip", chunks=(16, 4, 12))
    images = open_images(tmp_path / "a.h5")
    reads = []
    monkeypatch.setattr(h5py, "File", lambda path, file=h5py.File: reads.append(path) or file(path))
    frames = [images.frame(i) for i in order]
    np.testing.assert_array_equal(np.stack(frames)[..., 0], movie[list(order)])
    assert len(reads) == (3 if order == range(40) else 4)
    assert all(frame.base is None or frame.base.size <= frame.size for frame in frames)  # not of the chunk


def video(path: Path, movie: np.ndarray, codec: str, pixel_format: str) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *movie.shape[1:3], pixel_format
        if codec == "mpeg4":
            stream.codec_context.max_b_frames = 2
        for pixels in movie:
            frame = av.VideoFrame.from_ndarray(pixels, format="gray" if movie.ndim == 3 else "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "shape"),
    [
        ("gray.avi", "ffv1", "gray", (30, 16, 32)),
        ("rgb.avi", "ffv1", "bgr0", (30, 16, 32, 3)),
        ("raw.avi", "rawvideo", "gray", (30, 16, 32)),
        ("packed.mp4", "mpeg4", "yuv420p", (30, 16, 32, 3)),  # with frames between others
    ],
)
def test_frames_of_a_video_in_any_order(tmp_path, name, codec, pixel_format, shape):
    smooth = np.add.outer(8 * np.arange(30), np.add.outer(np.arange(16), np.arange(32)) // 4).astype(np.uint8)
    movie = smooth if len(shape) == 3 else np.stack([smooth] * 3, -1)
    video(tmp_path / name, movie, codec, pixel_format)
    images = open_images(tmp_path / name)
    assert (len(images), images.shape) == (30, ((1 if len(shape) == 3 else 3), 16, 32))
    frames = np.stack([images.frame(i) for i in range(30)])
    np.testing.assert_allclose(
        frames.astype(int), movie.reshape(frames.shape), atol=12 if codec == "mpeg4" else 0
    )
    for i in (17, 3, 4, 5, 29, 0, 16):
        np.testing.assert_array_equal(images.frame(i), frames[i])
    loader = torch.utils.data.DataLoader(images, num_workers=2)  # the parent has the file open
    images.frame(7)
    assert all(torch.equal(item[0], images[i]) for i, item in enumerate(loader))


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "header"),
    [("a.mkv", "ffv1", "gray", r"1\.2 s"), ("a.avi", "mjpeg", "yuvj420p", "30 frames")],
)
def test_a_video_that_is_cut_off_is_noticed(tmp_path, name, codec, pixel_format, header):
    video(tmp_path / name, noise(30, 64, 64), codec, pixel_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_images(tmp_path / name)) == 30
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size * 66 // 100)
    with pytest.warns(UserWarning, match=rf"has 1\d frames, its header says {header}: it may be cut off"):
        open_images(tmp_path / name)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    movie = noise(3, 16, 32)
    video(Path("file:10:30.avi"), movie, "ffv1", "gray")
    images = open_images("10:30.avi")
    np.testing.assert_array_equal([images.frame(i)[..., 0] for i in range(3)], movie)


def test_a_video_is_turned_as_players_turn_it(tmp_path):
    movie = np.repeat(np.arange(0, 240, 15, dtype=np.uint8)[:, None], 32, 1)[None].repeat(
        3, 0
    )  # darkest on top
    video(tmp_path / "phone.mp4", np.stack([movie] * 3, -1), "mpeg4", "yuv420p")
    data = bytearray((tmp_path / "phone.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the track's header: where the picture's axes point to
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # to the right
    (tmp_path / "phone.mp4").write_bytes(data)
    images = open_images(tmp_path / "phone.mp4")
    assert images.shape == (3, 32, 16)
    across = images.frame(0)[..., 0].mean(0)
    assert across[0] > 200  # what was on top is now on the right
    assert across[-1] < 30


@pytest.mark.parametrize(("module", "extra", "name"), [("av", "video", "a.mp4"), ("h5py", "hdf5", "a.h5")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, extra, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=rf'to read .*{name}, pip install "fgbg_cuda\[{extra}\]" \({module} is'
    ):
        open_images(tmp_path / name)


# ---- files that are no good ----


def test_the_real_cause_is_said(tmp_path, monkeypatch):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    for name in ("a.png", "a.tif", "a.npy"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=rf"{name[0]}\.{name[2:]} is a pointer of Git LFS") as error:
            open_images(tmp_path / name)
        assert error.value.__cause__ is not None
    PIL.Image.fromarray(noise(8, 8, 4), "CMYK").save(tmp_path / "cmyk.jpg")
    with pytest.raises(ValueError, match=r"cmyk\.jpg is a CMYK image, expected grayscale or RGB"):
        open_images(tmp_path / "cmyk.jpg")
    PIL.Image.fromarray(noise(20, 20)).save(tmp_path / "huge.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        ValueError, match=r"huge\.png cannot be read \(DecompressionBombError: .*400 pix"
    ) as error:
        open_images(tmp_path / "huge.png")
    assert isinstance(error.value.__cause__, PIL.Image.DecompressionBombError)


def test_folders_are_no_pictures_whatever_their_names(tmp_path):
    (tmp_path / "x.png").mkdir()
    PIL.Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    assert len(open_images(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"x\.png holds no image"):
        open_images(tmp_path / "x.png")


def test_a_link_to_nothing_is_an_image_that_is_missing(tmp_path):
    PIL.Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("elsewhere")
    with pytest.raises(ValueError, match=r"b\.png cannot be read \(FileNotFoundError"):
        open_images(tmp_path)


def open_files(folder: Path) -> set[str]:
    descriptors = Path("/proc/self/fd").iterdir()
    targets = (os.readlink(path) for path in descriptors if path.is_symlink())
    return {target for target in targets if target.startswith(str(folder))}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_file_stays_open(tmp_path):
    movie = noise(6, 16, 24)
    for name in ("a.npy", "a.npz", "plain.tif"):
        save_stack(tmp_path / name, movie)
    save_stack(tmp_path / "packed.tif", movie, compression="zlib")
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(movie):
        PIL.Image.fromarray(frame).save(tmp_path / "folder" / f"{i}.png")
        tifffile.imwrite(tmp_path / "folder" / f"{i}.tif", frame)
    (tmp_path / "set").mkdir()
    write_ome_set(tmp_path / "set", noise(3, 1, 8, 8, dtype=np.uint16))
    (tmp_path / "damaged.tif").write_bytes((tmp_path / "packed.tif").read_bytes()[:999])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ResourceWarning among them
        for path in sorted(tmp_path.iterdir()):
            try:
                images = open_images(path)
            except ValueError:
                assert path.name == "damaged.tif"
                continue
            for i in range(len(images)):
                images[i]
            if path.name in ("packed.tif", "folder", "set"):  # the others are mapped into memory
                assert not open_files(tmp_path)
            del images
            assert not open_files(tmp_path)


def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_stack(tmp_path / "movie.npy", noise(3, 8, 8))
    assert len(open_images("~/movie.npy")) == 3


# ---- intensities ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("bounds", [None, (0.0, 200.0), (-3.0, 180.0)])
def test_values_in_range_survive_the_way_there_and_back(dtype, bounds):
    dtype = np.dtype(dtype)
    intensity = Intensity(bounds)
    low, high = intensity.bounds(dtype)
    pixels = np.linspace(max(low, 0), high, 60).astype(dtype).reshape(3, 20, 1)
    unit = intensity.to_unit(pixels, "pixels")
    assert unit.dtype == np.float32
    assert unit.min() >= 0
    assert unit.max() <= 1
    back = intensity.from_unit(unit, dtype)
    assert back.dtype == dtype
    if dtype.kind == "u":  # a float32 in [0, 1] is exact to 2^-25 of the range: far below half a step
        np.testing.assert_array_equal(back, pixels)
    else:  # a rounding to float32 of the unit value, and one of the result if that is float32
        np.testing.assert_allclose(back, pixels, rtol=0, atol=(high - low) * 2 * np.finfo(np.float32).eps)


def test_values_beyond_the_range_are_clipped():
    pixels = np.array([[[0], [100], [200], [300]]], np.uint16)
    assert Intensity((100, 200)).to_unit(pixels, "pixels").ravel().tolist() == [0, 0, 1, 1]


def test_automatic_range_passes_over_hot_and_dead_pixels():
    frames = [np.full((200, 200, 1), 50, np.uint16) for _ in range(4)]
    for frame in frames:
        frame[:100] = 3000
    frames[0][0, 0], frames[1][199, 199] = 65535, 0  # 1 pixel each of 160000: below 0.01 %
    assert measure(frames) == (50, 3000)
    with pytest.raises(ValueError, match="from 7 to 7, from which no intensity_range"):
        measure([np.full((8, 8, 1), 7, np.uint8)])


def test_images_of_several_types_have_no_range_in_common(tmp_path):
    PIL.Image.fromarray(noise(8, 8)).save(tmp_path / "a.png")
    for name in "bcd":
        PIL.Image.fromarray(noise(8, 8, dtype=np.uint16)).save(tmp_path / f"{name}.png")
    options = {"crop": 8, "batch_size": 2, "crops_per_image": 1}
    with pytest.raises(ValueError, match="are of types uint16 and uint8, which have no intensity_range in c"):
        ImagesDataModule(tmp_path, intensity_range="auto", **options).setup()
    with pytest.warns(UserWarning, match=r"are \d+ to 6\d+\.?\d*, but the intensity range is 0 to 255"):
        ImagesDataModule(tmp_path, intensity_range=(0, 255), **options).setup()


@pytest.mark.parametrize(
    "bounds", [(1, 1), (2, 1), (0, float("inf")), (float("nan"), 1), (1,), (0, 1, 2), ("a", "b"), 5, "0-5"]
)
def test_bad_ranges(bounds):
    with pytest.raises(ValueError, match=r"intensity_range is .*, expected two numbers, low < high"):
        Intensity(bounds)


@pytest.mark.parametrize("text", ["0,4095", "0 4095", "[0, 4095]", "(0,4095)", "0., 4.095e3"])
def test_a_range_may_be_text_as_on_a_command_line(text):
    assert Intensity(text) == Intensity((0, 4095))


def test_floats_outside_0_to_1_need_a_range(tmp_path):
    movie = save_stack(tmp_path / "movie.npy", 5 * noise(12, 8, 8, dtype=np.float32))
    with pytest.raises(
        ValueError, match=r"frame 0 of .* has float values from 0.* expected 0 to 1, or an inten"
    ):
        open_images(movie)[0]
    data = ImagesDataModule(movie, intensity_range="auto", batch_size=2)
    data.setup()
    low, high = data.describe()["intensity_range"]
    assert low == pytest.approx(0, abs=0.1)
    assert high == pytest.approx(5, abs=0.1)


def test_a_camera_of_12_bits_in_a_16_bit_file_is_noticed(tmp_path):
    movie = save_stack(tmp_path / "movie.tif", noise(12, 8, 8, dtype=np.uint16) // 16)
    with pytest.warns(
        UserWarning,
        match=r'are .* to 40\d\d.*, but the intensity range is 0 to 65535: .* try intensity_range="auto"',
    ):
        ImagesDataModule(movie, batch_size=2).setup()


# ---- splits, crops, batches ----


@pytest.mark.parametrize("movie", [True, False])
@pytest.mark.parametrize("count", [3, 10, 57])
def test_splits_are_disjoint_complete_and_fixed_by_the_seed(movie, count):
    parts = image_data.split(count, 0.1, 0.2, movie, seed=1)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    assert all(len(part) for part in parts.values())
    again = image_data.split(count, 0.1, 0.2, movie, seed=1)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_splits_of_a_movie_part_three_pairs_of_neighbours_at_most():
    for seed in range(20):
        parts = image_data.split(100, 0.1, 0.1, True, seed)
        owner = np.empty(100, int)
        for k, part in enumerate(parts.values()):
            owner[part] = k
        assert (owner != np.roll(owner, 1)).sum() == 3
    others = {image_data.split(100, 0.1, 0.1, True, seed)["val"][0] for seed in range(20)}
    assert len(others) > 5


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (-0.1, 0.1), (0.6, 0.6), (float("nan"), 0.1)])
def test_splits_that_leave_nothing(val, test):
    with pytest.raises(ValueError, match=r"val_fraction is .* expected fractions that leave images"):
        image_data.split(10, val, test, True, 0)


@pytest.fixture
def movie(tmp_path) -> Path:
    return save_stack(tmp_path / "movie.tif", noise(40, 40, 56), compression="zlib")


def batches(path, epochs=2, **options) -> list[torch.Tensor]:
    data = ImagesDataModule(path, batch_size=8, crops_per_image=1, **options)
    data.setup()
    loader = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += [batch.image for batch in loader]
    return found + [batch.image for batch in data.val_dataloader()]


def test_batches_do_not_depend_on_the_workers(movie):
    alone, helped = batches(movie, crop=16), batches(movie, crop=16, num_workers=2)
    assert len(alone) == 2 * 4 + 1
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    other = batches(movie, crop=16, seed=1)
    assert not torch.equal(alone[0], other[0])


def test_reading_draws_no_random_number(movie):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(movie, crop=16)
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_are_parts_of_the_images_and_move(movie):
    data = ImagesDataModule(movie, crop=16, batch_size=8)
    data.setup()
    train, images = data.splits["train"], open_images(movie)
    for k, epoch in itertools.product(range(4), range(3)):
        windows = images[int(train.indices[k])][0].unfold(0, 16, 1).unfold(1, 16, 1)
        crop = train[[(k, epoch)]].image[0, 0]
        assert (windows == crop).flatten(2).all(-1).any()
    assert not torch.equal(train[[(0, 0)]].image, train[[(0, 1)]].image)
    val = data.splits["val"]
    assert torch.equal(val[[1]].image, val[[1]].image)


@pytest.mark.parametrize(("crop", "size"), [(48, (40, 48)), (64, (40, 56))])
def test_of_images_smaller_than_a_crop_all_is_taken(movie, crop, size):
    data = ImagesDataModule(movie, crop=crop, batch_size=8)
    with pytest.warns(
        UserWarning, match=f"crop is {crop}, but .* are 40 x 56: {size[0]} x {size[1]} is taken"
    ):
        data.setup()
    assert next(iter(data.train_dataloader())).image.shape == (8, 1, *size)
    assert data.describe()["shape"] == (1, *size)
    if size == (40, 56):
        assert len(data.splits["val"]) == len(data.splits["val"].indices)  # whole images, once each
        assert data.frames(3).shape == (3, 1, 40, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"crop": 24}, None),
        ({"crop": 20}, None),
        ({"crop": 0}, "crop is 0, expected a whole number, at least 1"),
        ({"crop": 8.5}, "crop is 8.5, expected a whole number, at least 1"),
        ({"batch_size": "8"}, "batch_size is '8', expected a whole number, at least 1"),
        ({"crops_per_image": 0}, "crops_per_image is 0, expected a whole number, at least 1"),
        ({"intensity_range": 5}, "intensity_range is 5, expected two numbers, low < high"),
        (
            {"batch_size": 65, "crops_per_image": 2},
            r"batch_size is 65, but an epoch has only 32 training images, 2 times",
        ),
    ],
)
def test_bad_options_say_what_is_allowed(movie, options, message):
    def setup():
        ImagesDataModule(movie, **({"batch_size": 8} | options)).setup()

    if message is None:
        return setup()
    with pytest.raises(ValueError, match=message):
        setup()


# ---- few and large images ----


def places(split: image_data.Crops, epochs: int) -> np.ndarray:
    """Which pixels of a single image the crops of a set show."""
    seen = np.zeros(split.images.shape[1:], bool)
    for k, epoch in itertools.product(range(len(split)), range(epochs)):
        _, rows, columns = split._place(k, epoch)
        assert (rows.stop - rows.start, columns.stop - columns.start) == split.size
        seen[rows, columns] = True
    return seen


@pytest.mark.parametrize("shape", [(40, 200), (200, 48)])
def test_one_large_image_is_trained_on_and_scored_in_parts(tmp_path, shape):
    PIL.Image.fromarray(noise(*shape)).save(tmp_path / "still.png")
    data = ImagesDataModule(tmp_path / "still.png", crop=32, batch_size=4, crops_per_image=40)
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == dict.fromkeys(data.splits, 40)
    assert len(data.train_dataloader()) == 10
    train, val, test = (places(data.splits[name], 3) for name in ("train", "val", "test"))
    assert not (train & val).any()
    assert not (train & test).any()
    assert not (val & test).any()
    assert train.mean() > 0.6
    batch = next(iter(data.train_dataloader())).image
    assert len({image.numpy().tobytes() for image in batch}) == 4


def test_an_image_with_no_room_for_three_parts_is_shared_with_a_warning(tmp_path):
    PIL.Image.fromarray(noise(40, 90)).save(tmp_path / "still.png")
    data = ImagesDataModule(tmp_path / "still.png", crop=32, batch_size=4)
    with pytest.warns(UserWarning, match="40 x 90, too small for three parts with room for a crop of 32"):
        data.setup()
    for split in data.splits.values():  # each has crops from everywhere, of its own
        assert places(split, 1).mean() > 0.95
    starts = [{str(split._place(k)) for k in range(5)} for split in data.splits.values()]
    assert not starts[0] & starts[1]
    with pytest.raises(ValueError, match=r"val_fraction is 0\.5 .*, expected fractions that leave images"):
        ImagesDataModule(tmp_path / "still.png", crop=8, val_fraction=0.5, test_fraction=0.5).setup()
    with pytest.raises(ValueError, match="has 1 images, expected 3 or more, or of still images a crop"):
        ImagesDataModule(tmp_path / "still.png", batch_size=4).setup()


@pytest.mark.parametrize(("count", "crop"), [(3, None), (10, 16), (60, 16), (60, None), (500, 16)])
def test_few_images_are_no_reason_for_few_steps(tmp_path, count, crop):
    movie = save_stack(tmp_path / "movie.npy", noise(count, 20, 20))
    data = ImagesDataModule(movie, crop=crop, batch_size=4)
    data.setup()
    held_out = max(1, round(count / 10))
    steps, images = len(data.train_dataloader()), count - 2 * held_out
    assert steps == images // 4 if images > 200 else 50 <= steps < 50 + images
    shown = torch.cat([batch.image for batch in data.train_dataloader()])
    differ = len({image.numpy().tobytes() for image in shown})
    if crop is None:
        assert differ == images
        assert len(data.splits["val"]) == held_out  # a whole image again tells nothing new
    else:  # 25 places in an image
        assert differ > min(15 * images, 0.9 * len(shown))


def test_images_of_any_size_are_trained_on(tmp_path):
    """60 x 60 is no multiple of 8, nor is 44 of 32, the cell of the background."""
    for size, crop, networks in ((60, None, {}), (50, 44, {"bg_cell": 32})):
        movie = save_stack(tmp_path / f"{size}.npy", noise(8, size, size, 3))
        data = ImagesDataModule(movie, crop=crop, batch_size=4)
        data.setup()
        shape = data.describe()["shape"]
        module = LayeredVAEModule(shape=shape, networks=ObjectNetworks(width=4, **networks))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=2,
            limit_val_batches=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        found = module.separate(data.splits["val"][[0]].image)
        assert found.foreground.shape == (1, *shape)


def test_colours_train_with_the_config_for_objects(tmp_path):
    movie = save_stack(tmp_path / "movie.tif", noise(10, 60, 44, 3))
    main(
        [
            "fit", "--config=objects", f"--data.images={movie}", "--data.crop=40", "--data.batch_size=4",
            "--data.intensity_range=[0, 255]", f"--out={tmp_path}/run", "--pictures=0",
            "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        ]
    )  # fmt: skip
    main(["separate", f"{tmp_path}/run/last.ckpt", str(movie), f"{tmp_path}/layers", "--device=cpu"])
    assert tifffile.imread(tmp_path / "layers" / "foreground.tif").shape == (10, 60, 44, 3)
    assert tifffile.imread(tmp_path / "layers" / "mask.tif").shape == (10, 60, 44)


def test_a_model_for_other_channels_says_so():
    with pytest.raises(ValueError, match="x has 3 channels, expected 1 as in the model's shape"):
        LayeredVAEModule(networks=ObjectNetworks(width=4)).separate(torch.rand(2, 3, 16, 16))


# ---- masks ----


LABELS = np.array([[0, 0, 1, 1, 0, 0, 0, 3], [0, 255, 255, 0, 0, 2, 2, 0]] * 4, np.uint8)


def palette_png(path: Path) -> None:
    """As ImageJ writes a mask with an inverting table: 0 is shown white, 255 black."""
    image = PIL.Image.fromarray(LABELS)
    image.putpalette(np.repeat(np.arange(256)[::-1], 3).tolist())
    image.save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("palette.png", palette_png),
        ("16.png", lambda p: PIL.Image.fromarray(LABELS.astype(np.uint16) * 200).save(p)),
        ("bool.png", lambda p: PIL.Image.fromarray(LABELS > 0).save(p)),
        ("0-255.png", lambda p: PIL.Image.fromarray(np.uint8(255) * (LABELS > 0)).save(p)),
        ("0-255.bmp", lambda p: PIL.Image.fromarray(np.uint8(255) * (LABELS > 0)).save(p)),
        ("white.tif", lambda p: tifffile.imwrite(p, LABELS, photometric="miniswhite")),
        (
            "palette.tif",
            lambda p: tifffile.imwrite(
                p,
                LABELS,
                photometric="palette",
                colormap=np.tile(np.arange(65535, -1, -257, np.uint16), (3, 1)),
            ),
        ),
        ("32.tif", lambda p: tifffile.imwrite(p, LABELS.astype(np.int32) * 70000)),
        ("bool.tif", lambda p: tifffile.imwrite(p, LABELS > 0)),
        ("labels.npy", lambda p: np.save(p, LABELS[None].astype(np.int64))),
        ("bool.npy", lambda p: np.save(p, LABELS[None] > 0)),
    ],
)
def test_masks_are_read_by_index(tmp_path, name, write):
    write(tmp_path / name)
    tifffile.imwrite(tmp_path / "image.tif", noise(8, 8))
    masks = image_data.open_masks(tmp_path / name, open_images(tmp_path / "image.tif"))
    np.testing.assert_array_equal(masks[0][0], LABELS > 0)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("colours.png", noise(8, 8, 3), r"colours\.png has colours, expected a mask of one integer or bool"),
        ("colours.npy", noise(1, 8, 8, 3), r"colours\.npy has colours, expected a mask"),
        ("lossy.jpg", LABELS, r"lossy\.jpg is a JPEG, whose compression changes labels"),
        ("jpeg.png", LABELS, r"jpeg\.png is a JPEG, whose compression changes labels"),
    ],
)
def test_masks_that_are_no_labels(tmp_path, name, pixels, message):
    if name.endswith("npy"):
        np.save(tmp_path / name, pixels)
    else:
        PIL.Image.fromarray(pixels).save(tmp_path / name, format="JPEG" if pixels is LABELS else None)
    tifffile.imwrite(tmp_path / "image.tif", noise(8, 8))
    with pytest.raises(ValueError, match=message):
        image_data.open_masks(tmp_path / name, open_images(tmp_path / "image.tif"))


@pytest.mark.parametrize(
    ("pixels", "share"),
    [
        (noise(8, 8) | 1, "100.00%"),
        (np.zeros((8, 8), np.uint8), "0.00%"),
        (255 * (noise(8, 8) > 5), "96.88%"),
    ],
    ids=["grays", "empty", "inverse"],
)
def test_masks_that_can_hardly_be_meant_are_noticed(tmp_path, pixels, share):
    """A picture or a map of probabilities is read as labels, which nothing in the file contradicts."""
    tifffile.imwrite(tmp_path / "mask.tif", pixels.astype(np.uint8))
    tifffile.imwrite(tmp_path / "image.tif", noise(8, 8))
    with pytest.warns(
        UserWarning, match=rf"mask\.tif cover {share} of the images: expected 0 on the background"
    ):
        image_data.open_masks(tmp_path / "mask.tif", open_images(tmp_path / "image.tif"))


def test_supervised_training_gets_the_labels_of_a_palette(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(6):
        PIL.Image.fromarray(np.where(LABELS > 0, 200, 20).astype(np.uint8)).save(tmp_path / f"images/{i}.png")
        palette_png(tmp_path / f"masks/{i}.png")
    data = ImagesDataModule(tmp_path / "images", tmp_path / "masks", batch_size=2)
    data.setup()
    for batch in data.train_dataloader():
        assert torch.equal(batch.mask, (batch.image > 0.5).float())


def test_masks_go_with_their_images(tmp_path):
    movie = noise(20, 16, 16)
    labels = (movie > 200).astype(np.uint16) * np.arange(1, 21, dtype=np.uint16)[:, None, None]
    data = ImagesDataModule(
        save_stack(tmp_path / "movie.tif", movie),
        save_stack(tmp_path / "labels.npy", labels),
        8,
        batch_size=4,
    )
    data.setup()
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        assert batch.mask.shape == batch.image.shape
        assert torch.equal(batch.mask, (batch.image > 200.5 / 255).float())


def test_mask_folders_are_matched_by_name(tmp_path):
    for folder, name in itertools.product(("images", "masks"), "abcd"):
        (tmp_path / folder).mkdir(exist_ok=True)
        iio.imwrite(tmp_path / folder / f"{name}.png", noise(8, 8))
    images = open_images(tmp_path / "images")
    assert len(image_data.open_masks(tmp_path / "masks", images)) == 4
    os.rename(tmp_path / "masks" / "d.png", tmp_path / "masks" / "e.png")
    with pytest.raises(ValueError, match=r"e\.png stands beside .*d\.png, expected a mask of that name"):
        image_data.open_masks(tmp_path / "masks", images)
    os.remove(tmp_path / "masks" / "e.png")
    with pytest.raises(ValueError, match=r"has 3 masks of 8 x 8, expected 4 of 8 x 8 as in"):
        image_data.open_masks(tmp_path / "masks", images)


def test_masks_of_floats_are_refused(tmp_path):
    images = open_images(save_stack(tmp_path / "movie.npy", noise(4, 8, 8)))
    masks = save_stack(tmp_path / "masks.npy", noise(4, 8, 8, dtype=np.float32))
    with pytest.raises(
        ValueError, match=r"frame 0 of .* has values of type float32, expected a mask of one integer"
    ):
        image_data.open_masks(masks, images)[0]


# ---- training on them ----


@pytest.mark.parametrize("masked", [False, True])
def test_training_scores_what_the_batches_have(tmp_path, masked):
    movie = save_stack(tmp_path / "movie.npy", noise(24, 32, 32))
    masks = save_stack(tmp_path / "masks.npy", noise(24, 32, 32) // 200) if masked else None
    data = ImagesDataModule(movie, masks, batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(LayeredVAEModule(networks=ObjectNetworks(width=8)), datamodule=data)
    scores = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert scores == ({"val/elbo", "val/mask", "val/iou", "val/dice"} if masked else {"val/elbo", "val/mask"})
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    noted = torch.load(tmp_path / "some.ckpt", weights_only=True)["separation"]
    assert noted["shape"] == (1, 32, 32)
    assert noted["class_path"].endswith(".LayeredVAEModule")
