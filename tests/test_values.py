"""Results and first gradients of every sample against the specification in float64."""

import pytest
import torch
from compare import assert_close, gradients
from samples import SAMPLES, each

import fgbg_cuda


def test_every_public_op_has_samples():
    helpers = {"ReconstructionTerms", "importance_weighted_bound", "philox_normal"}
    assert {s.op for s in SAMPLES} == set(fgbg_cuda.functional.__all__) - helpers


def test_sample_names_are_unique():
    assert len({s.id for s in SAMPLES}) == len(SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each()
def test_value(sample, device, dtype):
    inputs = sample.inputs(device, dtype)
    actual, expected = sample(inputs), sample.expected(inputs)
    assert len(actual) == len(expected)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == dtype
        assert a.device.type == device.type
        assert_close(a, e, note=f"output {k}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each()
def test_first_gradients(sample, device, dtype):
    """Every float input gets a gradient, of its own dtype, and it is the specification's."""
    inputs = sample.inputs(device, dtype, grad=True)
    actual = gradients(sample(inputs), inputs)
    expected = gradients(sample.expected(inputs), inputs)
    for name, gradient in actual.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected[name], note=name)


@each()
def test_each_gradient_alone(sample, device):
    """A gradient does not depend on which others are asked for, but for a rounding where the forward pass
    cannot write them all."""
    inputs = sample.inputs(device, grad=True)
    together = gradients(sample(inputs), inputs)
    for name, gradient in together.items():
        alone = {n: t.detach() for n, t in inputs.items()}
        alone[name].requires_grad_()
        assert_close(gradients(sample(alone), alone)[name], gradient, operations=4, note=name)
