"""Separating images of every format: tiles, bit depths, whole results or none, memory, the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")

import imageio.v3 as iio  # noqa: E402
import tifffile  # noqa: E402
from ome_files import write_ome_set  # noqa: E402

from fgbg_cuda.__main__ import main  # noqa: E402
from fgbg_cuda.vae import ImagesDataModule, LayeredVAEModule, ObjectNetworks, Separation, open_images  # noqa: E402
from fgbg_cuda.vae.data.intensity import Intensity  # noqa: E402
from fgbg_cuda.vae.separation.separate import load_separator, separate_images  # noqa: E402
from fgbg_cuda.vae.separation.tiles import separate_tiles  # noqa: E402


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    dtype = np.dtype(dtype)
    values = np.random.default_rng(0).random(shape)
    return (values if dtype.kind == "f" else values * np.iinfo(dtype).max).astype(dtype)


def known(x: torch.Tensor) -> Separation:
    """A model whose results are known: the image is the foreground, its negative the background."""
    return Separation(x, 1 - x, (x[:, :1] > 0.5).to(x), x)


# ---- tiles ----


@pytest.mark.parametrize("frame", [(7, 9), (13, 21), (64, 64), (65, 64), (100, 203), (30, 200)])
@pytest.mark.parametrize("size", [None, (64, 64), (32, 48)])
def test_pixelwise_results_do_not_depend_on_the_tiles(frame, size):
    seen = []

    def separate(x):
        seen.append(tuple(x.shape[-2:]))
        return known(x)

    x = torch.rand(2, 3, *frame, dtype=torch.float64)
    for ours, expected in zip(separate_tiles(separate, x, size), known(x), strict=True):
        torch.testing.assert_close(ours, expected)
    assert set(seen) == {size or frame}  # all that the model ever sees


def test_tiles_fade_into_each_other():
    """Each tile paints itself with a value of its own: neighbours differ by no more than the weights do."""
    values = iter(np.random.default_rng(0).random(100))

    def separate(x):
        return known(torch.full_like(x, next(values)))

    found = separate_tiles(separate, torch.zeros(1, 1, 256, 256, dtype=torch.float64), (64, 64))
    # The weight of a tile moves by at most pi / 64 a pixel, and so does that of the other that fades in.
    for axis in (2, 3):
        assert found.foreground.diff(dim=axis).abs().max() < 2 * np.pi / 64


# ---- formats ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 13, 21), (5, 13, 21, 3), (5, 13, 21, 1)])
@pytest.mark.parametrize("suffix", ["npy", "npz", "tif"])
def test_stacks_keep_format_type_shape_and_values(tmp_path, suffix, shape, dtype):
    movie = noise(*shape, dtype=dtype)
    path = tmp_path / f"movie.{suffix}"
    if suffix == "tif":
        movie = movie.squeeze(-1) if shape[-1] == 1 else movie
        tifffile.imwrite(path, movie, photometric="rgb" if movie.ndim == 4 else "minisblack")
    else:
        (np.save if suffix == "npy" else np.savez)(path, movie)
    images = open_images(path)
    separate_images(known, images, tmp_path / "out", batch_size=2)

    end = "tif" if suffix == "tif" else "npy"
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"{n}.{end}" for n in ("background", "foreground", "mask")
    ]

    def read(name):
        file = tmp_path / "out" / f"{name}.{end}"
        return tifffile.imread(file) if suffix == "tif" else np.load(file)

    top = 1 if movie.dtype.kind == "f" else np.iinfo(dtype).max
    # The model works in float32: a rounding of x, one of 1 - x, one of the result.
    tolerance = {"rtol": 0, "atol": 0 if movie.dtype.kind == "u" else 2 * np.finfo(np.float32).eps}
    for name, expected in (("foreground", movie), ("background", top - movie)):
        ours = read(name)
        assert ours.dtype == movie.dtype
        assert ours.shape == movie.shape
        np.testing.assert_allclose(ours, expected, **tolerance)
    first = movie if movie.ndim == 3 else movie[..., 0]
    np.testing.assert_array_equal(read("mask"), np.where(first > top / 2, top, 0).astype(dtype))
    assert read("mask").dtype == movie.dtype


def test_folders_keep_names_and_bit_depths(tmp_path):
    pictures = {
        "a.png": noise(16, 24),
        "b.PNG": noise(16, 24, dtype=np.uint16),
        "c.tif": noise(16, 24, dtype=np.uint16),
        "d.tiff": noise(16, 24, dtype=np.float32),
        "e.jpg": noise(16, 24),
    }
    (tmp_path / "in").mkdir()
    for name, pixels in pictures.items():
        iio.imwrite(tmp_path / "in" / name, pixels)
    separate_images(known, open_images(tmp_path / "in"), tmp_path / "out", batch_size=2)
    for layer in ("foreground", "background", "mask"):
        names = sorted(os.listdir(tmp_path / "out" / layer))
        assert names == ["a.png", "b.png", "c.tif", "d.tiff", "e.png"]  # no second loss by JPEG
    for name in ("a.png", "b.png", "c.tif", "d.tiff"):
        source = pictures[name.replace("b.png", "b.PNG")]
        ours = iio.imread(tmp_path / "out" / "foreground" / name)
        assert ours.dtype == source.dtype
        np.testing.assert_array_equal(ours, source)


def test_two_images_of_one_name_are_not_mixed_up(tmp_path):
    for name in ("a.png", "a.jpg"):
        iio.imwrite(tmp_path / name, noise(8, 8))
    with pytest.raises(ValueError, match=r"two images in .* would both be written as a\.png"):
        separate_images(known, open_images(tmp_path), tmp_path / "out")


def test_intensities_come_back_as_they_were(tmp_path):
    """The model sees [0, 1], the files what the camera counted: here 100 to 300 in 16 bits."""
    movie = np.random.default_rng(0).integers(100, 301, (4, 16, 16)).astype(np.uint16)
    np.save(tmp_path / "movie.npy", movie)
    images = open_images(tmp_path / "movie.npy", Intensity((100, 300)))
    separate_images(known, images, tmp_path / "out")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "foreground.npy"), movie)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "background.npy"), 400 - movie)
    assert set(np.unique(np.load(tmp_path / "out" / "mask.npy"))) == {0, 65535}


def test_stacks_beyond_4_gb_are_bigtiff(tmp_path):
    from fgbg_cuda.vae.separation.writers import TiffWriter

    tifffile.imwrite(tmp_path / "movie.tif", noise(2, 8, 8, dtype=np.uint16))
    for count, is_big in ((2**12, True), (100, False)):
        images = open_images(tmp_path / "movie.tif")
        images.frame = lambda i: np.zeros((1024, 1024, 1), np.uint16)  # 8 GiB in 2**12
        images.count = count
        writer = TiffWriter(images, tmp_path)
        writer.open()
        writer.write(0, 3 * (np.zeros((8, 8, 1), np.uint16),))
        writer.close()
        with tifffile.TiffFile(tmp_path / "mask.tif") as tiff:
            assert tiff.is_bigtiff == is_big


# ---- what the files say of themselves ----


def described(path: Path) -> dict:
    """What a TIFF file says beside its pixels, but how often a page is packed."""
    with tifffile.TiffFile(path) as tiff:
        page, series = tiff.pages.first, tiff.series[0]
        found = {
            "axes": series.axes.replace("Q", "I"),  # no name, as tifffile and as others write it
            "shape": series.shape,
            "dtype": series.dtype,
            "photometric": page.photometric,
            "compression": page.compression,
            "predictor": page.predictor,
            "orientation": page.tags.valueof(274, default=1),
            "resolution": page.resolution if 282 in page.tags else None,
            "resolutionunit": page.resolutionunit,
            "imagej": tiff.imagej_metadata,
        }
        if tiff.ome_metadata:
            pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
            found["ome"] = {k: v for k, v in pixels.items() if k not in ("TiffData", "Channel")}
        return found


MICRONS = {"PhysicalSizeX": 0.13, "PhysicalSizeXUnit": "µm", "TimeIncrement": 0.5, "TimeIncrementUnit": "s"}


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        (
            (5, 16, 24),
            np.uint16,
            {
                "imagej": True,
                "resolution": (1 / 0.13, 1 / 0.13),
                "metadata": {"axes": "TYX", "unit": "um", "finterval": 0.5, "min": 3.0, "max": 99.0},
            },
        ),
        (
            (5, 16, 24),
            np.uint8,
            {"imagej": True, "compression": "zlib", "metadata": {"axes": "ZYX", "spacing": 2.0}},
        ),
        ((5, 16, 24, 3), np.uint8, {"imagej": True, "metadata": {"axes": "TYXS"}}),
        ((5, 16, 24), np.uint16, {"ome": True, "metadata": {"axes": "TYX", **MICRONS}}),
        (
            (5, 16, 24),
            np.float32,
            {"ome": True, "compression": "zlib", "metadata": {"axes": "ZYX", **MICRONS}},
        ),
        (
            (5, 3, 16, 24),
            np.uint8,
            {"ome": True, "photometric": "rgb", "planarconfig": "separate", "metadata": {"axes": "TSYX"}},
        ),
        ((3, 16, 24), np.uint8, {"photometric": "rgb", "planarconfig": "separate"}),
        ((5, 16, 24), np.uint8, {"photometric": "miniswhite", "compression": "packbits"}),
        ((5, 16, 24), np.int16, {"photometric": "minisblack", "resolution": (300, 300), "resolutionunit": 3}),
        ((5, 16, 24), np.uint16, {"photometric": "minisblack", "compression": "zlib", "predictor": True}),
        ((5, 16, 24), bool, {"photometric": "minisblack"}),
        ((5, 16, 24), np.uint16, {"photometric": "minisblack", "extratags": [(274, "H", 1, 6, True)]}),
        ((16, 24), np.uint8, {"photometric": "palette", "colormap": noise(3, 256, dtype=np.uint16)}),
    ],
)
def test_what_a_tiff_says_of_itself_comes_out_again(tmp_path, shape, dtype, options):
    movie = noise(*shape) > 99 if dtype is bool else noise(*shape, dtype=dtype)
    tifffile.imwrite(tmp_path / "movie.tif", movie, **options)
    separate_images(known, open_images(tmp_path / "movie.tif"), tmp_path / "out", batch_size=2)
    before = described(tmp_path / "movie.tif")
    for layer in ("foreground", "background"):
        assert described(tmp_path / "out" / f"{layer}.tif") == before
    # float32 in [0, 1] has all of these values but those of float32 that need more than its 24 bits after 1.
    np.testing.assert_allclose(
        tifffile.imread(tmp_path / "out" / "foreground.tif"),
        movie,
        rtol=0,
        atol=1e-7 if dtype is np.float32 else 0,
    )
    mask = described(tmp_path / "out" / "mask.tif")
    assert mask["axes"] == before["axes"].replace("S", "")
    assert mask["photometric"] == tifffile.PHOTOMETRIC.MINISBLACK  # high is foreground, and looks bright
    for what in ("dtype", "compression", "orientation", "resolution", "resolutionunit"):
        assert mask[what] == before[what]
    if options.get("imagej"):
        kept = {"unit", "finterval", "spacing"} & options["metadata"].keys()
        assert {k: mask["imagej"][k] for k in kept} == {k: options["metadata"][k] for k in kept}
        assert "max" not in mask["imagej"]


def test_a_lossy_tiff_is_packed_without_loss(tmp_path):
    pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "movie.tif", noise(3, 16, 24), compression="jpeg", photometric="minisblack")
    images = open_images(tmp_path / "movie.tif")
    separate_images(known, images, tmp_path / "out")
    found = tifffile.imread(tmp_path / "out" / "foreground.tif")
    np.testing.assert_array_equal(found, [images.frame(i)[..., 0] for i in range(3)])
    assert described(tmp_path / "out" / "mask.tif")["compression"] == tifffile.COMPRESSION.ADOBE_DEFLATE


def test_the_layers_of_one_channel_have_no_axis_of_channels(tmp_path):
    movie = noise(5, 2, 16, 24, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "movie.tif", movie, imagej=True, metadata={"axes": "TCYX", "finterval": 2.0})
    separate_images(known, open_images(tmp_path / "movie.tif", channel=1), tmp_path / "out")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "foreground.tif"), movie[:, 1])
    for layer in ("foreground", "mask"):
        found = described(tmp_path / "out" / f"{layer}.tif")
        assert (found["axes"], found["imagej"]["finterval"]) == ("TYX", 2.0)


def test_the_layers_of_an_ome_tiff_of_many_files_are_one_file_each(tmp_path):
    (tmp_path / "in").mkdir()
    movie = noise(3, 16, 24, dtype=np.uint16)
    write_ome_set(tmp_path / "in", movie[:, None])
    separate_images(known, open_images(tmp_path / "in"), tmp_path / "out")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "foreground.tif"), movie)
    found = described(tmp_path / "out" / "mask.tif")
    assert (found["axes"], found["ome"]["PhysicalSizeX"]) == ("TYX", 0.65)


def test_pictures_come_out_upright_and_as_large(tmp_path):
    import PIL.Image

    (tmp_path / "in").mkdir()
    exif = PIL.Image.Exif()
    exif[274] = 6  # to be turned to the right
    stored = noise(16, 24)
    PIL.Image.fromarray(stored).save(tmp_path / "in" / "a.png", exif=exif, dpi=(300, 300))
    separate_images(known, open_images(tmp_path / "in"), tmp_path / "out")
    with PIL.Image.open(tmp_path / "out" / "foreground" / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.rot90(stored, -1))
        assert 274 not in image.getexif()
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_colours_of_16_bits_stay_so(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = noise(16, 24, 3, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    separate_images(known, open_images(tmp_path / "a.png"), tmp_path / "out")
    found = imagecodecs.png_decode((tmp_path / "out" / "foreground" / "a.png").read_bytes())
    np.testing.assert_array_equal(found, pixels)
    assert iio.imread(tmp_path / "out" / "mask" / "a.png").dtype == np.uint16


def test_data_sets_stay_data_sets(tmp_path):
    h5py = pytest.importorskip("h5py")
    movie = noise(5, 16, 24, dtype=np.uint16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("raw/movie", data=movie, compression="gzip")
        data.attrs["element_size_um"] = [1, 2, 2]
        file["times"] = np.arange(5)  # a scale of the data set's first axis, in this file alone
        file["times"].make_scale()
        data.dims[0].attach_scale(file["times"])
    separate_images(known, open_images(f"{tmp_path}/a.h5:/raw/movie"), tmp_path / "out", batch_size=2)
    for layer, expected in (("foreground", movie), ("mask", 65535 * (movie > 32767.5))):
        with h5py.File(tmp_path / "out" / f"{layer}.h5") as file:
            data = file["raw/movie"]
            np.testing.assert_array_equal(data[:], expected)
            assert (data.compression, data.dtype) == ("gzip", np.uint16)
            assert data.attrs["element_size_um"].tolist() == [1, 2, 2]
            assert len(data.dims[0]) == 0


def test_a_video_becomes_tiff_stacks(tmp_path):
    av = pytest.importorskip("av")
    movie = noise(5, 16, 24)
    with av.open(str(tmp_path / "movie.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "gray"
        for pixels in movie:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="gray")))
        container.mux(stream.encode(None))
    separate_images(known, open_images(tmp_path / "movie.avi"), tmp_path / "out", batch_size=2)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "foreground.tif"), movie)
    assert described(tmp_path / "out" / "mask.tif")["imagej"]["finterval"] == pytest.approx(0.05)


# ---- intensities ----


@pytest.mark.parametrize(
    ("dtype", "scale", "warns"),
    [(np.uint16, 1, False), (np.uint8, 1 / 16, True), (np.uint16, 16, True), (np.uint16, 0.5, False)],
)
def test_intensities_other_than_in_training_are_noticed(tmp_path, dtype, scale, warns):
    """A model of a camera of 12 bits sees that camera, 8 bits, all of 16 bits, and half of the light."""
    movie = (noise(24, 16, 16, dtype=np.uint16) // 16 * scale).astype(dtype)
    np.save(tmp_path / "movie.npy", movie)
    trained = Intensity((0.0, 4095.0), trained=(0.0, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        separate_images(known, open_images(tmp_path / "movie.npy", trained), tmp_path / "out")
    said = [str(warning.message) for warning in caught]
    assert len(said) == warns
    if warns:
        most = "25[45]" if dtype is np.uint8 else "65[0-9.]+"
        assert re.search(
            rf"movie\.npy are [0-9.]+ to {most}, but the model was trained on 0 to 4095:", said[0]
        )


# ---- whole or not at all ----


@pytest.fixture
def movie(tmp_path) -> Path:
    np.save(tmp_path / "movie.npy", noise(10, 16, 16))
    return tmp_path / "movie.npy"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_nothing_is_overwritten_unasked(tmp_path, movie):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mask.npy").write_text("precious")
    with pytest.raises(FileExistsError, match=r"mask\.npy is there already, and nothing is overwritten"):
        separate_images(known, open_images(movie), out)
    assert content(out) == {"mask.npy": b"precious"}
    separate_images(known, open_images(movie), out, overwrite=True)
    assert np.load(out / "mask.npy").shape == (10, 16, 16)
    assert len(content(out)) == 3


@pytest.mark.parametrize("name", ["mask.npy", "mask/a.png", "mask.h5"])
def test_an_image_that_is_read_is_never_overwritten(tmp_path, name):
    path = tmp_path / name
    if name == "mask.npy":
        np.save(path, noise(3, 8, 8))
    elif name == "mask.h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["movie"] = noise(3, 8, 8)
    else:
        path.parent.mkdir()
        iio.imwrite(path, noise(8, 8))
        os.symlink("mask", tmp_path / "link")  # another way to the same images
    before = path.read_bytes()
    sources = [f"{path}:/movie"] if name == "mask.h5" else [path]
    sources += [tmp_path / "mask", tmp_path / "link"] if path.parent.name == "mask" else []
    for source in sources:
        with pytest.raises(ValueError, match=rf"{name} is an image that is read and would be replaced"):
            separate_images(known, open_images(source), tmp_path, overwrite=True)
        assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", ["npy", "tif", "png"])
def test_what_cannot_be_written_says_where(tmp_path, suffix):
    pixels = noise(8, 8) if suffix == "png" else noise(3, 8, 8)
    np.save(tmp_path / "a.npy", pixels) if suffix == "npy" else iio.imwrite(tmp_path / f"a.{suffix}", pixels)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        ValueError, match=r"the layers cannot be written to .*/out \(.*Not a directory"
    ) as error:
        separate_images(known, open_images(tmp_path / f"a.{suffix}"), tmp_path / "out")
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize("kind", ["npy", "tif", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path, kind):
    if kind == "folder":
        (tmp_path / "in").mkdir()
        for i in range(10):
            iio.imwrite(tmp_path / "in" / f"{i}.png", noise(16, 16))
        path = tmp_path / "in"
    else:
        path = tmp_path / f"movie.{kind}"
        (np.save if kind == "npy" else tifffile.imwrite)(path, noise(10, 16, 16))
    out = tmp_path / "out"
    separate_images(known, open_images(path), out)
    before, calls = content(out), iter(range(10))

    def breaks(x):
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return known(1 - x)

    with pytest.raises(RuntimeError, match="out of memory"):
        separate_images(breaks, open_images(path), out, batch_size=2, overwrite=True)
    assert content(out) == before


KILLED = """
import os, signal, sys
from fgbg_cuda.vae import Separation, open_images
from fgbg_cuda.vae.separation.separate import separate_images
calls = iter(range(10))
def separate(x):
    if next(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return Separation(x, x, x[:, :1], x)
separate_images(separate, open_images(sys.argv[1]), sys.argv[2], batch_size=2)
"""


def test_a_kill_leaves_no_result_and_the_next_run_clears_up(tmp_path, movie):
    killed = subprocess.run([sys.executable, "-c", KILLED, movie, tmp_path / "out"], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not [path for path in content(tmp_path / "out") if not path.startswith(".unfinished")]
    separate_images(known, open_images(movie), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["background.npy", "foreground.npy", "mask.npy"]


# ---- memory ----

STREAMS = """
import sys
import torch
from fgbg_cuda.vae import Separation, open_images
from fgbg_cuda.vae.separation.separate import separate_images

def private_mib():  # without the pages of mapped files, which the kernel takes back when it needs them
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

def separate(x):
    use.append(private_mib())
    return Separation(x, x, x[:, :1], x)

for path in sys.argv[1:]:
    use = []
    separate_images(separate, open_images(path), path + ".out", batch_size=4)
    print(max(use) - max(use[:64]))
"""


# Left alone, glibc takes blocks of as much as 32 MiB from its heap once it has seen one of that size freed.
# There they come to lie between small blocks that stay, so that the process grows by steps of 2 to 26 MiB at
# times that differ from run to run, for every format, to a plateau that four times as long a stack does not
# raise. With the threshold held at its default, a large block goes back as soon as it is freed, and private
# memory is what the program holds on to.
LARGE_BLOCKS_GO_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_stack(tmp_path):
    """128 MiB in 128 batches: in the second half memory grows by far less than the 64 MiB to come."""
    shape = (512, 512, 256)
    paths = [tmp_path / name for name in ("movie.npy", "plain.tif", "packed.tif")]
    np.lib.format.open_memmap(paths[0], "w+", np.uint16, shape).flush()
    frame = np.zeros(shape[1:], np.uint16)
    for path, compression in zip(paths[1:], (None, "zlib"), strict=True):
        with tifffile.TiffWriter(path) as tiff:
            for _ in range(shape[0]):
                tiff.write(frame, contiguous=compression is None, compression=compression)
    result = subprocess.run(
        [sys.executable, "-c", STREAMS, *paths],
        env=os.environ | LARGE_BLOCKS_GO_BACK,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    growth = [float(line) for line in result.stdout.split()]
    assert len(growth) == 3
    assert max(growth) < 16, growth


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Trained for a step on 16-bit images of 32 x 32 crops with a measured intensity range."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "movie.npy", noise(24, 48, 48, dtype=np.uint16) // 16)
    data = ImagesDataModule(folder / "movie.npy", crop=32, intensity_range="auto", batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(LayeredVAEModule(networks=ObjectNetworks(width=8)), datamodule=data)
    trainer.save_checkpoint(folder / "some.ckpt")
    return folder / "some.ckpt"


def test_the_command_needs_nothing_but_the_checkpoint(tmp_path, checkpoint, capsys):
    movie = checkpoint.parent / "movie.npy"
    main(
        [
            "separate",
            str(checkpoint),
            str(movie),
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--batch-size",
            "5",
        ]
    )
    assert "24 frames of 48 x 48 separated" in capsys.readouterr().out
    module, shape, intensity = load_separator(checkpoint)
    assert isinstance(module, LayeredVAEModule)
    assert shape == (1, 32, 32)
    assert intensity.range[1] == pytest.approx(4095, rel=0.01)
    x = torch.stack([open_images(movie, intensity)[i] for i in range(5)])
    found = separate_tiles(module.separate, x, (32, 32))
    ours = np.load(tmp_path / "out" / "mask.npy")[:5]
    # float32 sums of a batch may round apart by its make-up; a 16-bit step is 1.5e-5.
    np.testing.assert_allclose(ours / 65535, found.mask[:, 0].numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("movie.npy", ["--batch-size", "0"], r"--batch-size is 0, expected 1 or more"),
        ("movie.npy", ["--tile", "0"], r"--tile is 0, expected 1 or more"),
        (
            "movie.npy",
            ["--device", "nonsense"],
            r"--device is 'nonsense', expected cpu or a device that is there",
        ),
        ("movie.npy", ["--device", "meta:7x"], r"--device is 'meta:7x', expected cpu or"),
        ("movie.npy", ["--intensity-range", "5", "5"], r"intensity_range is \(5, 5\), expected"),
        ("nowhere", [], r"nowhere is not there, expected a folder of images or a file"),
        ("rgb.png", [], r"rgb\.png is RGB, but the model was trained on grayscale; --channel"),
    ],
)
def test_the_command_fails_in_one_sentence(tmp_path, checkpoint, capsys, images, options, message):
    iio.imwrite(checkpoint.parent / "rgb.png", noise(32, 32, 3))
    with pytest.raises(SystemExit) as stop:
        main(["separate", str(checkpoint), str(checkpoint.parent / images), str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(rf"fgbg separate: .*{message}.*\n", text)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_overwrite(tmp_path, checkpoint, capsys):
    arguments = ["separate", str(checkpoint), str(checkpoint.parent / "movie.npy"), str(tmp_path)]
    (tmp_path / "foreground.npy").touch()
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--overwrite replaces it" in capsys.readouterr().err
    main([*arguments, "--overwrite"])


@pytest.mark.parametrize("damage", ["empty", "truncated", "other"])
def test_checkpoints_that_are_no_good(tmp_path, checkpoint, damage):
    path = tmp_path / "bad.ckpt"
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(checkpoint.read_bytes()[: 0 if damage == "empty" else 1000])
    with pytest.raises(
        ValueError, match=r"bad\.ckpt cannot be read, expected a whole checkpoint of fgbg fit"
    ):
        load_separator(path)


def test_a_checkpoint_cannot_name_any_class(tmp_path):
    torch.save({"separation": {"class_path": "subprocess.Popen"}}, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=r"names subprocess\.Popen, which is no module that separates images"
    ):
        load_separator(tmp_path / "bad.ckpt")
