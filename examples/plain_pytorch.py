"""A foreground/background VAE in plain PyTorch: one's own networks and loop, the losses from fgbg_cuda.

Discs of an unknown gray level lie over a smooth background that is as bright in places. Nothing tells the
model where: it learns to take the two apart because that is the cheapest description of the images.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fgbg_cuda


def make_images(count: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 1, side, side] in [0, 1], and their true masks."""
    background = F.interpolate(torch.rand(count, 1, 4, 4), size=(side, side), mode="bicubic").clamp(0, 1)
    centre, radius = torch.rand(count, 2, 1, 1) * (side - 16) + 8, torch.rand(count, 1, 1) * 3 + 4
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2)[:, None]
    images = torch.where(mask, torch.rand(count, 1, 1, 1) * 0.3 + 0.6, background)
    return (images + 0.03 * torch.randn_like(images)).clamp(0, 1), mask


class VAE(nn.Module):
    def __init__(self, fg: int = 16, bg: int = 16) -> None:
        super().__init__()
        down = [m for i, o in ((1, 16), (16, 32), (32, 32)) for m in (nn.Conv2d(i, o, 4, 2, 1), nn.SiLU())]
        up = [m for i, o in ((32, 32), (32, 16)) for m in (nn.ConvTranspose2d(i, o, 4, 2, 1), nn.SiLU())]
        self.sizes = (fg, bg)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(512, 2 * (fg + bg)))
        self.mask = nn.Sequential(
            nn.Linear(fg, 512), nn.Unflatten(1, (32, 4, 4)), *up, nn.ConvTranspose2d(16, 1, 4, 2, 1)
        )
        self.tone = nn.Linear(fg, 1)
        self.background = nn.Sequential(nn.Linear(bg, 16), nn.Unflatten(1, (1, 4, 4)))
        nn.init.constant_(
            self.tone.bias, 1.4
        )  # the foreground starts bright: that decides which layer is which

    def forward(self, x: torch.Tensor):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fgbg_cuda.sample_gaussian(mu, logvar)  # one kernel; KL in nats per image
        z_fg, z_bg = z.split(self.sizes, dim=1)
        tone = torch.sigmoid(self.tone(z_fg))[:, :, None, None].expand_as(x)
        background = torch.sigmoid(F.interpolate(self.background(z_bg), size=x.shape[-2:], mode="bicubic"))
        return tone, background, self.mask(z_fg), kl


def main(steps: int = 1500) -> float:
    torch.manual_seed(0)
    (images, _), (held_out, truth) = make_images(8000), make_images(500)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps + 1):
        x = images[torch.randint(len(images), (64,))]
        fg, bg, logits, kl = model(x)
        nll = fgbg_cuda.mixture_reconstruction_loss(
            fg, bg, x, mask_logits=logits, fg_scale=0.05, bg_scale=0.07
        )
        optimizer.zero_grad()
        (nll + min(1.0, step / 500) * kl).backward()
        optimizer.step()
        if step % (steps // 5) == 0:
            found = model(held_out)[2] > 0
            iou = ((found & truth).sum((1, 2, 3)) / (found | truth).sum((1, 2, 3)).clamp(min=1)).mean().item()
            print(
                f"step {step:5}  negative ELBO {nll + kl:8.1f} nats/image  mask IoU, held out {iou:.3f}",
                flush=True,
            )
    return iou


if __name__ == "__main__":
    main()
