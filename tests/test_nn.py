"""The module forms: the functions, with options that survive copying."""

import copy
import pickle

import pytest
import torch
from compare import assert_same
from samples import SAMPLES, each

from fgbg_cuda import nn

MODULES = {
    "reparameterize": nn.Reparameterize,
    "gaussian_kl": nn.GaussianKL,
    "sample_gaussian": nn.SampleGaussian,
    "bernoulli_kl": nn.BernoulliKL,
    "masked_reconstruction_loss": nn.MaskedReconstructionLoss,
    "blended_reconstruction_loss": nn.BlendedReconstructionLoss,
    "mixture_reconstruction_loss": nn.MixtureReconstructionLoss,
}
# What changes from call to call goes to forward.
CALL_OPTIONS = ("seed", "offset", "generator", "bg", "prior_logits")


def _module(sample):
    """The sample's module, and what of its options goes to forward."""
    call = {k: v for k, v in sample.options.items() if k in CALL_OPTIONS}
    options = {k: v for k, v in sample.options.items() if k not in CALL_OPTIONS}
    return MODULES[sample.op](**options), call


def _flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for r in results for t in _flat(r)]


def test_every_op_has_a_module():
    assert {s.op for s in SAMPLES} == set(MODULES)
    assert {m.__name__ for m in MODULES.values()} == set(nn.__all__)


@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["itself", "deepcopy", "pickle"],
)
@each(SAMPLES[::3])
def test_module_is_its_function(sample, device, copied):
    module, call = _module(sample)
    inputs = sample.inputs(device)
    for actual, expected in zip(_flat(copied(module)(**inputs, **call)), sample(inputs), strict=True):
        assert_same(actual, expected)


@each(SAMPLES[::5])
def test_extra_repr_shows_the_options(sample):
    module, call = _module(sample)
    for name, value in sample.options.items():
        if name not in call:
            assert f"{name}={value!r}" in repr(module)


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda m: m.__name__)
def test_unknown_option(module):
    with pytest.raises(TypeError, match="reductoin"):
        module(reductoin="sum")


def test_module_has_no_parameters_of_its_own():
    """A learned scale belongs to the model that learns it."""
    for module in MODULES.values():
        assert not list(module().parameters())
        assert not module().state_dict()
