"""The public functions, by family. Each checks its arguments and calls the fused kernel, or, where kernels
cannot go (``torch.func`` transforms, forward-mode AD, devices without one), the same formula in
reference.py."""

from . import discrete, evaluation, latents, noise, reconstruction, slots
from .discrete import *  # noqa: F403
from .evaluation import *  # noqa: F403
from .latents import *  # noqa: F403
from .noise import *  # noqa: F403
from .reconstruction import *  # noqa: F403
from .slots import *  # noqa: F403

__all__ = sorted(
    name
    for family in (discrete, evaluation, latents, noise, reconstruction, slots)
    for name in family.__all__
)
