"""What a spread may be, what broadcasts, which dimensions index samples; log-densities and outcomes."""

import math

import pytest
import torch
from benchmarks.memory import peak_bytes
from compare import assert_close, assert_same
from torch import distributions

import fgbg_cuda
from fgbg_cuda import reference

FLOATS = (torch.float32, torch.float64)
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
OF_STD = {"std": lambda s: s, "log_std": torch.log, "logvar": lambda s: 2 * torch.log(s)}


def _randn(*shape, device, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _relative(actual, exact):
    return ((actual.double() - exact) / exact).abs().max().item()


# --- parameterizations ----------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", OF_STD)
def test_parameterizations_say_the_same(parameterization, device):
    mu, std, prior_mu, prior_std = (_randn(4, 9, device=device, seed=k) for k in range(4))
    std, prior_std = std.abs() + 0.1, prior_std.abs() + 0.1
    spread, prior_spread = map(OF_STD[parameterization], (std, prior_std))
    word = {"parameterization": parameterization}
    q, p = distributions.Normal(mu, std), distributions.Normal(prior_mu, prior_std)
    kl = fgbg_cuda.gaussian_kl(mu, spread, prior_mu, prior_spread, reduction="none", **word)
    assert_close(kl, distributions.kl_divergence(q, p))
    kl = fgbg_cuda.gaussian_kl(mu, spread, reduction="none", **word)
    assert_close(kl, distributions.kl_divergence(q, distributions.Normal(torch.zeros_like(mu), 1.0)))
    z = fgbg_cuda.reparameterize(mu, spread, seed=1, **word)
    assert_close(z, mu + std * fgbg_cuda.philox_normal(1, mu.shape, dtype=mu.dtype, device=device))
    assert_close(fgbg_cuda.sample_gaussian(mu, spread, seed=1, **word)[0], z)
    log_prob = fgbg_cuda.gaussian_log_prob(z, mu, spread, reduction="none", **word)
    assert_close(log_prob, q.log_prob(z))


def _exact_std_kl(std, prior):
    """KL(N(0, std^2) || N(0, prior^2)) and d/dstd in float64: t - log(1 + t) as its integral, t^2 times the
    integral of u / (1 + t u), by Gauss-Legendre, where t is small."""
    t = (std - prior) / prior
    k = torch.arange(1, 24, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    u, weights = (nodes + 1) / 2, vectors[0] ** 2
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)[..., None].cpu()
    series = (small**2 * u / (1 + small * u) * weights).sum(-1).to(std.device)
    far = t - torch.log(std / prior)
    return 0.5 * t**2 + torch.where(near, series, far), t * (2 + t) / std


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("prior", [None, 1.0, 0.03, 700.0])
def test_std_near_the_prior_and_near_zero(prior, dtype, device):
    """Relative accuracy of the value and of its slope, where std^2 - 1 - 2 log std would be noise, or inf."""
    of = 1.0 if prior is None else prior
    steps = 2.0 ** -torch.arange(1, 22, dtype=torch.float64)
    ratios = torch.cat([1 + steps, 1 - steps, torch.linspace(0.05, 5, 400), torch.logspace(-30, -2, 57)])
    std = (of * ratios.double()).to(device, dtype)
    std = std[(std.double() - of).abs() > 0].requires_grad_()
    prior_std = None if prior is None else torch.full_like(std, prior)
    kl = fgbg_cuda.gaussian_kl(
        torch.zeros_like(std), std, None, prior_std, parameterization="std", reduction="none"
    )
    (slope,) = torch.autograd.grad(kl.sum(), std)
    wide = std.detach().double()
    exact, exact_slope = _exact_std_kl(wide, wide.new_tensor(of).to(dtype).double())
    # A handful of roundings; where t - log(1 + t) is taken as a difference, six times as many.
    assert _relative(kl.detach(), exact) < 16 * EPS[dtype]
    assert _relative(slope, exact_slope) < 8 * EPS[dtype]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_std_near_the_prior(dtype, device):
    s = torch.tensor([1e-2, -1e-2, 1e-4, -1e-6, 1e-10], dtype=dtype, device=device, requires_grad=True)
    kl = fgbg_cuda.gaussian_kl(torch.zeros_like(s), s, parameterization="log_std", reduction="none")
    (slope,) = torch.autograd.grad(kl.sum(), s)
    d = 2 * s.detach().double()
    assert _relative(kl.detach(), d**2 / 4 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5)))) < 8 * EPS[dtype] + 1e-9
    assert _relative(slope, torch.expm1(d)) < 8 * EPS[dtype]


def test_a_std_of_zero(device):
    """Samples to mu, with finite gradients; its KL is inf."""
    mu = _randn(3, 4, device=device).requires_grad_()
    std = torch.zeros(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    word = {"parameterization": "std"}
    z = fgbg_cuda.reparameterize(mu, std, seed=5, **word)
    assert_same(z.detach(), mu.detach())
    eps = fgbg_cuda.philox_normal(5, (3, 4), dtype=torch.float64, device=device)
    d_mu, d_std = torch.autograd.grad(z.sum(), (mu, std))
    assert_same(d_mu, torch.ones_like(mu))
    assert_same(d_std, eps)
    kl = fgbg_cuda.gaussian_kl(mu, std, reduction="none", **word)
    assert kl.isposinf().all()
    z, kl = fgbg_cuda.sample_gaussian(mu, std, seed=5, **word)
    assert kl.isposinf()
    assert_same(torch.autograd.grad(z.sum(), std)[0], eps)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("parameterization", OF_STD)
def test_special_values(parameterization, dtype, device):
    """NaN and the infinities as the formula has them. (Where that loses its digits, the kernel need not.)"""
    numbers = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0, 30.0], device=device, dtype=dtype)
    mu, s = (t.reshape(1, -1) for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    calls = [
        (fgbg_cuda.gaussian_kl(mu, s, parameterization=parameterization, reduction="none"),
         reference.gaussian_kl(mu, s, 0.0, None, parameterization, "none")),
        (fgbg_cuda.gaussian_log_prob(mu, 0.5, s, parameterization=parameterization, reduction="none"),
         reference.gaussian_log_prob(mu, 0.5, s, parameterization, "none")),
    ]  # fmt: skip
    for actual, specified in calls:
        finite = specified.isfinite()
        assert_same(actual[~finite], specified[~finite])
        torch.testing.assert_close(actual[finite], specified[finite], rtol=64 * EPS[dtype], atol=1e-6)


# --- what broadcasts ------------------------------------------------------------------------------


def _with_gradients(function, inputs):
    inputs = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    value = function(**inputs)
    weights = torch.arange(value.numel(), device=value.device).view(value.shape) % 3 + 1.0
    grads = torch.autograd.grad((value * weights).sum(), list(inputs.values()))
    return value.detach(), dict(zip(inputs, grads, strict=True))


@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean"])
@pytest.mark.parametrize("small", [(), (1,), (7,), (5, 1), (1, 7), (3, 1, 1), (3, 5, 1), (1, 5, 7)])
def test_what_broadcasts_is_what_is_expanded(small, reduction, device):
    mu, logvar = (_randn(3, 5, 7, device=device, seed=k) for k in range(2))
    inputs = {
        "prior_mu": _randn(*small, device=device, seed=2),
        "prior_logvar": _randn(*small, device=device, seed=3),
    }

    def kl(**priors):
        return fgbg_cuda.gaussian_kl(mu, logvar, **priors, reduction=reduction, batch_dims=2)

    def expanded(**priors):
        return kl(**{n: t.expand_as(mu).contiguous() for n, t in priors.items()})

    found, expected = _with_gradients(kl, inputs), _with_gradients(expanded, inputs)
    assert_close(found[0], expected[0])
    for name, gradient in found[1].items():
        assert_close(gradient, expected[1][name], note=name)


def test_numbers_are_tensors_of_one_number(device):
    mu, logvar = (_randn(3, 40, device=device, seed=k, dtype=torch.float32) for k in range(2))
    half = torch.tensor(0.5, device=device)
    kl = fgbg_cuda.gaussian_kl
    assert_same(kl(mu, logvar, 0.5, 0.5), kl(mu, logvar, half, half))
    assert_same(kl(mu, logvar, 0.5, half.expand(3, 40)), kl(mu, logvar, half, 0.5))
    assert_same(kl(mu, logvar, 0, 0.0), kl(mu, logvar))
    std = logvar.abs()
    assert_same(kl(mu, std, 0, 1, parameterization="std"), kl(mu, std, parameterization="std"))
    assert_same(fgbg_cuda.bernoulli_kl(mu, 0.5), fgbg_cuda.bernoulli_kl(mu, half))
    log_prob = fgbg_cuda.gaussian_log_prob
    assert_same(log_prob(mu, 0.5, 0.5), log_prob(mu, half, half))


@pytest.mark.not_emulated("its memory is not counted")
def test_the_smaller_one_is_not_copied(device):
    z = torch.randn(8, 64, 512, device=device)
    mu, logvar = torch.randn(2, 64, 512, device=device)
    found = peak_bytes(
        lambda: fgbg_cuda.gaussian_log_prob(z, mu, logvar, reduction="sample", batch_dims=2), str(device)
    )
    assert found < 0.1 * z.nbytes


def test_batch_dims_are_merged_dimensions(device):
    shape = (2, 3, 4, 5)
    mu, logvar, prior = (_randn(*shape, device=device, seed=k) for k in range(3))
    for n in (1, 2, 3, 4):
        merged = [t.flatten(0, n - 1) for t in (mu, logvar, prior)]
        for reduction in ("sample", "batchmean", "sum", "mean"):
            options = {"reduction": reduction}
            for found, expected in (
                (fgbg_cuda.gaussian_kl(mu, logvar, prior, batch_dims=n, **options),
                 fgbg_cuda.gaussian_kl(*merged, **options)),
                (fgbg_cuda.sample_gaussian(mu, logvar, batch_dims=n, seed=1, **options)[1],
                 fgbg_cuda.sample_gaussian(*merged[:2], seed=1, **options)[1]),
                (fgbg_cuda.bernoulli_kl(mu, logvar, batch_dims=n, **options),
                 fgbg_cuda.bernoulli_kl(*merged[:2], **options)),
                (fgbg_cuda.gaussian_log_prob(mu, logvar, prior, batch_dims=n, **options),
                 fgbg_cuda.gaussian_log_prob(*merged, **options)),
            ):  # fmt: skip
                shaped = expected.view(shape[:n]) if reduction == "sample" else expected
                assert_close(found, shaped)
    kl = fgbg_cuda.gaussian_kl(mu, logvar, free_bits=0.3, batch_dims=2)
    assert_close(kl, fgbg_cuda.gaussian_kl(mu.flatten(0, 1), logvar.flatten(0, 1), free_bits=0.3))


@pytest.mark.not_emulated("of the CPU's threads")
def test_gradients_of_what_broadcasts_have_the_same_bits_for_any_thread_count(device, threads):
    mu, logvar = (_randn(70, 900, device=device, seed=k, dtype=torch.float32) for k in range(2))
    found = []
    for n in (1, 2, 3):
        threads(n)
        prior = torch.zeros(900, device=device, requires_grad=True)
        shift = torch.zeros((), device=device, requires_grad=True)
        kl = fgbg_cuda.gaussian_kl(mu, logvar, shift, prior)
        found.append([kl.detach(), *torch.autograd.grad(kl, (prior, shift))])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same(a, b)


# --- log-densities --------------------------------------------------------------------------------


def test_importance_weighted_bound_of_a_linear_gaussian_model(device):
    """z ~ N(0, I), x | z ~ N(W z, s^2 I), so x ~ N(0, W W' + s^2 I): the bound of many draws is log p(x)."""
    w, s = _randn(5, 2, device=device), 0.7
    x = _randn(4, 5, device=device, seed=1)
    covariance = torch.linalg.inv(torch.eye(2, device=device).double() + w.T @ w / s**2)
    mu, logvar = x @ w @ covariance / s**2, torch.log(1.3 * covariance.diagonal()).expand(4, 2)
    z = fgbg_cuda.reparameterize(mu, logvar, num_samples=40_000, seed=0)
    options = {"reduction": "sample", "batch_dims": 2}
    log_p = fgbg_cuda.gaussian_log_prob(z, **options)
    log_p = log_p + fgbg_cuda.gaussian_log_prob(
        x.expand(40_000, 4, 5), z @ w.T, s, parameterization="std", **options
    )
    log_q = fgbg_cuda.gaussian_log_prob(z, mu, logvar, **options)
    bound = fgbg_cuda.importance_weighted_bound(log_p, log_q)
    marginal = distributions.MultivariateNormal(
        torch.zeros(5, device=device).double(), w @ w.T + s**2 * torch.eye(5, device=device).double()
    )
    assert ((bound - marginal.log_prob(x)).abs() < 0.02).all()


# --- outcomes -------------------------------------------------------------------------------------


def test_categorical_kl_is_the_divergence(device):
    a, b = (3 * _randn(4, 6, 5, device=device, seed=k) for k in range(2))
    for dim in (1, 2, -1):
        q, p = (distributions.Categorical(logits=t.movedim(dim, -1)) for t in (a, b))
        kl = fgbg_cuda.categorical_kl(a, b, dim=dim, reduction="none")
        assert_close(kl, distributions.kl_divergence(q, p))
        uniform = distributions.Categorical(logits=torch.zeros_like(a).movedim(dim, -1))
        kl = fgbg_cuda.categorical_kl(a, dim=dim, reduction="none")
        assert_close(kl, distributions.kl_divergence(q, uniform))
        assert_same(fgbg_cuda.categorical_kl(a, 3.0, dim=dim, reduction="none"), kl)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_categorical_kl_near_the_prior(size, dtype, device):
    """Half the variance of the differences of the logits, to first order: with relative accuracy, as are the
    gradients."""
    b = _randn(3, 7, device=device, dtype=dtype)
    a = b + (size * _randn(3, 7, device=device, seed=1)).to(dtype)
    logits, prior = a.clone().requires_grad_(), b.clone().requires_grad_()
    kl = fgbg_cuda.categorical_kl(logits, prior, reduction="none")
    d_logits, d_prior = torch.autograd.grad(kl.sum(), (logits, prior))
    d = a.double() - b.double()
    p = torch.softmax(a.double(), 1)
    x = (p * d).sum(1, keepdim=True) - d
    # The series of e^x - 1 - x, and of log(1 + ...), far enough.
    growth = (
        p * x**2 / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    ).sum(1)
    exact = growth - growth**2 / 2 + growth**3 / 3
    assert _relative(kl.detach(), exact) < 64 * EPS[dtype] + 1e-12
    for actual, expected in ((d_logits, -p * x), (d_prior, p * torch.expm1(x - exact[:, None]))):
        # The differences are exact, their mean is rounded.
        assert (actual.double() - expected).abs().max() < 32 * EPS[dtype] * expected.abs().max()


def _wide_kl(a, b):
    log_p, log_q = (torch.log_softmax(t.double(), 1) for t in (a, b))
    return (log_p.exp() * (log_p - log_q).nan_to_num(0.0, 0.0, 0.0)).sum(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("outcomes", [2, 3, 40, 700])
def test_categorical_kl_at_every_distance(outcomes, dtype, device):
    """Between the way for near and for far outcomes and beyond, up to logits of 1e4."""
    generator = torch.Generator().manual_seed(outcomes)
    scale = torch.logspace(-2, 4, 300, dtype=torch.float64)[:, None]
    a, b = (torch.randn(300, outcomes, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = (scale * a).to(device, dtype), (scale.flip(0) * b).to(device, dtype)
    for prior in (b, b[:1].contiguous(), a + b.clamp(-50, 50)):
        logits, other = a.clone().requires_grad_(), prior.clone().requires_grad_()
        kl = fgbg_cuda.categorical_kl(logits, other, reduction="none")
        exact = _wide_kl(a, prior.expand_as(a))
        bound = 32 * EPS[dtype] * (a.abs().amax(1) + prior.expand_as(a).abs().amax(1) + 1).double()
        assert bool(((kl.double() - exact).abs() <= bound).all())
        d_logits, d_prior = torch.autograd.grad(kl.sum(), (logits, other))
        p, q = (torch.softmax(t.double(), 1) for t in (a, prior.expand_as(a)))
        difference = torch.log_softmax(a.double(), 1) - torch.log_softmax(prior.double().expand_as(a), 1)
        assert bool(((d_logits - p * (difference - exact[:, None])).abs() <= 4 * bound[:, None]).all())
        expected = (q - p).sum_to_size(prior.shape)
        assert bool(((d_prior - expected).abs() <= 4 * bound.max() * a.numel() / prior.numel()).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_excluded_outcomes(dtype, device):
    """-inf excludes an outcome: no NaN, no gradient. The KL is inf where the prior alone excludes one."""
    inf = math.inf
    a = torch.tensor([[0.3, -inf, 1.0], [-inf, -inf, 2.0], [0.1, 0.2, -inf], [1.0, 2.0, 3.0]], dtype=dtype)
    b = torch.tensor([[0.1, 0.2, 0.3], [0.0, 100.0, 0.0], [0.0, -1.0, -inf], [0.0, 0.0, -inf]], dtype=dtype)
    a, b = a.to(device).requires_grad_(), b.to(device).requires_grad_()
    kl = fgbg_cuda.categorical_kl(a, b, reduction="none")
    log_p, log_q = torch.log_softmax(a.detach().double(), 1), torch.log_softmax(b.detach().double(), 1)
    terms = torch.where(a == -inf, 0.0, log_p.exp() * (log_p - log_q))
    assert_close(kl, terms.sum(1), dtype)
    assert kl[3].isposinf()
    d_a, d_b = torch.autograd.grad(kl[:3].sum(), (a, b))
    assert d_a[:3].isfinite().all()
    assert not d_a[:3][a.detach()[:3] == -inf].any()
    assert_close(d_b[:3], (log_q.exp() - log_p.exp())[:3], dtype)
    uniform = fgbg_cuda.categorical_kl(a, reduction="none")
    assert_close(uniform, (torch.where(a == -inf, 0.0, log_p.exp() * log_p)).sum(1) + math.log(3), dtype)


def test_a_certain_outcome_has_the_surprise_of_the_prior(device):
    prior = torch.tensor([[0.0, -200.0, 3.0, 1.0]], device=device)
    for k in range(4):
        for height in (200.0, 1e4, 1e30):
            a = torch.zeros(1, 4, device=device)
            a[0, k] = height
            kl = fgbg_cuda.categorical_kl(a, prior, reduction="none")
            assert_close(kl, -torch.log_softmax(prior.double(), 1)[:, k], torch.float32)


def test_one_outcome_is_no_choice(device):
    logits = _randn(3, 1, device=device).requires_grad_()
    kl = fgbg_cuda.categorical_kl(logits, logits.detach() - 3.0)
    assert kl == 0
    assert not torch.autograd.grad(kl, logits)[0].any()


def test_free_bits_of_zero_are_none(device):
    mu, logvar = (_randn(3, 4, device=device, seed=k) for k in range(2))
    assert_same(fgbg_cuda.gaussian_kl(mu, logvar, free_bits=0.0), fgbg_cuda.gaussian_kl(mu, logvar))
