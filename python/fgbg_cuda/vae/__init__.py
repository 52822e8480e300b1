"""A foreground/background VAE on the fused ops: model, data, training, figures, command line.

This subpackage needs the extras (``pip install "fgbg_cuda[demo]"``); the ops themselves do not.
"""

from __future__ import annotations

from . import _extras  # noqa: F401  (first: it says what is not installed)
from .cell_networks import CellsDecoder, CellsEncoder, ScatteredLightDecoder, ScatteredLightEncoder
from .cells import CellsBatch, CellsUnderDisc
from .data import BACKGROUNDS, DigitsOnTexture
from .double_elbo import DoubleELBO, DoubleELBOOutput
from .image_data import ImagesDataModule
from .images import ImageFolder, open_images
from .intensity import Intensity
from .models import LayeredOutput, LayeredVAE, Separation
from .module import DoubleELBOModule, LayeredVAEModule, NonFiniteLossError, SeparationModule
from .object_networks import BackgroundDecoder, BackgroundEncoder, ForegroundDecoder, ForegroundEncoder

__all__ = [
    "BACKGROUNDS",
    "BackgroundDecoder",
    "BackgroundEncoder",
    "CellsBatch",
    "CellsDecoder",
    "CellsEncoder",
    "CellsUnderDisc",
    "DigitsOnTexture",
    "DoubleELBO",
    "DoubleELBOModule",
    "DoubleELBOOutput",
    "ForegroundDecoder",
    "ForegroundEncoder",
    "ImageFolder",
    "ImagesDataModule",
    "Intensity",
    "LayeredOutput",
    "LayeredVAE",
    "LayeredVAEModule",
    "NonFiniteLossError",
    "ScatteredLightDecoder",
    "ScatteredLightEncoder",
    "Separation",
    "SeparationModule",
    "open_images",
]
