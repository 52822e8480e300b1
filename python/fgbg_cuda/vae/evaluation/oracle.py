"""The best possible decoder of the cells: exact inference by one that knows how the images were made."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import cells as recipe


class Posterior(NamedTuple):
    """What an image says about its cells and discs, and how likely it is, given the whole recipe."""

    cells: Tensor  # [B, 10] probability that the cell is active
    discs: Tensor  # [B, discs] probability that the disc is active
    log_evidence: Tensor  # [B] log p(x) in nats: no model's ELBO is higher on average


def posterior(image: Tensor, name: str, threshold: float) -> Posterior:
    """Exact posterior of binarised images [B, 1, 60, 60] of set ``name``, cut at ``threshold``.

    Given which discs are active, the pixels of a cell depend on that cell alone; the at most four states of
    the discs are summed over:

    P(c_k | x) = sum_d P(d | x) P(c_k | x, d), where
    P(d | x) ~ P(d) p(x outside the cells | d) prod_k sum_c P(c) p(x_k | c, d).
    """
    x = image.flatten(1).double()  # [B, 3600]
    footprints = torch.from_numpy(recipe.cell_masks()).flatten(1).double()
    prior = torch.tensor(recipe.CELL_PROBABILITY, dtype=torch.float64)
    states = list(itertools.product((0, 1), repeat=len(recipe.SETS[name])))
    log_joint, cells = [], []  # per state of the discs: log p(x, d) [B], P(cells | x, d) [B, 10]
    for state in states:
        behind = torch.from_numpy(recipe.background_signal(np.array([state]))).flatten()
        off = recipe.pixel_probability(behind, threshold)
        on = recipe.pixel_probability(behind + recipe.CELL_VALUE, threshold)
        empty = x @ off.log() + (1 - x) @ (-off).log1p()
        ratio = x * (on / off).log() + (1 - x) * ((1 - on) / (1 - off)).log()
        log_odds = ratio @ footprints.t() + torch.logit(prior)
        discs = torch.tensor(recipe.SETS[name], dtype=torch.float64)
        log_prior = torch.where(torch.tensor(state) == 1, discs, 1 - discs).log().sum()
        log_cells = ((1 - prior).log() + torch.nn.functional.softplus(log_odds)).sum(1)
        log_joint.append(log_prior + empty + log_cells)
        cells.append(log_odds.sigmoid())
    log_joint = torch.stack(log_joint)  # [states, B]
    weights = log_joint.softmax(0)
    return Posterior(
        cells=(weights[:, :, None] * torch.stack(cells)).sum(0),
        discs=weights.t() @ torch.tensor(states, dtype=torch.float64),
        log_evidence=log_joint.logsumexp(0),
    )
