"""What the functions mean: identities between them, and against torch's own distributions."""

import math

import pytest
import torch
from compare import assert_close, assert_same
from torch import distributions

import fgbg_cuda
from fgbg_cuda import reference

REDUCTIONS = ("none", "sample", "batchmean", "sum", "mean")
BY_REGION = [
    fgbg_cuda.masked_reconstruction_loss,
    fgbg_cuda.blended_reconstruction_loss,
]


def _images(device, shape=(3, 2, 5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, *shape, generator=generator, dtype=torch.float64).to(device)


# --- torch's own distributions --------------------------------------------------------------------

DISTRIBUTIONS = {
    "gaussian": lambda x: distributions.Normal(x, 0.6),
    "laplace": lambda x: distributions.Laplace(x, 0.6),
    "bernoulli": lambda x: distributions.Bernoulli(logits=x, validate_args=False),
    "continuous_bernoulli": lambda x: distributions.ContinuousBernoulli(logits=x),
}


@pytest.mark.parametrize("likelihood", DISTRIBUTIONS)
def test_likelihood_is_the_density(likelihood, device):
    x, target, bg, _ = _images(device)
    x = 3 * x - 1
    scales = {"fg_scale": 0.6} if likelihood in reference.SCALED_LIKELIHOODS else {}
    loss = fgbg_cuda.masked_reconstruction_loss(
        x, bg, target, mask=torch.ones_like(x), likelihood=likelihood, reduction="none", **scales
    )
    expected = -DISTRIBUTIONS[likelihood](x).log_prob(target)
    # torch expands the continuous Bernoulli's normaliser near 0 to fourth order only.
    atol = 1e-6 if likelihood == "continuous_bernoulli" else 1e-12
    torch.testing.assert_close(loss, expected, rtol=0, atol=atol)


def test_errors_are_what_most_papers_call_mse_and_l1(device):
    x, target, _, _ = _images(device)
    ones = torch.ones_like(x)
    for likelihood, function in (
        ("squared_error", torch.nn.functional.mse_loss),
        ("absolute_error", torch.nn.functional.l1_loss),
    ):
        for reduction in ("mean", "sum", "none"):
            loss = fgbg_cuda.masked_reconstruction_loss(
                x, None, target, mask=ones, likelihood=likelihood, reduction=reduction
            )
            assert_close(loss, function(x, target, reduction=reduction))


def test_gaussian_kl_is_the_divergence(device):
    mu, logvar, prior_mu, prior_logvar = _images(device)
    q = distributions.Normal(mu, torch.exp(logvar / 2))
    p = distributions.Normal(prior_mu, torch.exp(prior_logvar / 2))
    standard = distributions.Normal(torch.zeros_like(mu), 1.0)
    kl = fgbg_cuda.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction="none")
    assert_close(kl, distributions.kl_divergence(q, p))
    kl = fgbg_cuda.gaussian_kl(mu, logvar, reduction="none")
    assert_close(kl, distributions.kl_divergence(q, standard))


def test_bernoulli_kl_is_the_divergence(device):
    a, b, _, _ = 8 * _images(device) - 4
    q, p = distributions.Bernoulli(logits=a), distributions.Bernoulli(logits=b)
    assert_close(fgbg_cuda.bernoulli_kl(a, b, reduction="none"), distributions.kl_divergence(q, p))


@pytest.mark.parametrize("channels", ["joint", "independent"])
def test_mixture_is_the_mixture_density(channels, device):
    fg, bg, target, logits = _images(device)
    logits = 6 * logits[:, :1] - 3
    loss = fgbg_cuda.mixture_reconstruction_loss(
        fg, bg, target, mask_logits=logits, channels=channels, fg_scale=0.3, bg_scale=0.5, reduction="none"
    )
    components = [distributions.Normal(x, s).log_prob(target) for x, s in ((fg, 0.3), (bg, 0.5))]
    if channels == "joint":
        components = [c.sum(1, keepdim=True) for c in components]
    mask = torch.sigmoid(logits)
    expected = -torch.log(mask * components[0].exp() + (1 - mask) * components[1].exp())
    assert_close(loss, expected)


def test_samples_have_the_posterior_moments(device):
    mu = torch.tensor([[-2.0, 0.0, 5.0]], device=device).double()
    logvar = torch.tensor([[-3.0, 0.0, 1.5]], device=device).double()
    z = fgbg_cuda.reparameterize(mu, logvar, num_samples=200_000, seed=0)[:, 0]
    std = torch.exp(logvar[0] / 2)
    error = 5 / math.sqrt(200_000)
    assert ((z.mean(0) - mu[0]).abs() < error * std).all()
    assert ((z.var(0) / std**2 - 1).abs() < error * math.sqrt(2)).all()


def test_sample_gaussian_is_both_of_its_parts(device):
    mu, logvar, prior_mu, prior_logvar = _images(device).float()
    z, kl = fgbg_cuda.sample_gaussian(mu, logvar, prior_mu, prior_logvar, seed=3, offset=2)
    assert_same(z, fgbg_cuda.reparameterize(mu, logvar, seed=3, offset=2))
    assert_same(kl, fgbg_cuda.gaussian_kl(mu, logvar, prior_mu, prior_logvar))


# --- reductions -----------------------------------------------------------------------------------

LOSSES = {
    "gaussian_kl": lambda x, r: fgbg_cuda.gaussian_kl(x[0], x[1], reduction=r),
    "bernoulli_kl": lambda x, r: fgbg_cuda.bernoulli_kl(x[0], x[1], reduction=r),
    "masked": lambda x, r: fgbg_cuda.masked_reconstruction_loss(*x[:3], mask=x[3], reduction=r),
    "area": lambda x, r: fgbg_cuda.masked_reconstruction_loss(
        *x[:3], mask=x[3], normalize="area", reduction=r
    ),
    "blended": lambda x, r: fgbg_cuda.blended_reconstruction_loss(*x[:3], mask=x[3], reduction=r),
    "joint": lambda x, r: fgbg_cuda.mixture_reconstruction_loss(*x[:3], mask_logits=x[3][:, :1], reduction=r),
    "independent": lambda x, r: fgbg_cuda.mixture_reconstruction_loss(
        *x[:3], mask_logits=x[3], channels="independent", reduction=r
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_are_sums_of_the_elements(name, device):
    images = _images(device)
    elements, *reduced = (LOSSES[name](images, r) for r in REDUCTIONS)
    sums = elements.flatten(1).sum(1)
    for actual, expected in zip(reduced, (sums, sums.mean(), sums.sum()), strict=False):
        assert_close(actual, expected)
    mean = LOSSES[name](images, "mean")
    # An area-normalised loss has no elements of its own: its mean is over those of the image.
    assert_close(mean, sums.sum() / elements.numel())
    assert elements.shape == (3, 1 if name == "joint" else 2, 5, 7)


def test_default_reduction_is_batchmean(device):
    images = _images(device)
    assert_same(fgbg_cuda.gaussian_kl(images[0], images[1]), LOSSES["gaussian_kl"](images, "batchmean"))


# --- masks and regions ----------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("op", BY_REGION, ids=lambda f: f.__name__)
def test_hard_mask_chooses(likelihood, op, device):
    """A hard mask shows each pixel one of the two predictions, whichever way they are composed."""
    fg, bg, target, mask = _images(device)
    hard = mask > 0.5
    composite = torch.where(hard, fg, bg)
    alone = fgbg_cuda.masked_reconstruction_loss(
        composite, None, target, mask=hard, likelihood=likelihood, reduction="none"
    )
    assert_close(op(fg, bg, target, mask=hard, likelihood=likelihood, reduction="none"), alone)


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_masked_loss_of_equal_predictions_ignores_the_mask(likelihood, device):
    x, target, _, mask = _images(device)
    losses = [
        fgbg_cuda.masked_reconstruction_loss(x, bg, target, mask=m, likelihood=likelihood)
        for m in (mask, 1 - mask)
        for bg in (x, None)
    ]
    for other in losses[1:]:
        assert_close(other, losses[0])


@pytest.mark.parametrize("op", BY_REGION, ids=lambda f: f.__name__)
def test_mask_logits_are_logits_of_the_mask(op, device):
    fg, bg, target, logits = _images(device)
    for channels in (1, 2):
        m = 8 * logits[:, :channels] - 4
        assert_close(op(fg, bg, target, mask_logits=m), op(fg, bg, target, mask=torch.sigmoid(m)))


@pytest.mark.parametrize("op", BY_REGION, ids=lambda f: f.__name__)
def test_one_mask_channel_stands_for_all(op, device):
    fg, bg, target, mask = _images(device)
    one = mask[:, :1]
    assert_close(op(fg, bg, target, mask=one), op(fg, bg, target, mask=one.expand_as(fg)))


def test_swapping_foreground_and_background(device):
    fg, bg, target, mask = _images(device)
    options = {"likelihood": "gaussian", "reduction": "sample"}
    loss = fgbg_cuda.masked_reconstruction_loss
    assert_close(
        loss(fg, bg, target, mask=mask, fg_scale=0.3, bg_weight=2.0, **options),
        loss(bg, fg, target, mask=1 - mask, bg_scale=0.3, fg_weight=2.0, **options),
    )
    mixture, logits = fgbg_cuda.mixture_reconstruction_loss, mask[:, :1]
    assert_close(
        mixture(fg, bg, target, mask_logits=logits, fg_scale=0.3, **options),
        mixture(bg, fg, target, mask_logits=-logits, bg_scale=0.3, **options),
    )


def test_mixture_is_never_worse_than_its_components(device):
    """-log(m p + (1 - m) q) <= -log m p, and Jensen: <= m l_fg + (1 - m) l_bg."""
    fg, bg, target, mask = _images(device)
    logits = 4 * mask[:, :1] - 2
    masked = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask_logits=logits, reduction="sample")
    mixture = fgbg_cuda.mixture_reconstruction_loss(fg, bg, target, mask_logits=logits, reduction="sample")
    assert (mixture <= masked).all()


def test_terms_make_the_loss(device):
    fg, bg, target, mask = _images(device)
    loss, terms = fgbg_cuda.masked_reconstruction_loss(
        fg, bg, target, mask=mask, fg_weight=0.5, bg_weight=3.0, reduction="sample", return_terms=True
    )
    assert_close(loss, 0.5 * terms.fg_nats + 3.0 * terms.bg_nats)
    assert_close(terms.fg_area, mask.mean(1).flatten(1).sum(1))
    area, same = fgbg_cuda.masked_reconstruction_loss(
        fg, bg, target, mask=mask, normalize="area", reduction="sample", return_terms=True
    )
    for a, b in zip(same, terms, strict=True):
        assert_close(a, b)
    pixels = fg[0, 0].numel()
    regions = terms.fg_nats / terms.fg_area + terms.bg_nats / (pixels - terms.fg_area)
    assert_close(area, regions / fg.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["float", "bool", "uint8", "logits"])
def test_empty_region_is_exactly_zero(kind, reduction, dtype, device):
    """Normalised by an area of 0, a region counts 0 and pulls at nothing: no NaN, however absurd its
    prediction."""
    fg, bg, target, _ = _images(device).to(dtype)
    fg = (1000 * fg).requires_grad_()
    bg = bg.clone().requires_grad_()
    mask = torch.zeros(3, 1, 5, 7, device=device, dtype=dtype)
    if kind == "logits":
        # exp(-inf) is the one way for a logit to leave an area of exactly 0.
        masks = {"mask_logits": torch.full_like(mask, -math.inf)}
    else:
        masks = {"mask": mask if kind == "float" else mask.to(getattr(torch, kind))}
    options = {"normalize": "area", "reduction": reduction}
    loss = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, fg_weight=7.0, **masks, **options)
    assert loss.isfinite().all()
    d_fg, d_bg = torch.autograd.grad(loss.sum(), (fg, bg))
    assert not d_fg.any()
    assert d_bg.isfinite().all()
    assert d_bg.any()
    other = fgbg_cuda.masked_reconstruction_loss(bg, bg, target, **masks, **options)
    assert_same(loss, other)


@pytest.mark.parametrize("wide", ["fg_scale", "bg_scale"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_infinite_scale_by_area_is_infinite(reduction, wide, device):
    """log(inf) in one region is not times 0 in the other."""
    fg, bg, target, mask = _images(device)
    options = {"normalize": "area", "likelihood": "gaussian", wide: torch.tensor(math.inf, device=device)}
    loss = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask, reduction=reduction, **options)
    assert loss.isposinf().all()


@pytest.mark.parametrize("likelihood", reference.SCALED_LIKELIHOODS)
def test_scales_of_an_empty_batch_get_zeros(likelihood, device):
    """A sum over no elements is 0, also where the derivative of each would be infinite."""
    empty = torch.zeros(0, 2, 5, device=device)
    scales = [torch.zeros(2, device=device, requires_grad=True) for _ in range(2)]
    loss = fgbg_cuda.masked_reconstruction_loss(
        empty, empty, empty, mask=empty, likelihood=likelihood, fg_scale=scales[0], bg_scale=scales[1],
        reduction="sum",
    )  # fmt: skip
    specified = reference.reconstruction_loss(
        empty, empty, empty, empty, *scales, None, "masked", False, likelihood, reduction="sum"
    )[0]
    for value in (loss, specified):
        for gradient in torch.autograd.grad(value, scales):
            assert_same(gradient, torch.zeros(2, device=device))


def test_zero_weight_silences_a_region(device):
    fg, bg, target, mask = _images(device)
    fg.requires_grad_()
    loss = fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask, fg_weight=0.0)
    assert not torch.autograd.grad(loss, fg)[0].any()


# --- free bits and the importance-weighted bound --------------------------------------------------


def test_free_bits_floor_the_batch_mean_of_each_dimension(device):
    mu, logvar, _, _ = _images(device)
    per_dimension = fgbg_cuda.gaussian_kl(mu, logvar, reduction="none").mean(0)
    floor = per_dimension.median().item()
    kl = fgbg_cuda.gaussian_kl(mu, logvar, free_bits=floor)
    assert_close(kl, torch.clamp(per_dimension, min=floor).sum())
    # Higher than every dimension: a constant, which no longer pulls at the posterior.
    mu = mu.clone().requires_grad_()
    kl = fgbg_cuda.gaussian_kl(mu, logvar, free_bits=100.0)
    assert kl.item() == pytest.approx(100.0 * mu[0].numel())
    assert not torch.autograd.grad(kl, mu)[0].any()


def test_importance_weighted_bound_grows_to_log_p(device):
    """A linear Gaussian model, where log p(x) is known: z ~ N(0, 1), x | z ~ N(z, 1)."""
    x = torch.tensor([0.3, -1.2, 2.0], device=device).double()
    mu, logvar = x / 2 + 0.3, torch.full_like(x, -0.2)  # near the posterior N(x/2, 1/2), but not it
    z = fgbg_cuda.reparameterize(mu, logvar, num_samples=20_000, seed=0)
    normal = distributions.Normal
    log_p = normal(0.0, 1.0).log_prob(z) + normal(z, 1.0).log_prob(x)
    log_q = normal(mu, torch.exp(logvar / 2)).log_prob(z)
    exact = normal(0.0, math.sqrt(2)).log_prob(x)
    elbo = (log_p - log_q).mean(0)
    bounds = [
        fgbg_cuda.importance_weighted_bound(log_p.view(-1, k, 3), log_q.view(-1, k, 3), dim=1).mean(0)
        for k in (1, 5, 50)
    ]
    assert_close(bounds[0], elbo)
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < bounds[2]).all()
    whole = fgbg_cuda.importance_weighted_bound(log_p, log_q)
    assert ((whole - exact).abs() < 0.01).all()
    bits = fgbg_cuda.importance_weighted_bound(log_p, log_q, bits_per_dim=10)
    assert_close(bits, -whole / (10 * math.log(2)))


def test_importance_weighted_bound_does_not_overflow(device):
    log_p = torch.tensor([[-5000.0], [-5001.0]], dtype=torch.float64, device=device)
    log_p.requires_grad_()
    bound = fgbg_cuda.importance_weighted_bound(log_p, torch.zeros_like(log_p))
    assert bound.item() == pytest.approx(-5000 + math.log((1 + math.exp(-1)) / 2), rel=1e-6)
    assert torch.autograd.grad(bound.sum(), log_p)[0].sum().item() == pytest.approx(1.0)
