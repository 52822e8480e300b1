"""A foreground/background VAE on the fused ops: model, data, training, figures, command line.

This subpackage needs the extras (``pip install "fgbg_cuda[demo]"``); the ops themselves do not.
"""

from __future__ import annotations

try:
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError(f'fgbg_cuda.vae needs the extras: pip install "fgbg_cuda[demo]" ({error})') from error

from .data import BACKGROUNDS, DigitsOnTexture
from .image_data import ImagesDataModule
from .images import ImageFolder, open_images
from .intensity import Intensity
from .models import (
    BackgroundDecoder,
    BackgroundEncoder,
    ForegroundDecoder,
    ForegroundEncoder,
    LayeredOutput,
    LayeredVAE,
    Separation,
)
from .module import LayeredVAEModule, NonFiniteLossError

__all__ = [
    "BACKGROUNDS",
    "BackgroundDecoder",
    "BackgroundEncoder",
    "DigitsOnTexture",
    "ForegroundDecoder",
    "ForegroundEncoder",
    "ImageFolder",
    "ImagesDataModule",
    "Intensity",
    "LayeredOutput",
    "LayeredVAE",
    "LayeredVAEModule",
    "NonFiniteLossError",
    "Separation",
    "open_images",
]
