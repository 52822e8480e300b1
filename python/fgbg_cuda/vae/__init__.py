"""A foreground/background VAE on the fused ops: model, data, training, figures, command line.

This subpackage needs the extras (``pip install "fgbg_cuda[demo]"``); the ops themselves do not.
"""

from __future__ import annotations

from . import _extras  # noqa: F401  (first: it says what is not installed)
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
