"""What a :class:`LayeredVAE` asks of its networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

Gaussian = tuple[Tensor, Tensor]  # (mu, logvar) of a diagonal Gaussian


class Networks(ABC):
    """How the four networks of a :class:`LayeredVAE` are made.

    Networks of your own are a subclass in a module that can be imported, a frozen dataclass of plain values:
    its name and the values go into checkpoints.

    Attributes:
        size_multiple: the networks take images whose H and W are multiples of it; others are padded.
        tone_reach: None where the decoded foreground is what a pixel of the foreground shows. A number where
            the decoder knows one tone for objects that differ: so many pixels from each other they are much
            alike, and a mixture's masks follow :func:`~fgbg_cuda.vae.models.local_tones.local_tones`.
    """

    size_multiple: int
    tone_reach: float | None = None

    def start(self, model: nn.Module, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:  # noqa: B027
        """Sets where training starts, from its first batch x [B, C, H, W]; by default nothing.

        Args:
            model: the :class:`LayeredVAE` with these networks.
            reduce: the mean over all processes of a tensor; each has its part of the batch.
        """

    @abstractmethod
    def build(self, shape: tuple[int, int, int], likelihood: str) -> tuple[nn.Module, ...]:
        """The foreground's encoder and decoder and the background's encoder and decoder.

        Their signatures are those of the classes in object_networks.py and cell_networks.py; the foreground's
        encoder may return any number of Gaussians, and its decoder gets one sample of each.

        Args:
            shape: (C, H, W) of the images, after padding.
            likelihood: of a pixel. With "bernoulli" the decoders have to give logits, else intensities.
        """
