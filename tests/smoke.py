"""The installed package as its user has it, far from the sources: `make wheel` runs this on the wheel."""

from pathlib import Path

import torch

import fgbg_cuda

ROOT = Path(__file__).parents[1]
assert ROOT / "python" not in Path(fgbg_cuda.__file__).parents, "those are the sources"
print(fgbg_cuda.__version__, fgbg_cuda.build_info())

mu, logvar = (torch.randn(64, 16, requires_grad=True) for _ in range(2))
z, kl = fgbg_cuda.sample_gaussian(mu, logvar)
(kl + z.sum()).backward()
known = torch.distributions.kl_divergence(
    torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
)
torch.testing.assert_close(kl, known.sum(1).mean())
torch.testing.assert_close(mu.grad, 1 + mu.detach() / 64)

fg, bg, target = (torch.rand(8, 3, 16, 16, requires_grad=i < 2) for i in range(3))
mask = torch.rand(8, 1, 16, 16)
loss = fgbg_cuda.blended_reconstruction_loss(fg, bg, target, mask=mask, likelihood="squared_error")
known = (mask * fg + (1 - mask) * bg - target).square().sum() / 8
gradients = (torch.autograd.grad(of, (fg, bg)) for of in (loss, known))
torch.testing.assert_close(loss, known)
for ours, theirs in zip(*gradients, strict=True):
    torch.testing.assert_close(ours, theirs)
