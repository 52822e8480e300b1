"""What a type checker makes of calls. Read by `make lint`, never run; where an error is expected and does not
come, that is an error as well (warn_unused_ignores)."""

from torch import Tensor
from typing_extensions import assert_type

import fgbg_cuda
from fgbg_cuda import ReconstructionTerms


def overloads(x: Tensor, logits: Tensor) -> None:
    assert_type(fgbg_cuda.masked_reconstruction_loss(x, x, x, mask_logits=logits), Tensor)
    assert_type(
        fgbg_cuda.masked_reconstruction_loss(x, None, x, mask_logits=logits, return_terms=True),
        tuple[Tensor, ReconstructionTerms],
    )
    assert_type(fgbg_cuda.slot_mixture_loss(x, x, mask_logits=logits), Tensor)
    assert_type(
        fgbg_cuda.slot_mixture_loss(x, x, mask_logits=logits, return_responsibilities=True),
        tuple[Tensor, Tensor],
    )
    assert_type(fgbg_cuda.sample_gaussian(x, x), tuple[Tensor, Tensor])


def words(x: Tensor) -> None:
    fgbg_cuda.gaussian_kl(x, x, reduction="batchmean", parameterization="std")
    fgbg_cuda.gaussian_kl(x, x, reduction="batch_mean")  # type: ignore[arg-type]
    fgbg_cuda.gaussian_kl(x, x, parameterization="var")  # type: ignore[arg-type]
    fgbg_cuda.reconstruction_loss(x, x, likelihood="normal")  # type: ignore[arg-type]
    fgbg_cuda.mixture_reconstruction_loss(x, x, x, mask_logits=x, channels="both")  # type: ignore[arg-type]
    fgbg_cuda.masked_reconstruction_loss(x, x, x, mask=x, normalize="pixels")  # type: ignore[call-overload]
    fgbg_cuda.distributions.Gaussian(x, x, "sigma")  # type: ignore[arg-type]


def numbers(x: Tensor) -> None:
    fgbg_cuda.gaussian_kl(x, x, 0.5, x)
    fgbg_cuda.reparameterize(x, x, num_samples=2.0)  # type: ignore[arg-type]
