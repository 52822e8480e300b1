"""One draw on the CPU keeps dz/dlogvar between forward and backward, which is turned into the gradient in
place. Whatever backward is asked for, the numbers must be those of the backward op, which makes the noise
again; it is taken where the graph of the derivative is wanted too."""

import pytest
import torch
from benchmarks.memory import peak_bytes
from compare import assert_same, cotangents, gradients
from samples import SAMPLES, each

import fgbg_cuda

SAMPLING = [s for s in SAMPLES if s.op in ("reparameterize", "sample_gaussian")]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def outputs_of(result):
    return (result,) if torch.is_tensor(result) else tuple(result)


def assert_all_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if gradient is None or expected[name] is None:
            assert gradient is expected[name], name
        else:
            assert_same(gradient, expected[name].detach(), name)


@pytest.mark.parametrize("dtype", DTYPES)
@each(SAMPLING)
def test_same_bits_as_the_backward_op(sample, dtype, device):
    """Also where but one of the outputs is used, and if the caller writes into what the first pass gave."""
    inputs = sample.inputs(device, dtype, grad=True)
    outputs = sample(inputs)
    expected = gradients(outputs, inputs, create_graph=True)
    kept = gradients(outputs, inputs, retain_graph=True)
    assert_all_same(kept, expected)
    for gradient in kept.values():
        gradient.fill_(7)
    assert_all_same(gradients(outputs, inputs), expected)
    with pytest.raises(RuntimeError, match="a second time"):
        gradients(outputs, inputs)
    for i in range(len(outputs)):
        alone = sample(inputs)[i : i + 1]
        expected = gradients(alone, inputs, create_graph=True, allow_unused=True)
        assert_all_same(gradients(alone, inputs, allow_unused=True), expected)


@each(SAMPLING)
def test_one_input_alone_gets_the_same_gradient(sample, device):
    everything = sample.inputs(device, torch.float32, grad=True)
    expected = gradients(sample(everything), everything, allow_unused=True)
    for name in expected:
        inputs = {n: t.detach().requires_grad_(n == name) for n, t in everything.items()}
        outputs = sample(inputs)
        if any(o.requires_grad for o in outputs) and expected[name] is not None:
            assert_same(gradients(outputs, inputs)[name], expected[name], name)


@pytest.mark.parametrize("mu_dtype", DTYPES)
@pytest.mark.parametrize("logvar_dtype", DTYPES)
def test_mixed_types_and_layouts(mu_dtype, logvar_dtype, device):
    torch.manual_seed(0)
    mu = torch.randn(6, 5, 3, device=device, dtype=mu_dtype).transpose(0, 2).requires_grad_()
    logvar = torch.randn(3, 1, 6, device=device, dtype=logvar_dtype).requires_grad_()
    inputs = {"mu": mu, "logvar": logvar}
    for op in (fgbg_cuda.reparameterize, fgbg_cuda.sample_gaussian):
        outputs = outputs_of(op(mu, logvar.expand(3, 5, 6), seed=3))
        again = gradients(outputs, inputs, retain_graph=True)
        assert_all_same(gradients(outputs, inputs), again)


@pytest.mark.not_emulated("its memory is not counted")
@pytest.mark.parametrize("op", [fgbg_cuda.reparameterize, fgbg_cuda.sample_gaussian])
def test_peak_memory_is_the_results(op, device):
    """z and the gradients, that of a plain sample's mu being what arrived; no tensor besides."""
    inputs = {n: torch.randn(64, 4096, device=device, requires_grad=True) for n in ("mu", "logvar")}
    upstream = cotangents(outputs_of(op(**inputs, seed=1)))

    def step():
        outputs = outputs_of(op(**inputs, seed=1))
        return outputs, torch.autograd.grad(outputs, inputs.values(), upstream)

    results = 2 if op is fgbg_cuda.reparameterize else 3
    found = peak_bytes(step, str(device)) / inputs["mu"].nbytes
    assert results <= found <= 1.02 * results


@pytest.mark.not_emulated("its memory is not counted")
@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_kept(wanted, device):
    """Nothing if logvar needs no gradient, nor on a GPU."""
    mu = torch.randn(64, 4096, device=device, requires_grad=True)
    logvar = torch.randn(64, 4096, device=device, requires_grad=wanted)
    results = []
    found = peak_bytes(lambda: results.append(fgbg_cuda.reparameterize(mu, logvar)), str(device))
    tensors = 1 + (wanted and device.type == "cpu")
    assert tensors <= found / mu.nbytes <= 1.02 * tensors
