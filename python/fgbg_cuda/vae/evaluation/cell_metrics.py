"""How well a model of the cells separates them: which are active, and what its latents give away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch import Tensor

from ..data.cells import CellsBatch, CellsUnderDisc, cell_masks, disc_masks
from ..models.layered import Latent, Separation
from ..training.modules import SeparationModule
from .metrics import active_units, ari_fg, background_mse, importance_weighted_bound, mask_dice, mask_iou

CHUNK = 250  # images decoded at a time
BOUND_IMAGES, BOUND_SAMPLES = 200, 50


def cell_means(foreground: Tensor) -> Tensor:
    """The mean over each cell's 6x6 window of foregrounds [B, 1, 60, 60]: [B, 10]."""
    windows = torch.from_numpy(cell_masks()).flatten(1).to(foreground)
    return foreground.flatten(1) @ windows.t() / windows.sum(1)


def activity_threshold(means: Tensor) -> float:
    """The mean from which on a cell counts as active, from all cells' means [B, 10].

    Midway between the centres of two clusters (k-means). It needs no truth: one number for a model and a set,
    from the foregrounds of the training images. (Otsu's threshold parts the same clusters, but where there is
    a gap between them it may lie at its edge.)
    """
    clusters = KMeans(2, n_init=10, random_state=0).fit(means.flatten()[:, None].numpy())
    return float(clusters.cluster_centers_.mean())


def cell_f1(found: Tensor, truth: Tensor, covered: Tensor) -> dict[str, float]:
    """F1 of the cells' activities, bool [B, 10]: ``f1_open``, and ``f1_covered`` by an active disc behind."""
    return {
        "f1_open": float(f1_score(truth[~covered], found[~covered])),
        "f1_covered": float(f1_score(truth[covered], found[covered])),
    }


def covered_precision(means: Tensor, truth: Tensor, covered: Tensor) -> float:
    """Average precision of the covered cells' activities [B, 10], ranked by their windows' means.

    1: every active cell under a disc is brighter than every inactive one, so that some threshold tells them
    apart; 0.5, the share of active cells: their brightness says nothing. Unlike F1 it does not ask whether
    the same threshold serves cells in the open.
    """
    return float(average_precision_score(truth[covered], means[covered]))


def discs_drawn(foreground: Tensor, truth: CellsBatch) -> float:
    """How much of the discs a foreground [B, 1, 60, 60] draws: 0 nothing, 1 all. Averaged over the discs.

    By how much an active disc makes its pixels brighter, those of the cells left out, relative to by how
    much it does so in the true background.
    """
    shares = []
    for disc, pixels in zip(truth.discs.t(), disc_masks(truth.discs.shape[1]), strict=True):
        pixels = torch.from_numpy(pixels & ~cell_masks().any(0))
        drawn, true = (
            image[disc][:, 0, pixels].mean() - image[~disc][:, 0, pixels].mean()
            for image in (foreground, truth.background)
        )
        shares.append(drawn / true)
    return float(torch.stack(shares).mean())


def probe_r2(train_latents: Tensor, train_targets: Tensor, latents: Tensor, targets: Tensor) -> float:
    """R^2 on held-out images of a linear probe from latents [B, D] to activities [B, T], averaged over T.

    Ordinary least squares fitted on the training images. 1: the latents tell; 0: they tell no more than
    the mean does; below: nor that, the probe having fitted noise.
    """
    probe = LinearRegression().fit(train_latents.double().numpy(), train_targets.double().numpy())
    return float(r2_score(targets.double().numpy(), probe.predict(latents.double().numpy())))


class Encoded(NamedTuple):
    """A split as a model sees it."""

    found: Separation
    z_fg: Latent  # all the foreground's latents of an image in one row: [B, D]
    z_bg: Latent
    terms: dict[str, Tensor]  # elbo, reconstruction, kl_fg, kl_bg: [B] each, nats


@torch.no_grad()
def encode(module: SeparationModule, image: Tensor) -> Encoded:
    """Separate and score images [B, 1, 60, 60], a few at a time."""
    parts = []
    for x in image.split(CHUNK):
        out = module.model(x)
        terms = {"elbo": module.elbo(out, x), "kl_fg": out.kl_fg, "kl_bg": out.kl_bg}
        parts.append((module.separate(x), _row(out.z_fg), _row(out.z_bg), terms))
    found, z_fg, z_bg, terms = zip(*parts, strict=True)
    terms = {name: torch.cat([t[name] for t in terms]) for name in terms[0]}
    terms["reconstruction"] = -(terms["elbo"] + terms["kl_fg"] + terms["kl_bg"])
    return Encoded(
        Separation(*map(torch.cat, zip(*found, strict=True))),
        Latent(*map(torch.cat, zip(*z_fg, strict=True))),
        Latent(*map(torch.cat, zip(*z_bg, strict=True))),
        terms,
    )


def _row(latents: tuple[Latent, ...]) -> Latent:
    return Latent(*(torch.cat([t.flatten(1) for t in parts], 1) for parts in zip(*latents, strict=True)))


def evaluate(module: SeparationModule, data: CellsUnderDisc, split: str = "test") -> dict[str, float]:
    """Every score of a trained model on one split of its set. Thresholds and probes are fitted on "train".

    - ``f1_open``, ``f1_covered``: see :func:`cell_f1`; a cell is active where its window's mean in the
      foreground is above :func:`activity_threshold`. ``ap_covered``: see :func:`covered_precision`.
    - ``fg_discs``: see :func:`discs_drawn`.
    - ``leakage``: :func:`probe_r2` from the posterior means of z_fg to the activities of the discs;
      ``bg_leakage``: from those of z_bg to the activities of the cells; ``bg_discs`` and ``fg_cells``: to
      those of the layer's own objects, where 1 is best.
    - ``fg_mse``, ``bg_mse``: mean squared error of the layers against what the true layer alone would
      show, the noise averaged out: a probability of x = 1, as the models' layers are.
    - ``iou``, ``dice``, ``ari_fg``: of the mask.
    - ``elbo``, ``reconstruction``, ``kl_fg``, ``kl_bg``: nats per image; ``bound_gain``: how far the
      importance-weighted bound with 50 samples lies above the ELBO, on the first 200 images.
    - ``active_fg``, ``active_bg``: numbers of active latent units.
    """
    module.eval()
    train, held_out = data.splits["train"], data.splits[split]
    before, after = encode(module, train.image), encode(module, held_out.image)
    threshold = activity_threshold(cell_means(before.found.foreground))
    means = cell_means(after.found.foreground)

    with torch.no_grad():
        bound = importance_weighted_bound(module, held_out.image[:BOUND_IMAGES], BOUND_SAMPLES)
    gain = bound - after.terms["elbo"][:BOUND_IMAGES]
    per_image = {
        "fg_mse": background_mse(after.found.foreground, held_out.foreground),
        "bg_mse": background_mse(after.found.background, held_out.background),
        "iou": mask_iou(after.found.mask, held_out.mask),
        "dice": mask_dice(after.found.mask, held_out.mask),
        "ari_fg": ari_fg(after.found.mask, held_out.mask),
        **after.terms,
        "bound_gain": gain,
    }
    return {
        **cell_f1(means > threshold, held_out.cells, held_out.covered),
        "ap_covered": covered_precision(means, held_out.cells, held_out.covered),
        "fg_discs": discs_drawn(after.found.foreground, held_out),
        **probes(before, train, after, held_out),
        **{name: float(value.double().mean()) for name, value in per_image.items()},
        "active_fg": active_units(after.z_fg.mu),
        "active_bg": active_units(after.z_bg.mu),
    }


def probes(before: Encoded, train: CellsBatch, after: Encoded, held_out: CellsBatch) -> dict[str, float]:
    """The R^2 of every probe, fitted on one encoded split and scored on another; see :func:`evaluate`."""
    return {
        "leakage": probe_r2(before.z_fg.mu, train.discs, after.z_fg.mu, held_out.discs),
        "bg_leakage": probe_r2(before.z_bg.mu, train.cells, after.z_bg.mu, held_out.cells),
        "bg_discs": probe_r2(before.z_bg.mu, train.discs, after.z_bg.mu, held_out.discs),
        "fg_cells": probe_r2(before.z_fg.mu, train.cells, after.z_fg.mu, held_out.cells),
    }
