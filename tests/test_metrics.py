"""Metrics by hand and against other people's code; see test_vae.py for those of masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

pytest.importorskip("lightning")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from sklearn.metrics import jaccard_score, rand_score

from fgbg_cuda.vae import (
    LayeredVAEModule,
    Networks,
    ObjectNetworks,
    Separation,
    SeparationModule,
)
from fgbg_cuda.vae.data import cells
from fgbg_cuda.vae.evaluation import cell_metrics, metrics
from fgbg_cuda.vae.evaluation.oracle import posterior


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# ---- masks ----


def test_overlap_against_scikit_learn():
    mask, truth = torch.rand(5, 1, 9, 9), torch.rand(5, 1, 9, 9) > 0.4
    expected = [jaccard_score(t.flatten(), m.flatten() > 0.5) for m, t in zip(mask, truth, strict=True)]
    iou = metrics.mask_iou(mask, truth)
    torch.testing.assert_close(iou, torch.tensor(expected).float())
    torch.testing.assert_close(metrics.mask_dice(mask, truth), 2 * iou / (1 + iou))


def test_ari_by_hand():
    truth = torch.zeros(1, 1, 2, 5)
    truth[..., :2] = truth[..., 3:] = 1  # two objects of four pixels
    joined = torch.ones_like(truth)  # one component: no better than chance
    missed = truth.clone()
    missed[..., :2] = 0  # one of the two, all of it: what is missed is a part of its own
    perfect = metrics.ari_fg(truth, truth)
    assert perfect.tolist() == [1.0]
    assert metrics.ari_fg(joined, truth).tolist() == [0.0]
    assert metrics.ari_fg(missed, truth).tolist() == [1.0]
    assert metrics.ari_fg(truth, torch.zeros_like(truth)).tolist() == [1.0]
    half = truth.clone()
    half[..., 0, :2] = 0  # of one object, the upper half is missed
    # Parts of sizes 2, 2, 4 against 4, 4. Pairs together in both: 1 + 1 + 6 = 8; in the truth: 12; found: 8;
    # of 28. ARI = (8 - 12 * 8 / 28) / ((12 + 8) / 2 - 12 * 8 / 28).
    expected = (8 - 96 / 28) / (10 - 96 / 28)
    assert metrics.ari_fg(half, truth).item() == pytest.approx(expected)


def test_ari_leaves_the_background_out():
    truth = torch.zeros(1, 1, 6, 6)
    truth[..., :2, :2] = truth[..., 4:, 4:] = 1
    mask = truth.clone()
    mask[..., 4:, 0] = 1  # a false alarm elsewhere
    assert metrics.ari_fg(mask, truth).item() == 1
    assert rand_score(mask.flatten(), truth.flatten()) < 1


def test_truth_scores_are_those_that_the_truth_allows():
    x = torch.rand(3, 1, 4, 4)
    found = Separation(x, x, x, x)
    assert metrics.truth_scores(found, x) == {}

    class OnlyMask(tuple):
        mask = x > 0.5

    assert {name: v.tolist() for name, v in metrics.truth_scores(found, OnlyMask()).items()} == {
        "iou": [1.0] * 3,
        "dice": [1.0] * 3,
    }


# ---- latents ----


def test_active_units_by_hand():
    mu = torch.tensor([[0.0, 0.0, 5.0], [0.0, 1.0, 5.1], [0.0, 2.0, 5.2]])
    # variances 0, 1 and 0.01: not above the threshold of 0.01, but above 0.009
    assert metrics.active_units(mu.double(), least=0.0101) == 1
    assert metrics.active_units(mu.double(), least=0.009) == 2


def test_importance_weights_against_torch_distributions():
    module = LayeredVAEModule(networks=ObjectNetworks(width=8, fg_latents=4))
    x = torch.rand(2, 1, 32, 32)
    outputs = []
    forward = module.model.forward
    module.model.forward = lambda x: outputs.append(forward(x)) or outputs[-1]
    with torch.no_grad():
        bound = metrics.importance_weighted_bound(module, x, samples=5)
    weights = []
    for out in outputs:
        latents = (*out.z_fg, *out.z_bg)
        log_p = sum(Normal(0, 1).log_prob(t.z).flatten(1).sum(1) for t in latents)
        log_q = sum(Normal(t.mu, (t.logvar / 2).exp()).log_prob(t.z).flatten(1).sum(1) for t in latents)
        weights.append(log_p - log_q - module.model.reconstruction(out, x))
    expected = torch.stack(weights).double().logsumexp(0) - math.log(5)
    # Sums of thousands of float32 terms, some hundreds of nats in size.
    torch.testing.assert_close(bound.double(), expected, rtol=1e-5, atol=1e-2)


def test_more_samples_tighten_the_bound_up_to_the_truth():
    """In a model whose log p(x) is known: z does not reach the decoders, so log p(x) = log p(x | z)."""

    class Blind(torch.nn.Module):
        def forward(self, z):
            return z[:, :1, :1, :1].expand(-1, 1, 16, 16) * 0

    class Encoder(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4, None, None], torch.full((len(x), 4, 1, 1), -0.3)

    class Foreground(torch.nn.Module):
        def forward(self, x):
            return (Encoder()(x),)

    class Layers(torch.nn.Module):
        def forward(self, z):
            return Blind()(z), Blind()(z)

    class Given(Networks):
        size_multiple = 1

        def build(self, shape, likelihood):
            return Foreground(), Layers(), Encoder(), Blind()

    module = LayeredVAEModule(networks=Given())
    model = module.model
    x = torch.rand(64, 1, 16, 16)
    with torch.no_grad():
        out = model(x)
        truth = -model.reconstruction(out, x).mean()
        elbo = module.elbo(out, x).mean()
        few, many = (metrics.importance_weighted_bound(module, x, k).mean() for k in (2, 500))
    assert elbo < few < many
    assert (truth - many) < 0.1 * (truth - elbo)


# ---- cells ----


def test_cell_means_are_the_means_of_the_windows():
    foreground = torch.rand(2, 1, 60, 60)
    means = cell_metrics.cell_means(foreground)
    for k, (y, x) in enumerate(cells.CELL_CORNERS):
        torch.testing.assert_close(means[:, k], foreground[:, 0, y : y + 6, x : x + 6].mean((1, 2)))


def test_threshold_parts_two_groups():
    means = torch.tensor([[0.1, 0.12, 0.7], [0.8, 0.11, 0.75]])
    assert cell_metrics.activity_threshold(means) == pytest.approx((0.11 + 0.75) / 2)


def test_threshold_lies_in_the_middle_of_a_gap():
    """Where Otsu's own lies at its edge, so that inactive cells of other images are above it."""
    off, on = 0.07 + 0.005 * torch.randn(5000).clamp(-2, 2), 0.78 + 0.02 * torch.randn(5000).clamp(-2, 2)
    assert cell_metrics.activity_threshold(torch.cat([off, on])) == pytest.approx(0.425, abs=0.01)


def test_f1_by_hand():
    truth = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    found = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 1]]).bool()
    covered = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0]]).bool()
    # Open: 2 found rightly, 1 missed, 1 false: 2*2 / (2*2 + 1 + 1). Covered: 1, 0, 1: 2 / (2 + 1).
    scores = cell_metrics.cell_f1(found, truth, covered)
    assert scores == {"f1_open": pytest.approx(4 / 6), "f1_covered": pytest.approx(2 / 3)}


def test_covered_precision_by_hand():
    means = torch.tensor([[0.9, 0.6], [0.7, 0.8], [0.1, 0.2]])
    truth = torch.tensor([[1, 0], [1, 0], [0, 1]]).bool()
    covered = torch.tensor([[1, 1], [1, 1], [0, 0]]).bool()  # by brightness: active, not, active, not
    precision = cell_metrics.covered_precision(means, truth, covered)
    assert precision == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert cell_metrics.covered_precision(truth.float(), truth, covered) == 1


@pytest.mark.parametrize("name", ["X90", "X90,20"])
def test_discs_drawn_are_told_whatever_the_cells_do(name):
    data = cells.CellsUnderDisc(name, train=1, val=1, test=60)
    data.setup()
    truth = data.splits["test"]
    for share in (0.0, 0.3, 1.0):
        foreground = 0.5 * truth.foreground + share * truth.background
        assert cell_metrics.discs_drawn(foreground, truth) == pytest.approx(share, abs=1e-5)


def test_probe_finds_what_is_linear_and_nothing_else():
    z = torch.randn(4000, 3)
    told = torch.stack([z[:, 0] + 2, 3 * z[:, 1] - z[:, 2]], 1)
    assert cell_metrics.probe_r2(z[:2000], told[:2000], z[2000:], told[2000:]) == pytest.approx(1)
    noisy = told[:, :1] + torch.randn(4000, 1)  # half signal, half noise
    r2 = cell_metrics.probe_r2(z[:2000], noisy[:2000], z[2000:], noisy[2000:])
    design, y = np.c_[z.numpy(), np.ones(4000)], noisy.numpy()
    residual = y[2000:] - design[2000:] @ np.linalg.lstsq(design[:2000], y[:2000], rcond=None)[0]
    assert r2 == pytest.approx(1 - (residual**2).mean() / y[2000:].var(), abs=1e-5)
    assert r2 == pytest.approx(0.5, abs=0.1)
    even = z[:, :1].square()  # no linear function of z
    assert cell_metrics.probe_r2(z[:2000], even[:2000], z[2000:], even[2000:]) < 0.02


def test_evaluate_gives_a_perfect_model_perfect_scores(monkeypatch):
    """A stand-in whose foreground, background and latents are the truth, found by exact inference."""
    monkeypatch.setattr(cell_metrics, "BOUND_IMAGES", 5)
    monkeypatch.setattr(cell_metrics, "BOUND_SAMPLES", 2)
    data = cells.CellsUnderDisc("X90,20", train=150, val=5, test=100)
    data.setup()

    class Oracle(torch.nn.Module):
        def forward(self, x, sample=True):
            exact = posterior(x, "X90,20", data.threshold)
            z_fg, z_bg = (
                metrics.Latent(mu, mu, torch.full_like(mu, -20.0)) for mu in (exact.cells, exact.discs)
            )
            zero = torch.zeros(len(x), dtype=torch.float64)
            return type("Out", (), {"z_fg": (z_fg,), "z_bg": (z_bg,), "kl_fg": zero, "kl_bg": zero})

        def separate(self, x):
            out = self(x)
            signal = np.tensordot(out.z_fg[0].mu.numpy() > 0.5, cells.cell_masks(), 1)[:, None]
            behind = cells.background_signal(out.z_bg[0].mu.numpy() > 0.5)[:, None]
            layers = [
                cells.pixel_probability(torch.from_numpy(s), data.threshold)
                for s in (cells.CELL_VALUE * signal, behind)
            ]
            return Separation(*layers, torch.from_numpy(signal), layers[0])

    class Module(SeparationModule):
        def elbo(self, out, x):
            return posterior(x, "X90,20", data.threshold).log_evidence

    scores = cell_metrics.evaluate(Module(Oracle()), data)
    assert scores["f1_open"] > 0.999
    assert scores["f1_covered"] > 0.99
    assert scores["ap_covered"] > 0.99
    assert abs(scores["fg_discs"]) < 1e-6
    assert scores["fg_cells"] > 0.98
    assert scores["bg_discs"] > 0.99
    assert abs(scores["leakage"]) < 0.3  # ten weights, fitted on 150 images
    assert scores["iou"] > 0.99
    assert scores["fg_mse"] < 1e-3
    assert scores["bg_mse"] < 1e-3
    assert (scores["active_fg"], scores["active_bg"]) == (10, 2)
