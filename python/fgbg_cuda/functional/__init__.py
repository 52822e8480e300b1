"""The public functions, by family. Each checks its arguments and calls the fused kernel, or, where kernels
cannot go (``torch.func`` transforms, forward-mode AD, devices without one), the same formula in
reference.py."""

from .discrete import bernoulli_kl, categorical_kl
from .evaluation import importance_weighted_bound
from .latents import gaussian_kl, gaussian_log_prob, reparameterize, sample_gaussian
from .noise import philox_normal
from .reconstruction import (
    ReconstructionTerms,
    blended_reconstruction_loss,
    masked_reconstruction_loss,
    mixture_reconstruction_loss,
    reconstruction_loss,
)
from .slots import slot_blended_loss, slot_mixture_loss

__all__ = [
    "ReconstructionTerms",
    "bernoulli_kl",
    "blended_reconstruction_loss",
    "categorical_kl",
    "gaussian_kl",
    "gaussian_log_prob",
    "importance_weighted_bound",
    "masked_reconstruction_loss",
    "mixture_reconstruction_loss",
    "philox_normal",
    "reconstruction_loss",
    "reparameterize",
    "sample_gaussian",
    "slot_blended_loss",
    "slot_mixture_loss",
]
