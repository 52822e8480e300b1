"""A whole training step of a small layered VAE, Adam included: with our ops and with plain ones, eager and
compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fgbg_cuda

from .cases import image_functions, plain_sample_and_kl
from .checking import OPERATIONS, Disagreement, assert_near
from .memory import peak_bytes
from .peers import without_cache
from .timing import Effort, measure

LATENTS = 32
LAYERS = 8


def _block(layer: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.GroupNorm(4, width), nn.SiLU())


class SmallVAE(nn.Module):
    """Images [B, C, H, W] (H, W multiples of 4) -> posterior [B, LATENTS]; latents -> layers and mask."""

    def __init__(self, channels: int, side: int, width: int = 32) -> None:
        super().__init__()
        self.channels, self.low = channels, (2 * width, side // 4, side // 4)
        features = 2 * width * (side // 4) ** 2
        self.encoder = nn.Sequential(
            _block(nn.Conv2d(channels, width, 4, stride=2, padding=1), width),
            _block(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), 2 * width),
            nn.Flatten(),
            nn.Linear(features, 2 * LATENTS),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, features),
            nn.Unflatten(1, self.low),
            _block(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), width),
            nn.ConvTranspose2d(width, 2 * channels + 1, 4, stride=2, padding=1),
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def layers(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fg, bg, logits = self.decoder(z).split((self.channels, self.channels, 1), dim=1)
        return fg, bg, logits


OUR_NLL, PLAIN_NLL = image_functions("mixture", "gaussian")


def our_loss(model: SmallVAE, x: Tensor) -> Tensor:
    z, kl = fgbg_cuda.sample_gaussian(*model.posterior(x))
    return OUR_NLL(*model.layers(z), x) + kl


def plain_loss(model: SmallVAE, x: Tensor) -> Tensor:
    z, kl = plain_sample_and_kl(*model.posterior(x))
    return PLAIN_NLL(*model.layers(z), x) + kl


Loss = Callable[[SmallVAE, Tensor], Tensor]


def _losses(compiled: bool) -> dict[str, Loss]:
    losses: dict[str, Loss] = {"ours": our_loss, "eager": plain_loss}
    if compiled:
        torch._dynamo.reset()
        losses["compile"] = torch.compile(plain_loss, fullgraph=True, dynamic=False)
        losses["ours, compiled"] = torch.compile(our_loss, fullgraph=True, dynamic=False)
    return losses


def _check(losses: dict[str, Loss], model: SmallVAE, x: Tensor) -> None:
    """The same loss and gradients from every version, where the posterior is so narrow (standard deviation
    e^-30) that the noise, which differs, is rounded away."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.encoder[-1].bias[LATENTS:] -= 60
    parameters = list(model.parameters())
    expected = None
    for name, loss in losses.items():
        with torch.backends.cudnn.flags(allow_tf32=False):
            value = loss(model, x)
            found = [value, *torch.autograd.grad(value, parameters)]
        if expected is None:
            expected = [t.detach().double() for t in found]
        # The roundings of one op, for each layer and each of the two sides compared.
        eps = 2 * LAYERS * OPERATIONS * torch.finfo(x.dtype).eps
        try:
            assert_near("number", found, expected, [eps * e.abs().max().item() for e in expected])
        except Disagreement as error:
            raise Disagreement(f"the training step of {name} differs from ours: {error}") from None


def _step(loss: Loss, model: SmallVAE, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, x).backward()
        optimizer.step()

    return step


def training_step(size: tuple[int, ...], device: str, effort: Effort, compiled: bool) -> dict:
    x = torch.rand(size, device=device)
    model = SmallVAE(size[1], size[-1]).to(device)
    losses = _losses(compiled)
    _check(losses, model, x)
    steps = {name: _step(loss, copy.deepcopy(model), x) for name, loss in losses.items()}
    if device == "cpu":
        steps["ours, no cache"] = without_cache(_step(our_loss, copy.deepcopy(model), x))
    for step in steps.values():
        step()  # the optimizer's state is made in the first step
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    times = measure(steps, device, effort)
    return {
        "op": "training step",
        "size": list(size),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "perfect_bytes": None,
        "peers": {name: {**times[name], "peak_bytes": peaks[name]} for name in steps},
    }
