"""A foreground/background VAE on the fused ops: model, data, training, figures, command line.

This subpackage needs the extras (``pip install "fgbg_cuda[demo]"``); the ops themselves do not.
"""

from __future__ import annotations

try:
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError(f'fgbg_cuda.vae needs the extras: pip install "fgbg_cuda[demo]" ({error})') from error

from .cell_networks import CellsDecoder, CellsEncoder, ScatteredLightDecoder, ScatteredLightEncoder
from .cells import CellsBatch, CellsUnderDisc
from .data import BACKGROUNDS, DigitsOnTexture, ImageFolder
from .double_elbo import DoubleELBO, DoubleELBOOutput
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
    "LayeredOutput",
    "LayeredVAE",
    "LayeredVAEModule",
    "NonFiniteLossError",
    "ScatteredLightDecoder",
    "ScatteredLightEncoder",
    "Separation",
    "SeparationModule",
]
