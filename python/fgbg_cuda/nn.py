"""The ops as modules, for those who build models that way.

Options go to the constructor, tensors to ``forward``. An option that is a tensor, such as a learned scale,
is registered: an ``nn.Parameter`` as a parameter, any other tensor as a buffer. So it is in ``parameters()``
and the ``state_dict``, and moves with the module. What is given to ``forward`` takes its place. Each module
calls its function in ``fgbg_cuda.functional``, which documents the options.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from . import functional as F

__all__ = [
    "BernoulliKL",
    "BlendedReconstructionLoss",
    "CategoricalKL",
    "GaussianKL",
    "GaussianLogProb",
    "MaskedReconstructionLoss",
    "MixtureReconstructionLoss",
    "ReconstructionLoss",
    "Reparameterize",
    "SampleGaussian",
    "SlotBlendedLoss",
    "SlotMixtureLoss",
]


class _Op(nn.Module):
    """Holds the options of ``function``, the ones that are not its tensors."""

    function: Any
    tensors: tuple[str, ...]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        accepted = set(inspect.signature(self.function).parameters) - set(self.tensors)
        unknown = set(options) - accepted
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(sorted(unknown))}; "
                f"expected some of {', '.join(sorted(accepted))}"
            )
        self.plain_options: dict[str, Any] = {}
        self.tensor_options: list[str] = []
        for name, value in options.items():
            self._set_option(name, value)

    def _set_option(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            self.plain_options[name] = value
            return
        self.tensor_options.append(name)
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif not value.requires_grad:
            self.register_buffer(name, value)
        else:
            raise ValueError(
                f"{name} is a tensor that requires a gradient, expected an nn.Parameter or a tensor that "
                "does not; what another module learns, or is computed, goes to forward"
            )

    @property
    def options(self) -> dict[str, Any]:
        return {**self.plain_options, **{name: getattr(self, name) for name in self.tensor_options}}

    def extra_repr(self) -> str:
        shown = {n: list(v.shape) if isinstance(v, Tensor) else v for n, v in self.options.items()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class Reparameterize(_Op):
    """``forward(mu, logvar)``: ``fgbg_cuda.reparameterize``."""

    function = staticmethod(F.reparameterize)
    tensors = ("mu", "logvar", "seed", "offset", "generator")

    def forward(self, mu: Tensor, logvar: Tensor, **draw: Any) -> Tensor:
        return F.reparameterize(mu, logvar, **self.options, **draw)


class GaussianKL(_Op):
    """``forward(mu, logvar, prior_mu=None, prior_logvar=None)``: ``fgbg_cuda.gaussian_kl``."""

    function = staticmethod(F.gaussian_kl)
    tensors = ("mu", "logvar", "prior_mu", "prior_logvar")

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        prior_mu: Tensor | float | None = None,
        prior_logvar: Tensor | float | None = None,
    ) -> Tensor:
        return F.gaussian_kl(mu, logvar, prior_mu, prior_logvar, **self.options)


class SampleGaussian(_Op):
    """``forward(mu, logvar, prior_mu=None, prior_logvar=None)``: ``fgbg_cuda.sample_gaussian``.

    ``seed``, ``offset`` and ``generator`` go to ``forward``, since they change from call to call.
    """

    function = staticmethod(F.sample_gaussian)
    tensors = ("mu", "logvar", "prior_mu", "prior_logvar", "seed", "offset", "generator")

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        prior_mu: Tensor | float | None = None,
        prior_logvar: Tensor | float | None = None,
        **draw: Any,
    ) -> tuple[Tensor, Tensor]:
        return F.sample_gaussian(mu, logvar, prior_mu, prior_logvar, **self.options, **draw)


class BernoulliKL(_Op):
    """``forward(logits, prior_logits=0.0)``: ``fgbg_cuda.bernoulli_kl``."""

    function = staticmethod(F.bernoulli_kl)
    tensors = ("logits", "prior_logits")

    def forward(self, logits: Tensor, prior_logits: Tensor | float = 0.0) -> Tensor:
        return F.bernoulli_kl(logits, prior_logits, **self.options)


class ReconstructionLoss(_Op):
    """``forward(prediction, target)``: ``fgbg_cuda.reconstruction_loss``. The scale and the weight may be
    given in either place."""

    function = staticmethod(F.reconstruction_loss)
    tensors = ("prediction", "target")

    def forward(self, prediction: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        return F.reconstruction_loss(prediction, target, **{**self.options, **tensors})


class CategoricalKL(_Op):
    """``forward(logits, prior_logits=0.0)``: ``fgbg_cuda.categorical_kl``."""

    function = staticmethod(F.categorical_kl)
    tensors = ("logits", "prior_logits")

    def forward(self, logits: Tensor, prior_logits: Tensor | float = 0.0) -> Tensor:
        return F.categorical_kl(logits, prior_logits, **self.options)


class GaussianLogProb(_Op):
    """``forward(z, mu=0.0, logvar=None)``: ``fgbg_cuda.gaussian_log_prob``."""

    function = staticmethod(F.gaussian_log_prob)
    tensors = ("z", "mu", "logvar")

    def forward(self, z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float | None = None) -> Tensor:
        return F.gaussian_log_prob(z, mu, logvar, **self.options)


class MaskedReconstructionLoss(_Op):
    """``forward(fg, bg, target, mask=... or mask_logits=...)``:
    ``fgbg_cuda.masked_reconstruction_loss``. Scales may be given in either place."""

    function = staticmethod(F.masked_reconstruction_loss)
    tensors = ("fg", "bg", "target", "mask", "mask_logits")

    def forward(
        self, fg: Tensor, bg: Tensor | None, target: Tensor, **tensors: Tensor
    ) -> Tensor | tuple[Tensor, F.ReconstructionTerms]:
        return F.masked_reconstruction_loss(fg, bg, target, **{**self.options, **tensors})


class BlendedReconstructionLoss(_Op):
    """``forward(fg, bg, target, mask=... or mask_logits=...)``:
    ``fgbg_cuda.blended_reconstruction_loss``. The scale may be given in either place."""

    function = staticmethod(F.blended_reconstruction_loss)
    tensors = ("fg", "bg", "target", "mask", "mask_logits")

    def forward(self, fg: Tensor, bg: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        return F.blended_reconstruction_loss(fg, bg, target, **{**self.options, **tensors})


class MixtureReconstructionLoss(_Op):
    """``forward(fg, bg, target, mask_logits=...)``: ``fgbg_cuda.mixture_reconstruction_loss``.
    Scales may be given in either place."""

    function = staticmethod(F.mixture_reconstruction_loss)
    tensors = ("fg", "bg", "target", "mask_logits")

    def forward(self, fg: Tensor, bg: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        return F.mixture_reconstruction_loss(fg, bg, target, **{**self.options, **tensors})


class SlotMixtureLoss(_Op):
    """``forward(slots, target, mask_logits=... or log_mask=...)``: ``fgbg_cuda.slot_mixture_loss``. The
    scale and the weight may be given in either place."""

    function = staticmethod(F.slot_mixture_loss)
    tensors = ("slots", "target", "mask_logits", "log_mask")

    def forward(self, slots: Tensor, target: Tensor, **tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return F.slot_mixture_loss(slots, target, **{**self.options, **tensors})


class SlotBlendedLoss(_Op):
    """``forward(slots, target, mask_logits=... or log_mask=...)``: ``fgbg_cuda.slot_blended_loss``. The
    scale and the weight may be given in either place."""

    function = staticmethod(F.slot_blended_loss)
    tensors = ("slots", "target", "mask_logits", "log_mask")

    def forward(self, slots: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        return F.slot_blended_loss(slots, target, **{**self.options, **tensors})
