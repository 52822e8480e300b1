"""Scores against the truth, one number per image; what thresholding would score; how latents are used."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from skimage.filters import threshold_otsu
from skimage.measure import label
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import fgbg_cuda

from ..models.layered import Latent, Separation


def _overlap(mask: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, truth = mask.flatten(1) > 0.5, truth.flatten(1) > 0.5
    return (mask & truth).sum(1).double(), mask.sum(1).double(), truth.sum(1).double()


def mask_iou(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks [B, ...], each cut at 0.5: [B]. Two empty masks agree: 1."""
    both, a, b = _overlap(mask, truth)
    union = a + b - both
    return torch.where(union > 0, both / union.clamp(min=1), 1.0).float()


def mask_dice(mask: Tensor, truth: Tensor) -> Tensor:
    """Dice coefficient of masks [B, ...], each cut at 0.5: [B]. Two empty masks agree: 1."""
    both, a, b = _overlap(mask, truth)
    return torch.where(a + b > 0, 2 * both / (a + b).clamp(min=1), 1.0).float()


def ari_fg(mask: Tensor, truth: Tensor) -> Tensor:
    """Adjusted Rand index of objects, over the pixels of the true foreground: [B].

    The objects are the connected components (by edges) of masks [B, 1, H, W] cut at 0.5; foreground pixels
    that the mask misses make one more. (Hubert & Arabie, "Comparing partitions", 1985; on the foreground
    alone as in Greff et al., "IODINE", 2019.) Without true foreground there is nothing to tell apart: 1.
    """

    def score(mask: np.ndarray, truth: np.ndarray) -> float:
        return adjusted_rand_score(label(truth, connectivity=1)[truth], label(mask, connectivity=1)[truth])

    pairs = zip((mask[:, 0] > 0.5).numpy(), (truth[:, 0] > 0.5).numpy(), strict=True)
    return torch.tensor([score(*pair) if pair[1].any() else 1.0 for pair in pairs])


def foreground_mse(foreground: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error where the true mask [B, 1, H, W] is set (nowhere else is it defined): [B].

    ``truth`` is the noise-free foreground, [B, C, H, W] or what broadcasts to it.
    """
    mask = (mask > 0.5).expand_as(foreground)
    error = (foreground - truth).square() * mask
    return error.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def background_mse(background: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over the whole image, the hidden part included: [B]."""
    return (background - truth).square().flatten(1).mean(1)


def truth_scores(found: Separation, batch: Any) -> dict[str, Tensor]:
    """The scores that the truth in ``batch`` allows, each [B]: from its fields ``mask`` [B, 1, H, W],
    ``foreground`` (what shows through the mask) and ``background``, those it has."""
    mask, foreground, background = (
        getattr(batch, name, None) for name in ("mask", "foreground", "background")
    )
    scores = {}
    if mask is not None:
        scores |= {"iou": mask_iou(found.mask, mask), "dice": mask_dice(found.mask, mask)}
    if mask is not None and foreground is not None:
        scores["fg_mse"] = foreground_mse(found.foreground, foreground, mask)
    if background is not None:
        scores["bg_mse"] = background_mse(found.background, background)
    return scores


def warn_of_mask(share: Tensor | float | None, where: str) -> None:
    """Warns if the masks cover so little or so much of ``where``, on average, that nothing was separated."""
    if share is not None and not 0.001 <= share <= 0.9:
        warnings.warn(
            f"the masks cover {float(share):.2%} of {where}: if more, or less, is in front, try another "
            "--config or seed_everything (objects: also a bg_cell or a crop of another size, another "
            "fg_scale; calcium: another cell)",
            stacklevel=2,
        )


def threshold_scores(image: Tensor, truth: Tensor, levels: int = 99) -> dict[str, float]:
    """Mean mask IoU of thresholding gray images [B, 1, H, W], each the better of both polarities.

    - ``otsu``: Otsu's threshold of each image;
    - ``oracle_global``: one threshold for all images, the best for these very truths;
    - ``oracle_per_image``: the best threshold and polarity of each image for its own truth.
    """
    otsu = torch.tensor([threshold_otsu(i.numpy()) for i in image[:, 0]]).view(-1, 1, 1, 1)
    per_level = torch.stack(
        [
            torch.stack([mask_iou(image > level, truth), mask_iou(image <= level, truth)])
            for level in np.linspace(0, 1, levels + 2)[1:-1]
        ]
    )  # [levels, polarity, B]
    return {
        "otsu": max(mask_iou(m, truth).mean().item() for m in (image > otsu, image <= otsu)),
        "oracle_global": per_level.mean(-1).max().item(),
        "oracle_per_image": per_level.flatten(0, 1).amax(0).mean().item(),
    }


def active_units(mu: Tensor, least: float = 0.01) -> int:
    """How many latent dimensions the encoder uses: those whose posterior mean [B, ...] varies over images.

    Var_x(E[z | x]) > ``least`` (Burda et al., "Importance Weighted Autoencoders", 2016, section 2.4).
    """
    return int((mu.flatten(1).var(0) > least).sum())


def importance_weighted_bound(module: Any, x: Tensor, samples: int) -> Tensor:
    """The bound on log p(x) of images [B, C, H, W] from ``samples`` draws of the latents, in nats: [B].

    ``module`` is a :class:`~fgbg_cuda.vae.training.modules.SeparationModule`; see
    :func:`fgbg_cuda.importance_weighted_bound`. One sample has the ELBO as its expectation.
    """
    log_p, log_q = [], []
    for _ in range(samples):
        out = module.model(x)
        prior, posterior = (
            sum(term(latent) for latent in (*out.z_fg, *out.z_bg)) for term in (_log_prior, _log_posterior)
        )
        # What the ELBO says of x itself: it has the KL of the latents taken off, which is not wanted here.
        log_p.append(module.elbo(out, x) + out.kl_fg + out.kl_bg + prior)
        log_q.append(posterior)
    return fgbg_cuda.importance_weighted_bound(torch.stack(log_p), torch.stack(log_q))


# Without the constants -log(2 pi) / 2, which are the same in both.
def _log_prior(latent: Latent) -> Tensor:
    return -0.5 * latent.z.square().flatten(1).sum(1)


def _log_posterior(latent: Latent) -> Tensor:
    z, mu, logvar = latent
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar).flatten(1).sum(1)
