"""Launches every CUDA kernel, vector and general, forward and backward, on small inputs: what
compute-sanitizer watches (it slows each launch a hundredfold)."""

from __future__ import annotations

import torch

import fgbg_cuda as f
from fgbg_cuda.reference import LIKELIHOODS

LOSSES = (f.masked_reconstruction_loss, f.blended_reconstruction_loss, f.mixture_reconstruction_loss)

for side in (24, 13):  # planes of a multiple of 8 pixels, and not
    for dtype in (torch.float32, torch.bfloat16, torch.float64):

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.rand(shape, dtype=dtype, device="cuda", requires_grad=True)

        images = [leaf(20, 3, side, side) for _ in range(3)]  # several blocks
        logits, scale = leaf(20, 1, side, side), leaf(3)
        for likelihood in LIKELIHOODS:
            for loss in LOSSES:
                # Halved, so that the gradients of the forward pass have to be scaled.
                (0.5 * loss(*images, mask_logits=logits, likelihood=likelihood)).backward()
        f.masked_reconstruction_loss(
            *images, mask_logits=logits, fg_scale=scale, normalize="area", return_terms=True
        )[0].backward()
        mu, logvar = leaf(3, side * 9), leaf(3, side * 9)
        z, kl = f.sample_gaussian(mu, logvar, mu.detach(), logvar.detach(), num_samples=2)
        (z.sum() + kl + f.bernoulli_kl(mu, logvar)).backward()
        f.philox_normal(3, (side * side,), dtype=dtype, device="cuda")
torch.cuda.synchronize()
