"""What torch does to functions: torch.func, forward-mode AD, checkpointing, export, CUDA graphs."""

import pytest
import torch
from compare import assert_close, assert_same, gradients
from samples import SAMPLES, each, first_of_each_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fgbg_cuda
from fgbg_cuda import reference

# The reference's noise is exact and the kernels' is not: 2e-6 of a sigma, so much of each z.
NOISE_ERROR = 2e-6
SMOOTH = [s for s in SAMPLES if s.smooth]


def _close(actual, expected, note=""):
    """float64 accuracy, but for the noise."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    bound = 1e-12 + NOISE_ERROR * (1 + expected.abs())
    assert bool((error <= bound).all()), f"{note}: off by {error.max()}"


def _scalar(sample, inputs):
    """One number that depends on every element of every output."""
    return sum(
        (o * torch.arange(1, o.numel() + 1, device=o.device).view(o.shape)).sum() for o in sample(inputs)
    )


def _split(sample, device):
    """(float inputs, the rest)."""
    inputs = sample.inputs(device)
    floats = {n: t for n, t in inputs.items() if t.is_floating_point()}
    return floats, {n: t for n, t in inputs.items() if n not in floats}


@each(SMOOTH[::2])
def test_func_grad(sample, device):
    """torch.func.grad takes the specification's path: same numbers as backward through the kernels."""
    floats, rest = _split(sample, device)
    actual = torch.func.grad(lambda f: _scalar(sample, {**f, **rest}))(floats)
    leaves = {n: t.clone().requires_grad_() for n, t in floats.items()}
    loss = _scalar(sample, {**leaves, **rest})
    for name, expected in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        _close(actual[name], expected, name)


@each(SMOOTH[1::2])
def test_vmap(sample, device):
    """A vmapped call is the stack of the calls; all lanes share the seed they are given."""
    floats, rest = _split(sample, device)
    lanes = {n: torch.stack([t, 1.1 * t, 0.9 * t]) for n, t in floats.items()}
    actual = torch.func.vmap(lambda f: sample({**f, **rest}))(lanes)
    for k in range(3):
        expected = sample({**{n: t[k] for n, t in lanes.items()}, **rest})
        for a, e in zip(actual, expected, strict=True):
            _close(a[k], e)


@each(SMOOTH[::3])
def test_jvp_and_forward_mode(sample, device):
    """Forward mode, by torch.func and by dual tensors, against <gradient, tangent> of reverse mode."""
    floats, rest = _split(sample, device)
    tangents = {n: torch.cos(t) for n, t in floats.items()}
    value, derivative = torch.func.jvp(lambda f: _scalar(sample, {**f, **rest}), (floats,), (tangents,))
    leaves = {n: t.clone().requires_grad_() for n, t in floats.items()}
    loss = _scalar(sample, {**leaves, **rest})
    grads = torch.autograd.grad(loss, list(leaves.values()))
    expected = sum((g * t).sum() for g, t in zip(grads, tangents.values(), strict=True))
    # Sums of up to a thousand numbers, each off by the noise.
    for a, e in ((value, loss), (derivative, expected)):
        assert abs(a - e) <= 1000 * NOISE_ERROR * (1 + abs(e))
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(t, tangents[n]) for n, t in floats.items()}
        unpacked = forward_ad.unpack_dual(_scalar(sample, {**duals, **rest}))
    _close(unpacked.primal, value)
    _close(unpacked.tangent, derivative)


@each(first_of_each_op())
def test_hessian_and_jacrev(sample, device):
    """torch.func's second derivatives against double backward through the kernels."""
    floats, rest = _split(sample, device)
    name = next(iter(floats))
    others = {n: t for n, t in floats.items() if n != name}

    def loss(x):
        # The square makes every second derivative depend on the first.
        return _scalar(sample, {name: x, **others, **rest}) ** 2 / 100

    actual = torch.func.hessian(loss)(floats[name])
    expected = torch.autograd.functional.hessian(loss, floats[name])
    scale = 1 + expected.abs().max()
    assert ((actual - expected).abs() <= 100 * NOISE_ERROR * scale).all()
    jacobian = torch.func.jacrev(lambda x: sample({name: x, **others, **rest}))(floats[name])
    expected = torch.autograd.functional.jacobian(lambda x: sample({name: x, **others, **rest}), floats[name])
    for a, e in zip(jacobian, expected, strict=True):
        _close(a, e)


def test_per_sample_gradients(device):
    """vmap over grad, the reason for which people use torch.func."""
    layer = torch.nn.Linear(5, 6).to(device).double()
    parameters = dict(layer.named_parameters())
    x = torch.randn(4, 5, device=device).double()

    def loss(parameters, x):
        mu, logvar = torch.func.functional_call(layer, parameters, (x[None],)).chunk(2, 1)
        z, kl = fgbg_cuda.sample_gaussian(mu, logvar, seed=3)
        return kl + z.square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        layer.zero_grad()
        loss(parameters, x[i]).backward()
        for name, p in parameters.items():
            _close(grads[name][i], p.grad, name)


def test_noise_under_transforms_is_the_fused_noise(device):
    mu, logvar = torch.zeros(2, 3, 5, device=device, dtype=torch.float64)
    fused = fgbg_cuda.reparameterize(mu, logvar, seed=9, offset=2, num_samples=2)
    _, vjp = torch.func.vjp(lambda m: fgbg_cuda.reparameterize(m, logvar, seed=9, num_samples=2), mu)
    z, _ = torch.func.vjp(lambda m: fgbg_cuda.reparameterize(m, logvar, seed=9, offset=2, num_samples=2), mu)
    _close(z, fused)
    assert_same(vjp(torch.ones_like(fused))[0], torch.full_like(mu, 2.0))


def test_meta_tensors_have_the_shapes(device):
    """A device without kernels takes the specification: shapes and types come out."""
    for sample in SAMPLES:
        real = sample(sample.inputs(device, torch.float32))
        for r, m in zip(real, sample(sample.inputs("meta", torch.float32)), strict=True):
            assert (r.shape, r.dtype) == (m.shape, m.dtype), sample.id


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, device):
    """Recomputation draws the noise of the first pass, though no seed was given."""

    def block(h):
        mu, logvar = h.chunk(2, 1)
        z, kl = fgbg_cuda.sample_gaussian(mu, logvar)
        return fgbg_cuda.reparameterize(z, logvar) ** 2 + kl

    h = torch.randn(4, 10, device=device, requires_grad=True)
    torch.manual_seed(5)
    plain = block(h)
    (expected,) = torch.autograd.grad(plain.sum(), h)
    torch.manual_seed(5)
    recomputed = checkpoint(block, h, use_reentrant=use_reentrant)
    recomputed.sum().backward()
    assert_same(recomputed, plain)
    assert_same(h.grad, expected)


class _Autoencoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = torch.nn.Linear(12, 8)
        self.decode = torch.nn.Linear(4, 36)

    def forward(self, x):
        mu, logvar = self.encode(x.flatten(1)).chunk(2, 1)
        z, kl = fgbg_cuda.sample_gaussian(mu, logvar)
        fg, bg, mask_logits = self.decode(z).view(-1, 3, 3, 4).unbind(1)
        loss = fgbg_cuda.mixture_reconstruction_loss(
            fg[:, None], bg[:, None], x, mask_logits=mask_logits[:, None], likelihood="laplace"
        )
        return z, loss + kl


@pytest.mark.not_emulated("traced with the ops of the CPU")
def test_export(device, tmp_path):
    """A model that samples, exported, saved, loaded: samples anew at each call, and right."""
    model, x = _Autoencoder().to(device), torch.rand(5, 1, 3, 4, device=device)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert {"fgbg.sample_gaussian.default", "fgbg.reconstruction_loss.default"} <= names
    for batch in (5, 3):
        torch.manual_seed(1)
        actual = loaded(x[:batch])
        torch.manual_seed(1)
        for a, e in zip(actual, model(x[:batch]), strict=True):
            assert_close(a, e)
        assert not torch.isclose(loaded(x[:batch])[0], actual[0]).any()


@each([s for s in SAMPLES if "free_bits" not in s.options][::3])
def test_tracers_record_the_op(sample, device):
    """torch.jit.trace and make_fx, not what happens inside it."""
    inputs = sample.inputs(device)
    others = {n: t * 1.1 if t.is_floating_point() and n != "mask" else t for n, t in inputs.items()}

    def function(*tensors):
        return sample(dict(zip(inputs, tensors, strict=True)))

    traced = torch.jit.trace(function, tuple(inputs.values()), check_trace=False)
    recorded = make_fx(function)(*inputs.values())
    for call in (traced, recorded):
        for a, e in zip(call(*others.values()), sample(others), strict=True):
            assert_same(a, e)


def test_fake_tensors_outside_their_mode(device):
    """They carry it along; a number given beside them has to become one of them."""
    with FakeTensorMode() as mode:
        x = torch.rand(2, 3, 4, device=device)
    loss = fgbg_cuda.masked_reconstruction_loss(x, x, x, mask=x, fg_weight=0.5, fg_scale=0.25)
    kl = fgbg_cuda.bernoulli_kl(x, 0.3, reduction="none")
    assert (loss.shape, kl.shape, kl.fake_mode) == ((), x.shape, mode)


def test_hooks_and_retained_graphs(device):
    """Backward twice through one graph: nothing is freed or drawn in between."""
    inputs = SAMPLES[0].inputs(device, grad=True)
    outputs = SAMPLES[0](inputs)
    first = gradients(outputs, inputs, retain_graph=True)
    for name, second in gradients(outputs, inputs).items():
        assert_same(second, first[name])


def test_inputs_changed_in_place_are_noticed(device):
    """The saved inputs are versioned: a stale gradient would be a silent error."""
    mu = torch.zeros(2, 3, device=device, requires_grad=True)
    logvar = torch.zeros(2, 3, device=device)
    kl = fgbg_cuda.gaussian_kl(mu, logvar)
    logvar.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


def test_no_grad_makes_no_graph(device):
    x = torch.zeros(2, 3, device=device, requires_grad=True)
    with torch.no_grad():
        assert not fgbg_cuda.gaussian_kl(x, x).requires_grad
    with torch.inference_mode():
        assert fgbg_cuda.reparameterize(x, x).shape == x.shape


def test_several_draws_store_no_noise(device):
    """eps is made again from the seed: the inputs are all that they keep."""
    mu = torch.randn(4, 300, device=device, requires_grad=True)
    logvar = torch.randn(4, 300, device=device, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fgbg_cuda.reparameterize(mu, logvar, num_samples=8)
    known = {mu.data_ptr(), logvar.data_ptr()}
    assert all(t.data_ptr() in known or t.numel() == 1 for t in saved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graph(device):
    """A captured training step replays with new inputs and, from a seed tensor, new noise."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for CUDA")
    mu = torch.randn(8, 33, device=device, requires_grad=True)
    logvar = torch.randn(8, 33, device=device, requires_grad=True)
    seed = torch.tensor([1], device=device)

    def step():
        z, kl = fgbg_cuda.sample_gaussian(mu, logvar, seed=seed)
        return z, *torch.autograd.grad(kl + z.square().sum(), (mu, logvar))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    for value in (1, 2):
        seed.fill_(value)
        with torch.no_grad():
            mu.normal_()
        graph.replay()
        for a, e in zip(static, step(), strict=True):
            assert_same(a, e)


def test_reference_is_what_transforms_use(device):
    """The path is taken by what is active, not by luck."""
    mu = torch.zeros(2, 3, device=device, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "gaussian_kl", lambda *_: mu.sum() + 42)
        assert torch.func.vmap(lambda m: fgbg_cuda.gaussian_kl(m, m))(mu)[0] == 42
        assert fgbg_cuda.gaussian_kl(mu, mu) == 0
