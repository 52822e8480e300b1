"""``fgbg separate``: the foreground, background and mask of every image or frame, with a trained model."""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.images import Images, open_images
from ..data.intensity import Intensity
from ..errors import InputError
from ..models.layered import Separation
from .tiles import MULTIPLE, separate_tiles
from .writers import LAYERS, layer_writer


class Separator(NamedTuple):
    """A trained module and what it was trained on."""

    module: L.LightningModule
    shape: tuple[int, int, int] | None  # (C, H, W) of the training images; None: not noted
    intensity: Intensity


def load_separator(checkpoint: str | Path, device: str | torch.device = "cpu") -> Separator:
    """A module of any class, ready to separate, from a checkpoint alone.

    Raises:
        InputError: the file is no whole checkpoint, or not one of a module of this package.
    """
    try:
        noted = torch.load(checkpoint, map_location="cpu", weights_only=True)["separation"]
    except Exception as error:  # zip, pickle and key errors, each with a text of its own
        raise InputError(
            f"{checkpoint} cannot be read, expected a whole checkpoint of fgbg fit ({type(error).__name__})"
        ) from error
    kind = pkgutil.resolve_name(noted["class_path"])
    if not (isinstance(kind, type) and issubclass(kind, L.LightningModule) and hasattr(kind, "separate")):
        raise InputError(
            f"{checkpoint} names {noted['class_path']}, which is no module that separates images"
        )
    module = kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    values = noted.get("intensity_range")
    return Separator(
        module.to(device).eval(), noted.get("shape"), Intensity(None if values is None else tuple(values))
    )


def separate_images(
    separate: Callable[[Tensor], Separation],
    images: Images,
    out: str | Path,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes the layers of ``images`` into the folder ``out``, ``batch_size`` frames in memory at a time.

    They have the format and data type of the images. Foreground and background have their intensities too;
    the mask, a probability, goes from 0 to the largest value of an integer type, else to 1.
    The foreground is defined everywhere, but means something only where the mask is high.

    Args:
        separate: the layers of a batch [B, C, H, W] in [0, 1] on ``device``, as ``module.separate``.
        size: height and width of the images that the model was trained on, see
            :func:`~fgbg_cuda.vae.separation.tiles.separate_tiles`.

    Raises:
        FileExistsError: a result is there already, and ``overwrite`` is not set.
        InputError: a frame cannot be read.
    """
    with (
        layer_writer(images, out, overwrite) as writer,
        tqdm(total=len(images), unit="frame", disable=not progress) as bar,
    ):
        for start in range(0, len(images), batch_size):
            numbers = range(start, min(start + batch_size, len(images)))
            frames = [images.frame(i) for i in numbers]
            x = np.stack(
                [images.intensity.to_unit(f, images.name(i)) for i, f in zip(numbers, frames, strict=True)]
            )
            with torch.no_grad():
                found = separate_tiles(separate, torch.from_numpy(x).permute(0, 3, 1, 2).to(device), size)
            layers = [getattr(found, name).permute(0, 2, 3, 1).double().cpu().numpy() for name in LAYERS]
            for i, frame, foreground, background, mask in zip(numbers, frames, *layers, strict=True):
                writer.write(
                    i,
                    (
                        images.intensity.from_unit(foreground, frame.dtype),
                        images.intensity.from_unit(background, frame.dtype),
                        Intensity().from_unit(mask, frame.dtype),
                    ),
                )
            bar.update(len(numbers))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fgbg separate",
        description="Writes the foreground, background and mask of every image or frame into OUT, in the "
        "format and bit depth of IMAGES (for JPEG: PNG; for .npz: .npy), a few at a time: a stack may be "
        "larger than memory.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="from fgbg fit; needs nothing else")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        help="folder of PNG, JPEG, TIFF images, one image, TIFF stack, .npy or .npz",
    )
    parser.add_argument("out", metavar="OUT", help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=16, help="frames in memory at a time (default: 16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--intensity-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the values that become 0 and 1 for the model (default: those of its training)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="SIDE",
        help="side of the overlapping tiles that a larger frame is cut into (default: the training images')",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    options = parser.parse_args(argv)
    try:
        run(options)
    except (InputError, OSError) as error:
        hint = "; --overwrite replaces it" if isinstance(error, FileExistsError) else ""
        parser.exit(1, f"{parser.prog}: {error}{hint}\n")


def run(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise InputError(f"--batch-size is {options.batch_size}, expected 1 or more")
    if options.tile is not None and (options.tile < MULTIPLE or options.tile % MULTIPLE):
        raise InputError(f"--tile is {options.tile}, expected a multiple of {MULTIPLE}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module, shape, intensity = load_separator(options.checkpoint, device)
    if options.intensity_range is not None:
        intensity = Intensity(tuple(options.intensity_range))
    images = open_images(options.images, intensity)
    if shape is not None and images.shape[0] != shape[0]:
        kinds = {1: "grayscale", 3: "RGB"}
        raise InputError(
            f"{options.images} is {kinds[images.shape[0]]}, but the model was trained on {kinds[shape[0]]}"
        )
    size = shape and shape[1:]
    if options.tile is not None:
        size = (options.tile, options.tile)
    separate_images(
        module.separate,
        images,
        options.out,
        size=size,
        batch_size=options.batch_size,
        device=device,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"{len(images)} frames of {images.shape[1]} x {images.shape[2]} separated; see {options.out}/")
