"""Gaussian in the place of torch.distributions.Normal."""

import pytest
import torch
from compare import assert_close, assert_same
from torch.distributions import Independent, Normal, constraints, kl_divergence

import fgbg_cuda
from fgbg_cuda.distributions import Gaussian

OF_STD = {"std": lambda s: s, "log_std": torch.log, "logvar": lambda s: 2 * torch.log(s)}
WORDS = pytest.mark.parametrize("word", OF_STD)


def _pair(word, device, shape=(3, 4), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    mu, std = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(device)
    std = std.abs() + 0.2
    return Gaussian(mu, OF_STD[word](std), word, **options), Normal(mu, std)


@WORDS
@pytest.mark.parametrize("shape", [(), (4,), (3, 4)], ids=str)
def test_as_normal(word, shape, device):
    q, normal = _pair(word, device, shape)
    for name in ("mean", "mode", "variance", "stddev"):
        assert_close(getattr(q, name), getattr(normal, name), note=name)
    assert_close(q.entropy(), normal.entropy())
    assert (q.batch_shape, q.event_shape, q.has_rsample) == (normal.batch_shape, normal.event_shape, True)
    assert q.support is constraints.real
    for sample_shape in ((), (5,), (2, 3)):
        value = normal.sample(sample_shape)
        assert_close(q.log_prob(value), normal.log_prob(value))
        assert_close(q.cdf(value), normal.cdf(value))
        assert_close(q.icdf(q.cdf(value)), normal.icdf(normal.cdf(value)))
        for draw in (q.sample, q.rsample):
            assert draw(sample_shape).shape == value.shape
            assert draw(torch.Size(sample_shape)).dtype == value.dtype
    assert q.rsample((0,)).shape == (0, *shape)


@WORDS
@pytest.mark.parametrize("other", OF_STD)
def test_kl_against_itself_and_normal(word, other, device):
    (q, q_normal), (p, p_normal) = _pair(word, device), _pair(other, device, seed=1)
    expected = kl_divergence(q_normal, p_normal)
    for first, second in ((q, p), (q, p_normal), (q_normal, p)):
        assert_close(kl_divergence(first, second), expected)
    standard = Normal(torch.zeros((), device=device), 1.0)
    assert_close(kl_divergence(q, standard), kl_divergence(q_normal, standard))
    assert_close(kl_divergence(standard, q), kl_divergence(standard, q_normal))
    assert kl_divergence(q, q).abs().max() == 0
    row, _ = _pair(other, device, (4,), seed=2)
    assert kl_divergence(q, row).shape == kl_divergence(row, q).shape == (3, 4)
    scalar, _ = _pair(word, device, (), seed=3)
    assert kl_divergence(scalar, scalar).shape == ()


@WORDS
def test_gradients_pass_through(word, device):
    q, _ = _pair(word, device)
    mu, spread = (t.detach().clone().requires_grad_() for t in (q.mu, q.logvar))
    q = Gaussian(mu, spread, word)
    torch.manual_seed(3)
    z = q.rsample((6,))
    assert not q.sample().requires_grad
    loss = (
        (z**2).sum()
        + q.log_prob(z.detach()).sum()
        + kl_divergence(q, Normal(torch.zeros_like(mu), 2.0)).sum()
    )
    eps = ((z - mu) / q.stddev).detach()
    normal = Normal(mu, q.stddev)
    expected = ((mu + normal.scale * eps) ** 2).sum() + normal.log_prob(z.detach()).sum()
    expected = expected + kl_divergence(normal, Normal(torch.zeros_like(mu), 2.0)).sum()
    for a, e in zip(*(torch.autograd.grad(x, (mu, spread)) for x in (loss, expected)), strict=True):
        assert_close(a, e, operations=256)


@WORDS
def test_expand_and_independent(word, device):
    q, normal = _pair(word, device, (4,))
    wide, wide_normal = q.expand((3, 4)), normal.expand((3, 4))
    assert isinstance(wide, Gaussian)
    assert wide.parameterization == word
    value = wide_normal.sample((2,))
    assert_close(wide.log_prob(value), wide_normal.log_prob(value))
    a, b = Independent(wide, 1), Independent(wide_normal, 1)
    assert (a.batch_shape, a.event_shape) == ((3,), (4,))
    assert_close(a.log_prob(value), b.log_prob(value))
    assert_close(a.entropy(), b.entropy())
    assert_close(kl_divergence(a, a.expand((3,))), torch.zeros(3, device=device).double())
    assert a.rsample((5,)).shape == (5, 3, 4)


def test_arguments_are_checked(device):
    good = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="logvar"):
        Gaussian(good, -good, "std", validate_args=True)
    with pytest.raises(ValueError, match="mu"):
        Gaussian(good * torch.nan, good, validate_args=True)
    Gaussian(good, -good, "std", validate_args=False)
    Gaussian(good, 0 * good, "std", validate_args=True)
    with pytest.raises(ValueError, match="parameterization"):
        Gaussian(good, good, "sigma")
    with pytest.raises(TypeError, match="mu and logvar"):
        Gaussian(0.0, 0.0)
    q = Gaussian(good, good, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        q.log_prob(good * torch.nan)
    assert Gaussian(good, 0.0).logvar.shape == (3,)
    assert "std" in repr(Gaussian(good, good, "std"))


def test_torch_manual_seed_governs_samples(device):
    q, _ = _pair("logvar", device)
    torch.manual_seed(1)
    first = q.rsample((2,))
    torch.manual_seed(1)
    assert_same(q.rsample((2,)), first)
    assert not torch.isclose(q.rsample((2,)), first).any()


def test_half_precision(device):
    q = Gaussian(torch.zeros(5, device=device).bfloat16(), torch.zeros(5, device=device).bfloat16())
    assert q.rsample().dtype == torch.bfloat16
    assert kl_divergence(q, q).dtype == q.log_prob(q.sample()).dtype == torch.float32


def test_one_line_of_a_vae(device):
    """The worked example of docs/latents.md: another line than Normal, the same loss."""
    torch.manual_seed(0)
    encode, decode = torch.nn.Linear(6, 8).to(device), torch.nn.Linear(4, 6).to(device)
    x = torch.rand(32, 6, device=device)

    def loss(posterior):
        mu, raw = encode(x).chunk(2, 1)
        std = torch.nn.functional.softplus(raw)
        q = Independent(posterior(mu, std), 1)
        p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(std)), 1)
        log_likelihood = -((decode(q.rsample((2000,))) - x) ** 2).sum(-1).mean(0)
        return (kl_divergence(q, p) - log_likelihood).mean()

    ours = loss(lambda mu, std: fgbg_cuda.distributions.Gaussian(mu, std, "std"))
    torch.testing.assert_close(ours, loss(Normal), rtol=0.02, atol=0)
