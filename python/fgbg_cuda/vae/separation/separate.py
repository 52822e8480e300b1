"""The foreground, background and mask of every image or frame, with a trained model."""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.images import Images
from ..data.intensity import Intensity, probability, warn_of_other_intensities
from ..errors import InputError
from ..models.layered import Separation
from ..training.resume import read_checkpoint
from .tiles import separate_tiles
from .writers import LAYERS, Writer, layer_writer


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
    noted = read_checkpoint(checkpoint, "separation")
    try:
        kind = pkgutil.resolve_name(noted["class_path"])
    except (ImportError, AttributeError) as error:
        raise InputError(f"{checkpoint} names {noted['class_path']}, which is not there ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, L.LightningModule) and hasattr(kind, "separate")):
        raise InputError(
            f"{checkpoint} names {noted['class_path']}, which is no module that separates images"
        )
    module = kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    for layer in module.modules():
        if isinstance(layer, torch.nn.SiLU):
            layer.inplace = True  # nothing needs its input again
    values, trained = (noted.get(name) for name in ("intensity_range", "trained_intensities"))
    intensity = Intensity(values and tuple(values), trained and tuple(trained))
    return Separator(module.to(device).eval(), noted.get("shape"), intensity)


def separate_images(
    separate: Callable[[Tensor], Separation],
    images: Images,
    out: str | Path,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes the layers of ``images`` into the folder ``out``, ``batch_size`` frames in memory at a time.

    They have the format and data type of the images. Foreground and background have their intensities too;
    the mask, a probability, goes from 0 to the largest value of an integer type, else to 1.

    Args:
        separate: the layers of a batch [B, C, H, W] in [0, 1] on ``device``, as ``module.separate``.
        size: height and width of the images that the model was trained on, see
            :func:`~fgbg_cuda.vae.separation.tiles.separate_tiles`.

    Raises:
        FileExistsError: a result is there already, and ``overwrite`` is not set.
        InputError: a frame cannot be read.

    Warns where the values of the images lie elsewhere than those of the training.
    """
    warn_of_other_intensities(str(images.path), images.sample(), images.intensity)
    batches = [range(k, min(k + batch_size, len(images))) for k in range(0, len(images), batch_size)]

    def read(numbers: range) -> tuple[list[np.dtype], Tensor]:
        frames = [images.frame(i) for i in numbers]
        x = [
            images.intensity.to_unit(frame, images.name(i)) for i, frame in zip(numbers, frames, strict=True)
        ]
        return [frame.dtype for frame in frames], torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2)

    def write(writer: Writer, numbers: range, dtypes: list[np.dtype], found: Separation) -> None:
        layers = [getattr(found, name).permute(0, 2, 3, 1).cpu().numpy() for name in LAYERS]
        for i, dtype, foreground, background, mask in zip(numbers, dtypes, *layers, strict=True):
            writer.write(
                i,
                (
                    images.intensity.from_unit(foreground, dtype),
                    images.intensity.from_unit(background, dtype),
                    probability(dtype).from_unit(mask, dtype),
                ),
            )

    # glibc gives memory back to the system after almost every layer of a network, only to ask for it again:
    # a quarter of the time goes there. It keeps up to 64 MiB once a block of nearly 32 has come and gone.
    torch.empty(2**25 - 2**14, dtype=torch.uint8)
    with (
        layer_writer(images, out, overwrite) as writer,
        tqdm(total=len(images), unit="frame", disable=not progress) as bar,
        ThreadPoolExecutor(1) as background,  # reads and writes while the model computes
        torch.inference_mode(),
    ):
        written, coming = None, background.submit(read, batches[0])
        for numbers, following in itertools.zip_longest(batches, batches[1:]):
            dtypes, x = coming.result()
            if following is not None:
                coming = background.submit(read, following)
            found = separate_tiles(separate, x.to(device), size)
            if written is not None:
                written.result()
            written = background.submit(write, writer, numbers, dtypes, found)
            bar.update(len(numbers))
        written.result()
