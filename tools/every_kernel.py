"""Launches every CUDA kernel, vector and general, forward and backward, on small inputs: what
compute-sanitizer watches (it slows each launch a hundredfold). --emulated: on the CPU, as the tests do."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

import fgbg_cuda as f
from fgbg_cuda.reference import LIKELIHOODS

LOSSES = (f.masked_reconstruction_loss, f.blended_reconstruction_loss, f.mixture_reconstruction_loss)
SLOT_LOSSES = (f.slot_mixture_loss, f.slot_blended_loss)
EMULATED = "--emulated" in sys.argv
DEVICE = "cpu" if EMULATED else "cuda"


def run() -> None:
    for side in (24, 13):  # planes of a multiple of 8 pixels, and not
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            # Layers of one type beside a target of another are the mixed format.
            for target_dtype in (dtype, torch.float16 if dtype == torch.float32 else torch.float32):

                def leaf(*shape: int, dtype: torch.dtype = dtype, grad: bool = True) -> torch.Tensor:
                    return torch.rand(shape, dtype=dtype, device=DEVICE, requires_grad=grad)

                layers = [leaf(20, 3, side, side) for _ in range(2)]  # several blocks
                target = leaf(20, 3, side, side, dtype=target_dtype, grad=False)
                logits, scale = leaf(20, 1, side, side), leaf(3)
                weight = leaf(20, 1, side, side)
                slots, of_slots = leaf(4, 3, 3, side, side), leaf(4, 3, 1, side, side)
                for likelihood in LIKELIHOODS:
                    calls = [(loss, (*layers, target), {"mask_logits": logits}) for loss in LOSSES]
                    calls.append((f.reconstruction_loss, (layers[0], target), {}))
                    calls += [(loss, operands, {**o, "weight": weight}) for loss, operands, o in calls]
                    calls += [(s, (slots, target[:4]), {"mask_logits": of_slots}) for s in SLOT_LOSSES]
                    for loss, operands, options in calls:
                        # Halved, so that the gradients of the forward pass have to be scaled.
                        (0.5 * loss(*operands, likelihood=likelihood, **options)).backward()
                        with torch.no_grad():
                            loss(*operands, likelihood=likelihood, **options)
                f.masked_reconstruction_loss(
                    *layers, target, mask_logits=logits, fg_scale=scale, normalize="area", return_terms=True
                )[0].backward()
                mu, logvar = leaf(3, side * 9), leaf(3, side * 9, dtype=target_dtype)
                z, kl = f.sample_gaussian(mu, logvar, mu.detach(), logvar.detach(), num_samples=2)
                (z.sum() + kl + f.bernoulli_kl(mu, logvar) + f.gaussian_kl(mu, logvar)).backward()
                f.bernoulli_kl(mu, 0.0).backward()
                for word in ("std", "log_std", "logvar"):
                    z = f.reparameterize(mu, logvar, parameterization=word)
                    (z * z).sum().backward()
                    z, kl = f.sample_gaussian(mu, logvar, parameterization=word)
                    # (The gradient of a plain sum is expanded, which takes another kernel.)
                    ((z * z).sum() + kl + f.gaussian_kl(mu, logvar, parameterization=word)).backward()
                    with torch.no_grad():
                        f.gaussian_kl(mu, logvar, parameterization=word)
                for word in ("std", "log_std", "logvar"):
                    f.gaussian_log_prob(mu, mu, logvar, parameterization=word).backward()
                    f.gaussian_log_prob(mu.detach(), 0.0, logvar.detach(), parameterization=word)
                (f.categorical_kl(mu) + f.categorical_kl(mu, logvar)).backward()
                with torch.no_grad():
                    f.gaussian_kl(mu, logvar)
                    f.bernoulli_kl(mu, logvar)
                    f.bernoulli_kl(mu, 0.0)
                    f.categorical_kl(mu)
                    f.categorical_kl(mu, logvar)
            for size in (side * side, 4 * side + 4):  # multiples of 8, of 4, and neither
                f.philox_normal(3, (size,), dtype=dtype, device=DEVICE)
    by_blocks()


def by_blocks() -> None:
    """Samples that blocks rather than warps take, several segments of each, with all that is summed."""
    for channels in (3, 300):  # with room for the gradients of the scales in shared memory, and without
        fg, bg, target = torch.rand(3, 2, channels, 72, 72, device=DEVICE, requires_grad=True).unbind()
        scales = {
            n: torch.rand(channels, device=DEVICE, requires_grad=True) for n in ("fg_scale", "bg_scale")
        }
        mask = torch.rand(2, 1, 72, 72, device=DEVICE) < 0.5
        for options in ({"reduction": "sample", "return_terms": True}, {"normalize": "area"}):
            out = f.masked_reconstruction_loss(fg, bg, target, mask=mask, **scales, **options)
            (out[0] if isinstance(out, tuple) else out).sum().backward(retain_graph=True)
        elements = f.mixture_reconstruction_loss(
            fg, bg, target, mask_logits=fg[:, :1], channels="independent", reduction="none", **scales
        )
        elements.sum().backward()
    mu, logvar = torch.rand(2, 3, 9000, device=DEVICE, requires_grad=True).unbind()
    (f.gaussian_kl(mu, logvar) + f.bernoulli_kl(mu, logvar, reduction="sample").sum()).backward()


def main() -> None:
    context = contextlib.nullcontext()
    if EMULATED:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        import emulation

        kernels = emulation.load()
        context = kernels.running(seed=1)
    with context:
        run()
        if not EMULATED:
            return torch.cuda.synchronize()
    missing = kernels.kernels() - kernels.kernels_run()
    if missing:
        raise SystemExit(f"not launched: {sorted(missing)}")


if __name__ == "__main__":
    main()
