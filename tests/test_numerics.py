"""Where the obvious float32 formula loses its digits, and where IEEE arithmetic has the word."""

import math

import pytest
import torch
from compare import assert_close, assert_same

import fgbg_cuda
from fgbg_cuda import reference

FLOATS = (torch.float32, torch.float64)
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


def _relative(actual, exact):
    return ((actual.double() - exact) / exact).abs().max().item()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gaussian_kl_near_the_prior(dtype, device):
    """KL = x^2/4 (1 + x/3 + x^2/12 + x^3/60 ...): relative accuracy where exp(x) - 1 - x is 0 in float32."""
    x = torch.tensor([1e-2, -1e-2, 1e-3, 1e-4, -1e-4, 1e-6, 1e-10], dtype=dtype, device=device)
    kl = fgbg_cuda.gaussian_kl(torch.zeros_like(x), x, reduction="none")
    d = x.double()
    exact = d**2 / 4 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    assert _relative(kl, exact) < 8 * EPS[dtype]


def test_gaussian_kl_of_one_ten_thousandth(device):
    x = torch.tensor([1e-4], device=device)
    kl = fgbg_cuda.gaussian_kl(torch.zeros_like(x), x).item()
    assert kl == pytest.approx(2.5e-9, rel=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gaussian_kl_is_accurate_everywhere(dtype, device):
    """Against any prior: no cancellation between logvar and prior_logvar beyond their difference, which
    is exact here."""
    d = torch.cat([torch.linspace(-40, 40, 4001), torch.logspace(-6, 1, 99)]).to(device, dtype)
    for prior in (0.0, 4.0, -8.0):
        prior_logvar = torch.full_like(d, prior)
        logvar = d + prior_logvar
        exact_d = logvar.double() - prior_logvar.double()
        kl = fgbg_cuda.gaussian_kl(
            torch.zeros_like(d), logvar, torch.zeros_like(d), prior_logvar, reduction="none"
        )
        near = exact_d.abs() < 0.1
        series = (
            exact_d**2
            / 4
            * (
                1
                + exact_d / 3 * (1 + exact_d / 4 * (1 + exact_d / 5 * (1 + exact_d / 6 * (1 + exact_d / 7))))
            )
        )
        exact = torch.where(near, series, 0.5 * (torch.expm1(exact_d) - exact_d))
        keep = exact != 0
        # The argument is exact and the function right to 2 epsilon in float32; in float64 expm1(d) - d leaves
        # a fifth of expm1(d) at |d| = 1/2. The sum and the half add one rounding.
        # The series leaves out |d|^6 / 20160 < 5e-11 of the KL.
        bound = 3 * EPS[dtype] if dtype == torch.float32 else 6 * EPS[dtype] + 5e-11
        assert _relative(kl[keep], exact[keep]) < bound


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kl_is_never_negative(dtype, device):
    x = torch.cat([torch.linspace(-1, 1, 20001), torch.logspace(-12, 0, 999)]).to(device, dtype)
    assert (fgbg_cuda.gaussian_kl(torch.zeros_like(x), x, reduction="none") >= 0).all()
    for base in (-20.0, -3.0, 0.0, 0.7, 25.0):
        a = torch.full_like(x, base)
        assert (fgbg_cuda.bernoulli_kl(a, a + x, reduction="none") >= 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base", [-30.0, -5.0, -0.5, 0.0, 0.25, 8.0, 40.0])
def test_bernoulli_kl_near_equality(base, dtype, device):
    """KL(a || a - d) = m (1 - m) (d^2/2 - (1 - 2m) d^3/6 + ...): relative accuracy although both of its
    terms cancel to second order. d is a power of 2, so a - d is exact."""
    d = 2.0 ** torch.arange(-9, -3, dtype=torch.float64, device=device)
    d = torch.cat([d, -d])
    a = torch.full_like(d, base)
    kl = fgbg_cuda.bernoulli_kl(a.to(dtype), (a - d).to(dtype), reduction="none")
    # The integral form of the KL, sigmoid'(a - d + t) t dt, by Gauss-Legendre: nothing cancels.
    nodes, weights = _gauss_legendre(20)
    t = d[:, None] * (nodes.to(device) + 1) / 2
    slope = torch.sigmoid(a[:, None] - t) * torch.sigmoid(-(a[:, None] - t))
    # d/ds KL(a || a - s) = sigmoid(a) - sigmoid(a - s), so KL = int (d - s) sigmoid'(a - s) ds.
    exact = (slope * (d[:, None] - t) * weights.to(device)).sum(1) * d / 2
    assert _relative(kl, exact) < 64 * EPS[dtype]


def _gauss_legendre(n):
    """Nodes and weights on [-1, 1], from the eigenvalues of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0] ** 2


def test_bernoulli_kl_of_saturated_masks(device):
    """Certain and right costs nothing, certain and wrong costs the prior's logit."""
    a = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0], device=device)
    b = torch.tensor([1e4, -1e4, -1e4, 1e4, 100.0], device=device)
    kl = fgbg_cuda.bernoulli_kl(a, b, reduction="none")
    expected = torch.tensor([0.0, 0.0, 1e4, 1e4, 50 - math.log(2)], device=device)
    assert_close(kl, expected)


def _log_normalizer(x):
    """log C(x) = log(x / tanh(x/2)) for |x| in float64, from forms that do not cancel."""
    x = x.double().abs()
    small = math.log(2) + x**2 / 12 - 7 * x**4 / 1440 + 31 * x**6 / 90720
    large = torch.log(x.clamp(min=0.05)) - torch.log(torch.tanh(x.clamp(min=0.05) / 2))
    return torch.where(x < 0.05, small, large)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_continuous_bernoulli_at_every_size_of_logit(dtype, device):
    sizes = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 0.05, 0.5, 0.999, 1.001, 3.0, 30.0, 300.0, 1e4])
    x = torch.cat([sizes, -sizes]).to(device, dtype).view(1, 1, -1)
    x.requires_grad_()
    target = torch.full_like(x, 0.375).detach()
    nll = fgbg_cuda.blended_reconstruction_loss(
        x, x, target, mask=torch.ones_like(target), likelihood="continuous_bernoulli", reduction="none"
    )
    (slope,) = torch.autograd.grad(nll.sum(), x)
    wide = x.detach().double()
    exact = torch.nn.functional.softplus(wide) - 0.375 * wide - _log_normalizer(wide)
    # Relative to each element's own size: a logit of 1e4 must not hide an error at 0.
    bound = 64 * EPS[dtype] * exact.abs().clamp(min=1)
    assert bool(((nll.double() - exact).abs() <= bound).all())
    # The mean of a continuous Bernoulli, 1/2 + x/12 near 0 and 1 - 1/|x| far away, less the target.
    near = wide.abs() < 0.05
    far = torch.where(near, torch.ones_like(wide), wide)
    mean = torch.where(
        near, 0.5 + wide / 12 - wide**3 / 720 + wide**5 / 30240, 1 / -torch.expm1(-far) - 1 / far
    )
    assert_close(slope, mean - 0.375, dtype)


@pytest.mark.parametrize("channels", ["joint", "independent"])
@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_mixture_of_certain_masks_is_one_component(likelihood, channels, device):
    """At logits of +-1e4 the other component vanishes exactly, whatever it predicts, in value and
    gradient; there is no + 1e-8 that would show."""
    fg, bg, target = torch.rand(3, 2, 3, 7, device=device)
    fg.requires_grad_(), bg.requires_grad_()
    for logit, chosen, other in ((1e4, fg, bg), (-1e4, bg, fg)):
        logits = torch.full((2, 1, 7), logit, device=device)
        options = {"likelihood": likelihood, "reduction": "sample"}
        mixture = fgbg_cuda.mixture_reconstruction_loss(
            fg, bg, target, mask_logits=logits, channels=channels, **options
        )
        alone = fgbg_cuda.masked_reconstruction_loss(
            chosen, None, target, mask=torch.ones(2, 1, 7, device=device), **options
        )
        assert_close(mixture, alone)
        chosen_gradient, other_gradient = torch.autograd.grad(mixture.sum(), (chosen, other))
        assert_close(chosen_gradient, torch.autograd.grad(alone.sum(), chosen)[0])
        assert not other_gradient.any()


def test_mixture_of_equal_components_ignores_the_mask(device):
    x, target = torch.rand(2, 2, 3, 50, device=device)
    logits = torch.linspace(-1e4, 1e4, 50, device=device).expand(2, 1, 50)
    mixture = fgbg_cuda.mixture_reconstruction_loss(x, x, target, mask_logits=logits)
    alone = fgbg_cuda.masked_reconstruction_loss(x, None, target, mask_logits=logits)
    # The certain logits are added and taken off again.
    assert_close(mixture, alone, operations=1024)


def test_mixture_of_improbable_components_keeps_its_digits(device):
    """exp(-5000) underflows; the log of the mixture does not."""
    fg, bg = torch.full((2, 1, 1, 1), 100.0, device=device)
    target = torch.zeros(1, 1, 1, device=device)
    loss = fgbg_cuda.mixture_reconstruction_loss(
        fg, bg, target, mask_logits=torch.full((1, 1, 1), 0.3, device=device), likelihood="gaussian"
    )
    assert loss.item() == pytest.approx(5000 + 0.5 * math.log(2 * math.pi), rel=1e-6)


SPECIALS = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -0.0, 1e-40, 1000.0, -1000.0)


def _assert_follows(actual, specified):
    """NaN where the formula has NaN, the same infinities, and the same finite numbers."""
    finite = specified.isfinite()
    assert_same(actual[~finite], specified[~finite])
    assert_same(actual.isfinite(), finite)
    torch.testing.assert_close(actual[finite], specified[finite], rtol=64 * EPS[torch.float32], atol=1e-6)


def _pairs(device):
    grid = torch.tensor(SPECIALS, device=device)
    return [t.reshape(1, -1).contiguous() for t in torch.meshgrid(grid, grid, indexing="ij")]


def test_gaussian_kl_of_special_values(device):
    mu, logvar = _pairs(device)
    kl = fgbg_cuda.gaussian_kl(mu, logvar, reduction="none")
    _assert_follows(kl, reference.gaussian_kl(mu, logvar, reduction="none"))


def test_reparameterize_of_special_values(device):
    mu, logvar = _pairs(device)
    seed = torch.tensor([3], device=device)
    _assert_follows(
        fgbg_cuda.reparameterize(mu, logvar, seed=seed),
        reference.reparameterize(mu, logvar, "logvar", seed),
    )


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("composition", ["masked", "blended"])
def test_losses_of_special_values(likelihood, composition, device):
    """NaN and infinity are never "fixed": they come through as the float32 formula has them."""
    fg, target = (t.view(1, 1, -1) for t in _pairs(device))
    bg = torch.zeros_like(fg)
    if likelihood == "poisson":
        target = target.abs()  # of counts below zero the formula has no meaning
    op = getattr(fgbg_cuda, f"{composition}_reconstruction_loss")
    for mask in (0.5, 1.0):
        masks = torch.full_like(fg, mask)
        loss = op(fg, bg, target, mask=masks, likelihood=likelihood, reduction="none")
        specified = reference.reconstruction_loss(
            fg, bg, target, masks, 1.0, 1.0, None, composition, False, likelihood, reduction="none"
        )[0]
        _assert_follows(loss, specified)


@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean", "sum", "mean"])
def test_one_nan_shows(reduction, device):
    """In its own sample, and in no other."""
    x = torch.zeros(3, 700, device=device)
    x[1, 600] = math.nan
    kl = fgbg_cuda.gaussian_kl(x, torch.zeros_like(x), reduction=reduction)
    if reduction in ("none", "sample"):
        assert kl.isnan().nonzero()[:, 0].tolist() == [1]
    else:
        assert kl.isnan()


def test_gradient_of_the_absolute_value_at_zero_is_zero(device):
    """As torch.abs has it."""
    x = torch.zeros(1, 1, 3, device=device, requires_grad=True)
    for likelihood in ("laplace", "absolute_error"):
        loss = fgbg_cuda.masked_reconstruction_loss(
            x, None, x.detach(), mask=torch.ones(1, 1, 3, device=device), likelihood=likelihood
        )
        assert not torch.autograd.grad(loss, x)[0].any()


def test_long_sums_keep_float32_accuracy(device):
    """Four million equal terms: a running float32 sum would be off in the third digit."""
    x = torch.full((1, 1 << 22), 0.1, device=device)
    kl = fgbg_cuda.gaussian_kl(x, torch.zeros_like(x))
    assert kl.item() == pytest.approx((1 << 22) * 0.5 * float(x[0, 0]) ** 2, rel=1e-6)


def _infinite_pairs(dtype, device):
    numbers = (math.inf, -math.inf, 0.0, 2.5, -2.5, 1000.0, -1000.0, 1e30, math.nan)
    grid = torch.tensor(numbers, device=device, dtype=dtype)
    pairs = torch.meshgrid(grid, grid, indexing="ij")
    return [t.reshape(1, -1).contiguous().requires_grad_() for t in pairs]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bernoulli_kl_of_infinite_logits(dtype, device):
    """A mask of exactly 0 or 1 has as its KL what the prior says of it, and a slope of 0."""
    inf = math.inf
    for prior in (0.0, 2.5, -2.5, 40.0, -40.0):
        logit = torch.tensor([[inf, -inf]], device=device, dtype=dtype, requires_grad=True)
        prior_logit = torch.full_like(logit, prior).requires_grad_()
        kl = fgbg_cuda.bernoulli_kl(logit, prior_logit, reduction="none")
        wide = torch.tensor([[-prior, prior]], device=device, dtype=torch.float64)
        assert_close(kl, torch.nn.functional.softplus(wide), dtype)
        assert_same(fgbg_cuda.bernoulli_kl(logit, prior, reduction="none"), kl)
        d_logit, d_prior = torch.autograd.grad(kl.sum(), (logit, prior_logit))
        assert not d_logit.any()
        assert_close(d_prior, torch.stack([-torch.sigmoid(wide[:, 0]), torch.sigmoid(wide[:, 1])], 1), dtype)


def test_bernoulli_kl_of_a_hard_mask_against_an_even_prior(device):
    logit = torch.tensor([[math.inf, -math.inf]], device=device)
    kl = fgbg_cuda.bernoulli_kl(logit, 0.0, reduction="none")
    assert_close(kl, torch.full_like(kl, math.log(2)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bernoulli_kl_at_the_limits(dtype, device):
    """0 for the same infinity twice, without gradients; inf for any other logit against an infinite prior."""
    inf = math.inf
    same = torch.tensor([[inf, -inf]], device=device, dtype=dtype)
    logit, prior = same.clone().requires_grad_(), same.clone().requires_grad_()
    kl = fgbg_cuda.bernoulli_kl(logit, prior, reduction="none")
    assert not kl.any()
    for gradient in torch.autograd.grad(kl.sum(), (logit, prior)):
        assert_same(gradient.abs(), torch.zeros_like(gradient))
    logit = torch.tensor([[-inf, inf, 0.0, 3.0, -3.0, 1e4, -1e4, 1e4]], device=device, dtype=dtype)
    prior = torch.tensor([[inf, -inf, inf, -inf, inf, -inf, inf, inf]], device=device, dtype=dtype)
    kl = fgbg_cuda.bernoulli_kl(logit, prior, reduction="none")
    assert_same(kl, torch.full_like(kl, inf))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bernoulli_kl_of_special_values(dtype, device):
    """Value and gradients as the specification has them."""
    found = []
    for call in (
        fgbg_cuda.bernoulli_kl,
        reference.bernoulli_kl,
    ):
        logit, prior = _infinite_pairs(dtype, device)
        kl = call(logit, prior, reduction="none")
        found.append([kl.detach(), *torch.autograd.grad(kl.sum(), (logit, prior))])
    for name, actual, specified in zip(("kl", "logit", "prior"), *found, strict=True):
        finite = specified.isfinite()
        assert_same(actual[~finite], specified[~finite], name)
        assert_same(actual.isfinite(), finite, name)
        torch.testing.assert_close(actual[finite], specified[finite], rtol=64 * EPS[torch.float32], atol=1e-6)
