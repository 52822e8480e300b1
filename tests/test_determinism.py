"""The same inputs give the same bits: run to run, and for any number of threads."""

import pytest
import torch
from compare import gradients
from samples import SAMPLES, each, first_of_each_op

import fgbg_cuda


def _bits(sample, inputs):
    outputs = sample(inputs)
    return [*outputs, *gradients(outputs, inputs).values()]


def _large(sample, device):
    """Repeated to more than a thread's share of work, so that threads do take part."""
    made = {}
    full = next(iter(sample.tensors.values())).shape
    rank = max(len(m.shape) for m in sample.tensors.values())
    for name, t in sample.inputs(device, torch.float32, grad=True).items():
        grad, t = t.requires_grad, t.detach()
        if "target" not in sample.tensors and name != "seed" and t.dim() and rank > 1:  # it may be broadcast
            times = [1] * t.dim()
            times[-1] = 5000 if t.shape[-1] == full[-1] else 1
            times[0] *= 3 if t.dim() == rank and t.shape[0] == full[0] else 1
            t = t.repeat(times)
        elif t.dim() == rank or (name in ("target", "weight") and t.dim() == rank - 1 and "slots" in made):
            first, last = (n if t.shape[d] == full[d] else 1 for d, n in ((0, 3), (-1, 5000)))
            t = t.repeat(first, *[1] * (t.dim() - 2), last) if rank > 1 else t.repeat(30000)
        elif t.dim() > 1 or name == "weight" or (t.dim() == 1 and rank == 2):
            t = t.repeat(*[1] * (t.dim() - 1), 5000 if t.shape[-1] == full[-1] else 1)
        # Different numbers everywhere, or the order of a sum would not show.
        if t.dim() and t.is_floating_point():
            wiggle = 1 - 0.3 * torch.rand(t.shape, generator=torch.Generator().manual_seed(1))
            t = t * wiggle.to(device)
        made[name] = t.requires_grad_(grad)
    return made


@pytest.mark.not_emulated("torch's own sum of a CUDA tensor is that of the CPU there, which threads share")
@each(SAMPLES[::2])
def test_threads_change_no_bit(sample, device, threads):
    inputs = _large(sample, device)
    results = []
    for count in (1, 2, 4, 4):
        threads(count)
        results.append(_bits(sample, inputs))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"normalize": "area", "reduction": "none"}, {}], ids=str)
def test_threads_change_no_bit_of_one_large_image(options, device, threads):
    """A batch of one: nothing to split but the image itself."""
    generator = torch.Generator().manual_seed(0)
    fg, bg, target, mask = torch.rand(4, 1, 3, 400, 300, generator=generator).to(device)
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(fgbg_cuda.masked_reconstruction_loss(fg, bg, target, mask=mask, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(200_000, 1), (3, 200_000), (1000, 300)], ids=str)
def test_threads_change_no_bit_of_free_bits(shape, device, threads):
    """The floor stands between two reductions, each of which must keep its order."""
    mu, logvar = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(fgbg_cuda.gaussian_kl(mu, logvar, free_bits=0.5))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@each(first_of_each_op())
def test_deterministic_algorithms_mode(sample, device):
    """The mode neither refuses an op nor changes what it gives."""
    inputs = _large(sample, device)
    plain = _bits(sample, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        strict = _bits(sample, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(plain, strict, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 2, 28, 28), (2, 3, 37, 41), (2, 5, 64, 64)])
def test_the_loss_does_not_depend_on_what_is_asked_besides(shape, dtype):
    """Gradients of the images, of the scales, or the terms: on a CPU the sums are formed in one order."""
    torch.manual_seed(1)
    fg, bg, target = (torch.rand(shape, dtype=dtype) for _ in range(3))
    logits = torch.randn(shape[0], 1, *shape[2:], dtype=dtype)
    scales = torch.rand(shape[1]) + 0.2, torch.rand(()) + 0.2

    def loss(of_images=False, of_scales=False, return_terms=False):
        images = [t.clone().requires_grad_(of_images) for t in (fg, bg, logits)]
        fg_scale, bg_scale = (t.clone().requires_grad_(of_scales) for t in scales)
        result = fgbg_cuda.masked_reconstruction_loss(
            images[0], images[1], target, mask_logits=images[2], fg_scale=fg_scale, bg_scale=bg_scale,
            reduction="sample", return_terms=return_terms,
        )  # fmt: skip
        return result[0] if return_terms else result

    alone = loss()
    for asked in ({"of_images": True}, {"of_scales": True}, {"return_terms": True}):
        assert torch.equal(loss(**asked), alone), asked
