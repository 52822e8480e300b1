"""A foreground/background VAE on the fused ops: model, data, training, figures, command line.

This subpackage needs the extras (``pip install "fgbg_cuda[train]"``); the ops themselves do not.
"""

from __future__ import annotations

from . import _extras  # noqa: F401  (first: it says what is not installed)
from .data.cells import CellsBatch, CellsUnderDisc
from .data.digits import BACKGROUNDS, DigitsOnTexture
from .data.image_data import ImagesDataModule
from .data.images import open_images
from .data.intensity import Intensity
from .errors import InputError, NonFiniteLossError, ResumeError
from .models.calcium import CalciumModel
from .models.cell_networks import (
    CellNetworks,
    CellsDecoder,
    CellsEncoder,
    ScatteredLightDecoder,
    ScatteredLightEncoder,
)
from .models.double_elbo import DoubleELBO, DoubleELBOOutput
from .models.layered import LayeredOutput, LayeredVAE, Separation
from .models.networks import Networks
from .models.object_networks import (
    BackgroundDecoder,
    BackgroundEncoder,
    ForegroundDecoder,
    ForegroundEncoder,
    ObjectNetworks,
)
from .models.scene import SceneOutput, SceneVAE
from .training.modules import DoubleELBOModule, LayeredVAEModule, SeparationModule
from .training.scene_module import CalciumModule, SceneModule

__all__ = [
    "BACKGROUNDS",
    "BackgroundDecoder",
    "BackgroundEncoder",
    "CalciumModel",
    "CalciumModule",
    "CellNetworks",
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
    "ImagesDataModule",
    "InputError",
    "Intensity",
    "LayeredOutput",
    "LayeredVAE",
    "LayeredVAEModule",
    "Networks",
    "NonFiniteLossError",
    "ObjectNetworks",
    "ResumeError",
    "ScatteredLightDecoder",
    "ScatteredLightEncoder",
    "SceneModule",
    "SceneOutput",
    "SceneVAE",
    "Separation",
    "SeparationModule",
    "open_images",
]
