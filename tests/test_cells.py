"""The thesis's synthetic sets against their recipe, and the exact posterior of who knows it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("skimage")

from fgbg_cuda.vae import CellsUnderDisc
from fgbg_cuda.vae.data import cells
from fgbg_cuda.vae.evaluation.oracle import posterior

SIGMAS = 5  # a mean of n draws lies this many standard errors off in 1 of 1.7 million cases


@pytest.fixture(scope="module", params=cells.SETS)
def data(request) -> CellsUnderDisc:
    data = CellsUnderDisc(request.param, seed=1)
    data.setup()
    return data


def standard_error(p: float, count: int) -> float:
    return math.sqrt(p * (1 - p) / count)


def test_the_set_has_the_size_of_the_thesis(data):
    train = data.splits["train"]
    assert train.image.shape == (2000, 1, 60, 60)
    assert train.cells.shape == (2000, 10)
    assert train.discs.shape == (2000, len(cells.SETS[data.hparams.name]))


def test_cells_and_discs_are_active_as_often_as_they_should(data):
    train = data.splits["train"]
    expected = [*[0.5] * 10, *cells.SETS[data.hparams.name]]
    rates = torch.cat([train.cells, train.discs], 1).float().mean(0)
    for rate, p in zip(rates.tolist(), expected, strict=True):
        assert abs(rate - p) < SIGMAS * standard_error(p, 2000)
    # Independently of each other: correlations of n pairs have a standard error of 1 / sqrt(n).
    correlations = torch.corrcoef(torch.cat([train.cells, train.discs], 1).t().double())
    assert (correlations - torch.eye(len(correlations))).abs().max() < SIGMAS / math.sqrt(2000)


def test_noise_mean_and_standard_deviation():
    images = cells.draw("X90,20", 200, seed=3, split="val")
    noise = images.noisy - cells.foreground_signal(images.cells) - cells.background_signal(images.discs)
    assert abs(noise.mean() - 0.3) < SIGMAS * 0.4 / math.sqrt(noise.size)
    assert abs(noise.std() - 0.4) < SIGMAS * 0.4 / math.sqrt(2 * noise.size)
    # No structure is left in it: the mean of every pixel is that of noise.
    assert np.abs(noise.mean(0) - 0.3).max() < 6 * 0.4 / math.sqrt(200)


def test_cells_are_ten_squares_apart_from_each_other():
    masks = cells.cell_masks()
    assert masks.shape == (10, 60, 60)
    assert (masks.sum((1, 2)) == 36).all()
    assert masks.sum(0).max() == 1
    for mask in masks:
        rows, columns = np.nonzero(mask)
        assert np.ptp(rows) == np.ptp(columns) == 5


def test_discs_are_round_and_thirty_across():
    for disc, (y, x) in zip(cells.disc_masks(), cells.DISC_CENTRES, strict=True):
        rows, columns = np.nonzero(disc)
        assert np.ptp(rows) == np.ptp(columns) == 29
        assert (rows.mean() + 0.5, columns.mean() + 0.5) == pytest.approx((y, x))
        # Its area is that of a circle, but for the pixels that the circle cuts: about one for each of pi d.
        assert abs(disc.sum() - math.pi * 15**2) < math.pi * 30 / 4
    bottom_left, top_right = cells.disc_masks()
    assert bottom_left[45, 15]
    assert top_right[15, 45]
    assert not (bottom_left & top_right).any()


def test_three_cells_lie_under_one_disc_two_under_the_other_and_none_halfway():
    for cell, under in zip(cells.cell_masks(), cells.CELLS_UNDER_DISC, strict=True):
        overlap = [(cell & disc).sum() for disc in cells.disc_masks()]
        assert overlap == [36 * (under == 0), 36 * (under == 1)]
    assert [cells.CELLS_UNDER_DISC.count(i) for i in (0, 1, cells.NO_DISC)] == [3, 2, 5]


def test_a_cell_is_covered_where_its_disc_is_active():
    covered = cells.covered_cells(np.array([[True, False], [False, True], [False, False]]))
    assert covered.tolist() == [
        [True] * 3 + [False] * 7,
        [False] * 3 + [True] * 2 + [False] * 5,
        [False] * 10,
    ]
    # In a set with one disc, nothing covers the cells at the top right.
    assert cells.covered_cells(np.array([[True]])).tolist() == [[True] * 3 + [False] * 7]


def test_signals_add():
    on, off = np.ones((1, 10), bool), np.zeros((1, 2), bool)
    both = cells.foreground_signal(on) + cells.background_signal(~off)
    assert sorted(np.unique(both).round(6)) == [0, 0.6, 0.9, 1.5]
    alone = cells.foreground_signal(on) + cells.background_signal(off)
    np.testing.assert_allclose(both - alone, cells.background_signal(~off), atol=1e-12)


def test_images_are_scaled_by_the_set_and_cut_in_the_middle(data):
    h = data.hparams
    train = cells.draw(h.name, 2000, seed=h.seed, split="train")
    low, high = train.noisy.min(), train.noisy.max()
    for split, count in (("train", 2000), ("test", 1000)):
        noisy = cells.draw(h.name, count, seed=h.seed, split=split).noisy
        image = data.splits[split].image[:, 0].numpy()
        scaled = (noisy - low) / (high - low)
        clear = np.abs(scaled - 0.5) > 1e-9  # not decided by rounding
        np.testing.assert_array_equal(image[clear], (scaled > 0.5)[clear])
    assert set(data.splits["train"].image.unique().tolist()) == {0.0, 1.0}


def test_noise_free_layers_are_the_means_of_the_images(data):
    """Where only one layer is active, the mean over images is that layer."""
    b = data.splits["train"]
    no_cells = ~b.mask
    for active in (False, True):
        chosen = no_cells & (b.background > b.background.min()) == (active & no_cells)
        chosen &= no_cells
        p = b.background[chosen].double().mean().item()
        assert abs(b.image[chosen].double().mean().item() - p) < SIGMAS * standard_error(p, int(chosen.sum()))
    lone = b.mask & (b.background == b.background.min())
    p = b.foreground[lone].double().mean().item()
    assert abs(b.image[lone].double().mean().item() - p) < SIGMAS * standard_error(p, int(lone.sum()))
    assert torch.equal(b.mask, b.foreground > b.foreground.min())


def test_same_seed_same_bits_other_seed_other_images():
    def make(seed):
        data = CellsUnderDisc("X50", seed, train=20, val=5, test=5)
        data.setup()
        return [t for split in data.splits.values() for t in split]

    assert all(torch.equal(a, b) for a, b in zip(make(0), make(0), strict=True))
    assert not torch.equal(make(0)[0], make(1)[0])


def test_splits_share_no_image(data):
    noisy = [cells.draw(data.hparams.name, 20, seed=1, split=s).noisy for s in ("train", "val", "test")]
    for a, b in itertools.combinations(noisy, 2):
        assert np.abs(a[:, None] - b[None]).min((2, 3)).max() > 0
    packed = np.packbits(torch.cat([s.image for s in data.splits.values()]).flatten(1).bool().numpy(), axis=1)
    assert len(np.unique(packed, axis=0)) == len(packed) == 3500


def test_a_split_does_not_depend_on_the_size_of_another():
    few, many = (CellsUnderDisc("X90", 0, train=30, val=v, test=5) for v in (3, 9))
    few.setup()
    many.setup()
    assert torch.equal(few.splits["test"].image, many.splits["test"].image)
    assert torch.equal(few.splits["train"].image, many.splits["train"].image)


def test_training_batches_are_shuffled_and_hold_their_truth():
    data = CellsUnderDisc("X50", train=40, val=5, test=5, batch_size=10)
    data.setup()
    batches = list(data.train_dataloader())
    assert [type(b) for b in batches] == [cells.CellsBatch] * 4
    train = data.splits["train"]
    seen = set()
    for batch in batches:
        for image, active in zip(batch.image, batch.cells, strict=True):
            (i,) = (train.image == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert torch.equal(train.cells[i], active)
            seen.add(i)
    assert seen == set(range(40))
    assert torch.equal(torch.cat([b.image for b in data.test_dataloader()]), data.splits["test"].image)


def test_unknown_set_says_what_there_is():
    with pytest.raises(ValueError, match="name: got 'X10', takes one of X90, X50, X90,20"):
        CellsUnderDisc("X10", train=1).setup()


# ---- exact inference ----


def test_exact_posterior_against_the_sum_over_all_states():
    """The 2^10 x 2^2 states of cells and discs, each with its full likelihood."""
    name, threshold = "X90,20", 0.9
    images = cells.draw(name, 3, seed=0, split="val")
    image = torch.from_numpy(images.noisy[:, None] > threshold).float()
    states = np.array(list(itertools.product((False, True), repeat=12)))
    log_joint = []
    for part in np.array_split(states, 16):
        signal = cells.foreground_signal(part[:, :10]) + cells.background_signal(part[:, 10:])
        p = cells.pixel_probability(torch.from_numpy(signal), threshold)
        x = image[:, 0].double()
        nats = torch.einsum("byx,syx->bs", x, p.log()) + torch.einsum("byx,syx->bs", 1 - x, (-p).log1p())
        prior = np.where(part[:, 10:], cells.SETS[name], 1 - np.array(cells.SETS[name]))
        log_joint.append(nats + torch.from_numpy(np.log(prior)).sum(1) - 10 * math.log(2))
    log_joint = torch.cat(log_joint, 1)
    expected = log_joint.softmax(1) @ torch.from_numpy(states).double()
    found = posterior(image, name, threshold)
    torch.testing.assert_close(found.cells, expected[:, :10])
    torch.testing.assert_close(found.discs, expected[:, 10:])
    torch.testing.assert_close(found.log_evidence, log_joint.logsumexp(1))


def test_exact_posterior_is_calibrated(data):
    """Of the cells given a probability, that fraction is active: here on average, over all of them."""
    test = data.splits["test"]
    found = posterior(test.image, data.hparams.name, data.threshold)
    error = (found.cells - test.cells.double()).mean().abs()
    spread = (found.cells * (1 - found.cells)).sum().sqrt() / found.cells.numel()
    assert error <= SIGMAS * spread + 1e-12
