"""A VAE in plain PyTorch with our ops: it finds discs over a smooth background, and is shown no mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fgbg_cuda


def make_images(count: int, side: int = 32) -> tuple[Tensor, Tensor]:
    background = F.interpolate(0.7 * torch.rand(count, 1, 4, 4), size=(side, side), mode="bicubic")
    y, x = torch.arange(side).view(-1, 1), torch.arange(side)
    centre, radius = 8 + (side - 16) * torch.rand(2, count, 1, 1, 1), 4 + 3 * torch.rand(count, 1, 1, 1)
    mask = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    images = torch.where(mask, 0.6 + 0.3 * torch.rand(count, 1, 1, 1), background)
    return (images + 0.03 * torch.randn_like(images)).clamp(0, 1), mask


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        down = [m for i, o in ((1, 16), (16, 32), (32, 32)) for m in (nn.Conv2d(i, o, 4, 2, 1), nn.SiLU())]
        up = [m for i, o in ((32, 32), (32, 16)) for m in (nn.ConvTranspose2d(i, o, 4, 2, 1), nn.SiLU())]
        last = nn.ConvTranspose2d(16, 1, 4, 2, 1)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(512, 64))
        self.mask = nn.Sequential(nn.Linear(16, 512), nn.Unflatten(1, (32, 4, 4)), *up, last)
        self.tone = nn.Linear(16, 1)
        self.background = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4)))
        nn.init.constant_(self.tone.bias, 1.4)  # a bright start decides which layer is the foreground

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log p(x | z) of each image, [B], the KL (mean over the batch), both in nats, and mask logits."""
        z, kl = fgbg_cuda.sample_gaussian(*self.encoder(x).chunk(2, dim=1))
        z_fg, z_bg = z.chunk(2, dim=1)
        fg = torch.sigmoid(self.tone(z_fg))[:, :, None, None].expand_as(x)
        bg = torch.sigmoid(F.interpolate(self.background(z_bg), size=x.shape[-2:], mode="bicubic"))
        logits, options = self.mask(z_fg), {"fg_scale": 0.05, "bg_scale": 0.1, "reduction": "sample"}
        return fgbg_cuda.mixture_reconstruction_loss(fg, bg, x, mask_logits=logits, **options), kl, logits


def main(steps: int = 1000) -> None:
    torch.manual_seed(0)
    (images, _), (held_out, truth) = make_images(8000), make_images(500)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps + 1):
        nll, kl, _ = model(images[torch.randint(len(images), (64,))])
        optimizer.zero_grad()
        (nll.mean() + min(1.0, 3 * step / steps) * kl).backward()  # the KL's weight warms up
        optimizer.step()
        if step % (steps // 5) == 0:
            nll, kl, logits = model(held_out)
            (slope,) = torch.autograd.grad(nll.sum(), logits)  # of a mixture: prior less posterior
            found = torch.sigmoid(logits) - slope > 0.5
            iou = ((found & truth).sum((1, 2, 3)) / (found | truth).sum((1, 2, 3))).mean()
            print(f"step {step:4}, held-out images: ELBO {-(nll.mean() + kl):8.1f} nats, mask IoU {iou:.3f}")


if __name__ == "__main__":
    main()
