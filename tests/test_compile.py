"""torch.compile: no graph break, the eager numbers and strides, dynamic shapes, and samples that stay
independent."""

import pytest
import torch
from compare import assert_close, assert_same, gradients
from samples import SAMPLES, covering, each, first_of_each_op
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import fgbg_cuda

pytestmark = pytest.mark.not_emulated("compiled graphs are traced with the ops of the CPU")

LAYOUTS = {
    3: torch.contiguous_format,
    4: torch.channels_last,
    5: torch.channels_last_3d,
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(function, backend, **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def _dense(inputs, memory_format):
    """The inputs with those of four (five) dimensions in the memory format."""
    return {
        n: t.detach()
        .contiguous(
            memory_format=memory_format if t.dim() == _rank(memory_format) else torch.contiguous_format
        )
        .requires_grad_(t.requires_grad)
        for n, t in inputs.items()
    }


def _rank(memory_format):
    return {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, -1)


@each(covering(SAMPLES))
def test_aot_eager(sample, device):
    """Values, gradients and strides are those of eager execution, contiguous and channels_last."""
    compiled = _compile(lambda inputs: sample(inputs), "aot_eager")
    made = sample.inputs(device, grad=True)
    image = max(t.dim() for t in made.values())
    formats = {torch.contiguous_format, LAYOUTS.get(image, torch.contiguous_format)}
    for memory_format in formats:
        inputs = _dense(made, memory_format)
        actual, expected = compiled(inputs), sample(inputs)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)
            assert a.stride() == e.stride()
        actual, expected = gradients(actual, inputs), gradients(expected, inputs)
        for name, gradient in actual.items():
            assert_close(gradient, expected[name], note=name)
            assert gradient.stride() == expected[name].stride()


@each(first_of_each_op())
def test_inductor(sample, device):
    inputs = sample.inputs(device, torch.float32, grad=True)
    actual = _compile(lambda inputs: sample(inputs), "inductor")(inputs)
    expected = sample(inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
        assert a.stride() == e.stride()
    actual, expected = gradients(actual, inputs), gradients(expected, inputs)
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], note=name)


def _repeat(t, full, batch, last, target=False):
    """More of the same along the first and the last dimension, where it has those of `full`. (The target of
    slots has a dimension less.)"""
    times = [1] * t.dim()
    if t.dim() == len(full) or target:
        times[0] = batch
    if t.dim() == len(full) or (t.dim() and t.shape[-1] == full[-1]):
        times[-1] = last
    return t.repeat(times)


@each([s for s in first_of_each_op() if len(next(iter(s.tensors.values())).shape) > 1])
def test_dynamic_shapes(sample, device):
    """One graph serves every batch size and last extent. (By default torch takes sizes that happen to be
    equal at first, such as batch and channels, for the same size, and traces again when they differ.)"""
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        _check_dynamic_shapes(sample, device)


def _check_dynamic_shapes(sample, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = _compile(lambda inputs: sample(inputs), counter, dynamic=True)
    made = sample.inputs(device, grad=True)
    full = next(iter(made.values())).shape
    traced = 0
    for batch, last in ((1, 1), (3, 1), (2, 4)):
        inputs = {
            n: _repeat(t.detach(), full, batch, last, n == "target").requires_grad_(t.requires_grad)
            for n, t in made.items()
        }
        actual, expected = compiled(inputs), sample(inputs)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)
        actual, expected = gradients(actual, inputs), gradients(expected, inputs)
        for name, gradient in actual.items():
            assert_close(gradient, expected[name], note=name)
        # The first call may take more than one attempt, when a float option turns out to be a constant.
        traced = traced or counter.frame_count
    assert counter.frame_count == traced


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_samples_differ(backend, device):
    """An op that drew its own randomness would be merged with its twin: here it must not be. And the
    backward pass must see the noise of the forward pass, not draw anew."""

    def two(mu, logvar):
        a = fgbg_cuda.reparameterize(mu, logvar)
        b = fgbg_cuda.reparameterize(mu, logvar)
        c, _ = fgbg_cuda.sample_gaussian(mu, logvar)
        d, _ = fgbg_cuda.sample_gaussian(mu, logvar)
        return a, b, c, d

    mu = torch.randn(4, 8, device=device)
    logvar = torch.randn(4, 8, device=device).requires_grad_()
    compiled = _compile(two, backend)
    first, second = compiled(mu, logvar), compiled(mu, logvar)
    drawn = [*first, *second]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            # All numbers of two merged samples would be equal; of independent ones, hardly any.
            assert torch.isclose(a, b).sum() <= 1
    for z in first:
        (gradient,) = torch.autograd.grad(z.sum(), logvar, retain_graph=True)
        assert_close(gradient, 0.5 * (z - mu))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_manual_seed_governs_compiled_samples(backend, device):
    compiled = _compile(fgbg_cuda.reparameterize, backend)
    mu, logvar = torch.zeros(3, 5, device=device), torch.zeros(3, 5, device=device)
    draws = []
    for function in (compiled, compiled, fgbg_cuda.reparameterize):
        torch.manual_seed(11)
        draws.append(function(mu, logvar))
    assert_same(draws[0], draws[1])
    assert_same(draws[0], draws[2])


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_inside_a_compiled_function(transform, device):
    """The traced op has no rule for a transform; it must not be reached, and silently drop a tangent."""
    x, logvar = torch.randn(2, 3, 4, device=device)

    def kl(x):
        return fgbg_cuda.gaussian_kl(x, logvar)

    function = {
        "grad": torch.func.grad(kl),
        "vmap": torch.func.vmap(lambda row: fgbg_cuda.gaussian_kl(row[None], logvar[:1])),
        "jvp": lambda x: torch.func.jvp(kl, (x,), (x,))[1],
    }[transform]
    expected = {
        "grad": x / 3,
        "vmap": torch.stack([fgbg_cuda.gaussian_kl(row[None], logvar[:1]) for row in x]),
        "jvp": (x**2).sum() / 3,
    }[transform]
    assert_close(_compile(function, "aot_eager")(x), expected)


@pytest.mark.parametrize("plain_first", [True, False])
def test_forward_mode_over_a_compiled_function(plain_first, device):
    """What was traced without tangents is not run with them: the op would silently drop them."""
    x, logvar = torch.randn(2, 3, 4, device=device)
    compiled = _compile(lambda x: fgbg_cuda.gaussian_kl(x, logvar), "aot_eager")
    if plain_first:
        compiled(x)
    with forward_ad.dual_level():
        unpacked = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, x)))
    assert_close(unpacked.tangent, (x**2).sum() / 3)
    assert_close(compiled(x), fgbg_cuda.gaussian_kl(x, logvar))


def test_philox_normal_compiles(device):
    seed = torch.tensor([3], device=device)

    def noise(seed, like):
        return fgbg_cuda.philox_normal(seed, (2, *like.shape), offset=7, dtype=like.dtype)

    like = torch.empty(3, 5, device=device, dtype=torch.float64)
    assert_same(_compile(noise, "aot_eager", dynamic=True)(seed, like), noise(seed, like))


def _images(device):
    fg, bg, target = (torch.rand(2, 3, 4, 5, device=device, requires_grad=True) for _ in range(3))
    return {"fg": fg, "bg": bg, "target": target, "mask_logits": torch.randn(2, 1, 4, 5, device=device)}


def _latents(device, *names):
    return {name: torch.randn(4, 5, device=device, requires_grad=True) for name in names}


# (function, its tensors, the name of the number, other options)
NUMBERS = [
    (fgbg_cuda.masked_reconstruction_loss, _images, "fg_weight", {}),
    (fgbg_cuda.masked_reconstruction_loss, _images, "bg_weight", {"reduction": "none"}),
    (fgbg_cuda.masked_reconstruction_loss, _images, "bg_weight", {"normalize": "area"}),
    (fgbg_cuda.masked_reconstruction_loss, _images, "fg_weight", {"normalize": "area", "reduction": "none"}),
    (fgbg_cuda.masked_reconstruction_loss, _images, "fg_scale", {"likelihood": "laplace"}),
    (fgbg_cuda.masked_reconstruction_loss, _images, "bg_scale", {"return_terms": True}),
    (fgbg_cuda.blended_reconstruction_loss, _images, "scale", {}),
    (fgbg_cuda.mixture_reconstruction_loss, _images, "bg_scale", {"reduction": "sample"}),
    (fgbg_cuda.bernoulli_kl, lambda device: _latents(device, "logits"), "prior_logits", {}),
    (fgbg_cuda.gaussian_kl, lambda device: _latents(device, "mu", "logvar"), "free_bits", {}),
    (fgbg_cuda.gaussian_kl, lambda device: _latents(device, "mu", "logvar"), "prior_mu", {}),
    (fgbg_cuda.gaussian_kl, lambda device: _latents(device, "mu", "logvar", "prior_mu"), "prior_logvar", {}),
    (
        fgbg_cuda.sample_gaussian,
        lambda device: _latents(device, "mu", "logvar"),
        "prior_logvar",
        {"seed": 1, "parameterization": "std"},
    ),
    (
        fgbg_cuda.gaussian_log_prob,
        lambda device: _latents(device, "z", "mu"),
        "logvar",
        {"parameterization": "std"},
    ),
    (fgbg_cuda.gaussian_log_prob, lambda device: _latents(device, "z"), "mu", {"reduction": "sample"}),
    (fgbg_cuda.sample_gaussian, lambda device: _latents(device, "mu", "logvar"), "free_bits", {"seed": 1}),
]


def _id(value):
    if callable(value):
        return value.__name__.strip("_<>")
    return value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("function", "tensors", "name", "options"), NUMBERS, ids=_id)
def test_a_number_that_changes(function, tensors, name, options, backend, device):
    """A schedule of ten values: one graph for the first, one for all others."""
    counter = CompileCounterWithBackend(backend)
    compiled = _compile(lambda inputs, value: function(**inputs, **{name: value}, **options), counter)
    inputs = tensors(device)
    for step in range(10):
        value = 0.3 + 0.07 * step
        found, expected = compiled(inputs, value), function(**inputs, **{name: value}, **options)
        found, expected = _leaves(found), _leaves(expected)
        for f, e in zip(found, expected, strict=True):
            assert_close(f, e)
        found, expected = (gradients(r, inputs, allow_unused=True) for r in (found, expected))
        for n, gradient in found.items():
            assert_close(gradient, expected[n], note=n)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("values", [(0.0, 0.5, 0.25, 0.0, 0.1), (0.5, 0.25, 0.0, 0.0, 0.75)])
@pytest.mark.parametrize("function", [fgbg_cuda.gaussian_kl, fgbg_cuda.sample_gaussian])
def test_a_schedule_of_free_bits_that_is_zero_at_times(function, values, device):
    """A graph for the first value and one for all others; at 0 the value is the KL."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = _compile(lambda inputs, value: _kl(function, inputs, free_bits=value), counter)
    inputs = _latents(device, "mu", "logvar")
    for value in values:
        found, expected = compiled(inputs, value), _kl(function, inputs, free_bits=value)
        assert_close(found, expected)
        found, expected = gradients([found], inputs), gradients([expected], inputs)
        for name, gradient in found.items():
            assert_close(gradient, expected[name], note=name)
    assert counter.frame_count <= 2


def _kl(function, inputs, **options):
    if function is fgbg_cuda.sample_gaussian:
        return function(**inputs, seed=1, **options)[1]
    return function(**inputs, **options)


def _leaves(results):
    return [results] if torch.is_tensor(results) else [t for r in results for t in _leaves(r)]


@pytest.mark.parametrize("values", [(0.5, 1.0, 0.25, 2.0, 1.0), (1.0, 0.5, 1.0, 3.0)])
def test_a_scale_of_one_is_a_scale(values, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = _compile(fgbg_cuda.blended_reconstruction_loss, counter)
    inputs = _images(device)
    for value in values:
        found = compiled(**inputs, scale=value)
        assert_close(found, fgbg_cuda.blended_reconstruction_loss(**inputs, scale=value))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("seed", True),
        ("offset", True),
        ("offset", -1),
        ("num_samples", 1.5),
        ("num_samples", 0),
    ],
)
def test_bad_integers_fail_while_tracing(name, value, device):
    compiled = _compile(fgbg_cuda.reparameterize, "aot_eager")
    with pytest.raises(Exception, match=rf"{name} (is|must be)"):
        compiled(**_latents(device, "mu", "logvar"), **{name: value})


def test_bad_numbers_fail_while_tracing(device):
    for value in (-1.0, float("nan"), "1", None):
        compiled = _compile(fgbg_cuda.masked_reconstruction_loss, "aot_eager")
        with pytest.raises(Exception, match=r"fg_scale (is|must be)"):
            compiled(**_images(device), fg_scale=value)


def test_bad_arguments_fail_while_tracing(device):
    x = torch.randn(2, 3, 4, device=device)
    compiled = _compile(lambda x: fgbg_cuda.masked_reconstruction_loss(x, x, x, mask=x[:, :2]), "aot_eager")
    with pytest.raises(Exception, match="mask has shape"):
        compiled(x)
