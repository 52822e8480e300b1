"""Separating images of every format: tiles, bit depths, whole results or none, memory, the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")

import imageio.v3 as iio  # noqa: E402
import tifffile  # noqa: E402

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
        ("rgb.png", [], r"rgb\.png is RGB, but the model was trained on grayscale"),
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
