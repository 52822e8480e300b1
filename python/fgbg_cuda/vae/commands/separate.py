"""``fgbg separate``: the foreground, background and mask of every image or frame, with a trained model."""

from __future__ import annotations

import argparse
import statistics
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import open_images
from ..data.intensity import Intensity
from ..errors import InputError
from ..evaluation.metrics import warn_of_mask
from ..models.layered import Separation
from ..separation.cells import CELL_FILES, save_cells
from ..separation.separate import load_separator, separate_images


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fgbg separate",
        description="Writes the foreground, background and mask of every image or frame into OUT, in the "
        "format and bit depth of IMAGES (for JPEG and BMP: PNG; for .npz: .npy; for a video: TIFF), a few at "
        "a time: a stack may be larger than memory.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=expanduser, help="from fgbg fit; needs nothing else"
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=expanduser,
        help="folder of PNG, JPEG, BMP, TIFF images, one image, TIFF stack, .npy, .npz, file.h5:/path, video",
    )
    parser.add_argument("out", metavar="OUT", type=expanduser, help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=32, help="frames in memory at a time (default: 32)")
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
    parser.add_argument(
        "--channel", type=int, metavar="N", help="the channel to read of images with several, counted from 0"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    run(parser.parse_args(argv))


def run(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise InputError(f"--batch-size is {options.batch_size}, expected 1 or more")
    if options.tile is not None and options.tile < 1:
        raise InputError(f"--tile is {options.tile}, expected 1 or more")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise InputError(
            f"--device is {device!r}, expected cpu or a device that is there ({error})"
        ) from error
    module, shape, intensity = load_separator(options.checkpoint, device)
    if options.intensity_range is not None:
        intensity = Intensity(tuple(options.intensity_range))
    images = open_images(options.images, intensity, options.channel)
    if shape is not None and images.shape[0] != shape[0]:
        kinds = {1: "grayscale", 3: "RGB"}
        advice = "; --channel chooses one of its channels" if images.shape[0] == 3 else ""
        raise InputError(
            f"{options.images} is {kinds[images.shape[0]]}, but the model was trained on {kinds[shape[0]]}"
            + advice
        )
    size = shape and shape[1:]
    model = getattr(module, "model", None)
    if getattr(model, "one_scene", False) and (options.tile is not None or images.shape != shape):
        asked = "--tile" if options.tile is not None else " x ".join(map(str, images.shape[1:]))
        raise InputError(
            f"{options.checkpoint} knows one scene, in whole frames of {shape[1]} x {shape[2]}, got {asked}"
        )
    if options.tile is not None:
        size = (options.tile, options.tile)
    shares, traces = [], []
    has_cells = hasattr(model, "cells")
    there = [path for name in CELL_FILES if (path := Path(options.out, name)).exists()]
    if has_cells and there and not options.overwrite:
        raise InputError(f"{there[0]} is there already; --overwrite replaces it")

    def separate(x: Tensor) -> Separation:
        if has_cells:
            out = model(x)
            traces.append(out.traces.cpu())
            found = model.layers(out, x)
        else:
            found = module.separate(x)
        shares.append(found.mask.mean().item())
        return found

    try:
        separate_images(
            separate,
            images,
            options.out,
            size=size,
            batch_size=options.batch_size,
            device=device,
            overwrite=options.overwrite,
            progress=True,
        )
    except FileExistsError as error:
        raise InputError(f"{error}; --overwrite replaces it") from error
    if has_cells:
        save_cells(options.out, model.cells().cpu().numpy(), torch.cat(traces).T.numpy())
    warn_of_mask(statistics.mean(shares), options.images)
    print(f"{len(images)} frames of {images.shape[1]} x {images.shape[2]} separated; see {options.out}/")
