"""Derivatives of every sample against finite differences."""

import torch
from compare import assert_close, assert_same, cotangents
from samples import SAMPLES, each

import fgbg_cuda

SMOOTH = [s for s in SAMPLES if s.smooth]


def _check(check, sample, device, **options):
    inputs = sample.inputs(device, grad=True)
    names = [name for name, t in inputs.items() if t.requires_grad]
    fixed = {name: t for name, t in inputs.items() if not t.requires_grad}

    def function(*tensors):
        outputs = sample({**fixed, **dict(zip(names, tensors, strict=True))})
        return tuple(o for o in outputs if o.requires_grad)

    assert check(function, [inputs[n] for n in names], **options)


@each(SMOOTH)
def test_gradcheck(sample, device):
    _check(torch.autograd.gradcheck, sample, device)


@each(SMOOTH)
def test_gradgradcheck(sample, device):
    # fast_mode compares random projections of the Jacobian: the full one takes minutes here.
    _check(torch.autograd.gradgradcheck, sample, device, fast_mode=True)


def _products(outputs, inputs):
    """Hessian-vector products, and once more differentiated, of a nonlinear function of the outputs."""
    tensors = [t for t in inputs.values() if t.requires_grad]
    pairs = [(o, c) for o, c in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    value = sum((o * c).sum() for o, c in pairs)
    # A function of the value, so that the gradient that arrives at the op depends on the op's inputs.
    derivative = value.square() + value
    results = []
    for _ in range(3):
        grads = torch.autograd.grad(derivative, tensors, create_graph=True, materialize_grads=True)
        results.append(grads)
        derivative = sum((g * torch.cos(t.detach())).sum() for g, t in zip(grads, tensors, strict=True))
    return results


@each()
def test_higher_derivatives_of_a_function_of_the_loss(sample, device):
    """First, second and third derivatives against the specification's. gradgradcheck holds the upstream
    gradient fixed, and so cannot see what becomes of one that depends on the inputs itself."""
    inputs = sample.inputs(device, grad=True)
    actual = _products(sample(inputs), inputs)
    expected = _products(sample.expected(inputs), inputs)
    for order, (a_all, e_all) in enumerate(zip(actual, expected, strict=True), 1):
        largest = max(1.0, *(e.abs().max().item() for e in e_all))
        for a, e in zip(a_all, e_all, strict=True):
            # Relative to the largest of them: the square couples all. A chain of roundings for the loss,
            # which the square multiplies by, and one for each derivative. The backward op's derivative uses
            # the specification's noise, off by 2e-6 from the kernel's where a sample is drawn.
            noise = 0.0 if order == 1 or "seed" not in (*inputs, *sample.options) else 1e-5
            operations = 64 * (order + 1) + noise / torch.finfo(e.dtype).eps
            assert_close(a / largest, e / largest, operations=operations)


def test_what_arrives_at_a_draw_goes_on_to_mu(device):
    """Not copied, as in torch's own addition, unless mu is stored in another type."""
    mu, logvar, upstream = (torch.randn(5, 7, device=device) for _ in range(3))
    mu.requires_grad_()
    logvar.requires_grad_()
    z = fgbg_cuda.reparameterize(mu, logvar, seed=3)
    d_mu, d_logvar = torch.autograd.grad(z, (mu, logvar), upstream)
    assert d_mu.data_ptr() == upstream.data_ptr()
    assert_same(
        d_logvar, torch.autograd.grad(fgbg_cuda.reparameterize(mu, logvar, seed=3), logvar, upstream)[0]
    )

    half = mu.detach().bfloat16().requires_grad_()
    z = fgbg_cuda.reparameterize(half, logvar, seed=3)
    assert_same(torch.autograd.grad(z, half, upstream)[0], upstream.bfloat16())

    fgbg_cuda.reparameterize(mu, logvar, seed=3).sum().backward()
    assert_same(mu.grad, torch.ones_like(mu))
    mu.grad += 1  # it is mu's own, though what arrived had one element
