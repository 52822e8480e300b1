"""Training the layered VAE with Lightning."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from .data import Batch
from .metrics import background_mse, foreground_mse, mask_dice, mask_iou
from .models import LayeredOutput, LayeredVAE, Separation


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the message says through which term, and where."""


def image_of(batch: Any) -> Tensor:
    """The images [B, C, H, W] of a batch: itself, or its first field. The others are for scoring."""
    return batch if isinstance(batch, Tensor) else batch[0]


class LayeredVAEModule(L.LightningModule):
    """Maximises the ELBO of a :class:`LayeredVAE`; the truth in a batch is used for scores alone.

    Two warm-ups, both over before training ends, so that what is reported is the plain ELBO: the
    KL's weight rises from 0 to 1, and the foreground's scale falls from ``fg_scale_start`` to
    ``fg_scale`` (a tight scale from the start leaves no gradient towards the right tone).

    Args:
        channels, fg_latents, bg_latents, width, fg_scale, bg_cell: as in :class:`LayeredVAE`.
        fg_scale_start: the foreground scale of the first step.
        lr: peak of the one-cycle learning rate (Adam).
        kl_warmup, scale_warmup: their lengths, as fractions of the training.
        model: a :class:`LayeredVAE` with networks of your own in place of the default. It is no
            hyperparameter: give it again to ``load_from_checkpoint``.
    """

    def __init__(
        self,
        channels: int = 1,
        fg_latents: int = 8,
        bg_latents: int = 2,
        width: int = 32,
        fg_scale: float = 0.035,
        fg_scale_start: float = 0.07,
        lr: float = 2e-3,
        kl_warmup: float = 0.2,
        scale_warmup: float = 0.5,
        bg_cell: int = 8,
        model: LayeredVAE | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model or LayeredVAE(channels, fg_latents, bg_latents, width, fg_scale, bg_cell)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.noise_seed = torch.initial_seed()
        names = ("elbo", "iou", "dice", "fg_mse", "bg_mse")
        self.scores = torch.nn.ModuleDict({name: MeanMetric() for name in names})

    def forward(self, x: Tensor) -> Tensor:
        """The posterior mask of x [B, C, H, W]: [B, 1, H, W]."""
        return self.model.separate(x).mask

    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, C, H, W] in [0, 1]."""
        return self.model.separate(x)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        h = self.hparams
        done = self.global_step / self.trainer.estimated_stepping_batches
        progress = min(1.0, done / h.scale_warmup)
        self.model.fg_scale.fill_(h.fg_scale_start * (h.fg_scale / h.fg_scale_start) ** progress)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = image_of(batch)
        out = self.model(x, **self._noise(x, batch_idx))
        reconstruction = self.model.reconstruction(out, x).mean()
        kl_fg, kl_bg = out.kl_fg.mean(), out.kl_bg.mean()
        steps = self.hparams.kl_warmup * self.trainer.estimated_stepping_batches
        weight = min(1.0, (self.global_step + 1) / max(1.0, steps))
        loss = reconstruction + weight * (kl_fg + kl_bg)
        if not torch.isfinite(loss):
            term = self._non_finite_term(out, x)
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.global_step}, batch {batch_idx} of epoch "
                f"{self.current_epoch}: {term}"
            )
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log_dict(
            {
                "train/reconstruction": reconstruction,
                "train/kl_fg": kl_fg,
                "train/kl_bg": kl_bg,
                "train/fg_scale": self.model.fg_scale.mean(),
                "train/bg_scale": self.model.log_bg_scale.exp().mean(),
            },
            sync_dist=True,
        )
        return loss

    def _noise(self, x: Tensor, batch_idx: int) -> dict[str, int]:
        """The noise of x [B, C, H, W], this process's part of a batch: its part of the batch's noise.

        It follows from the seed that torch had when the module was made, the epoch and the batch: not from
        how many processes there are, nor from what else draws random numbers. Validation has the same
        noise every time.
        """
        epoch = 1 + self.current_epoch if self.training else 0
        (seed,) = np.random.SeedSequence([self.noise_seed, epoch, batch_idx]).generate_state(1, np.uint64)
        first = self.global_rank * len(x)
        if not self.training and self.trainer.world_size > 1:  # the last batch may not divide evenly
            sizes = self.all_gather(torch.tensor(len(x), device=x.device))
            first = int(sizes[: self.global_rank].sum())
        return {"seed": int(seed) >> 2, "first": first}

    def _non_finite_term(self, out: LayeredOutput, x: Tensor) -> str:
        """Where a non-finite value first shows, in the order in which it would spread."""
        terms = {
            "the image itself": x,
            "the KL of the foreground latents": out.kl_fg,
            "the KL of the background latents": out.kl_bg,
            "the foreground": out.foreground,
            "the background": out.background,
            "the mask (mask_logits)": out.mask_logits,
            "the foreground scale": self.model.fg_scale,
            "the background scale": self.model.log_bg_scale.exp(),
        }
        for name, value in terms.items():
            if not torch.isfinite(value).all():
                return f"{name} has NaN or infinite values"
        return "the reconstruction overflows, though both layers and the mask are finite"

    def _score(self, batch: Any, batch_idx: int) -> None:
        x = image_of(batch)
        out = self.model(x, **self._noise(x, batch_idx))
        scores = {"elbo": -(self.model.reconstruction(out, x) + out.kl_fg + out.kl_bg)}
        truth = getattr(batch, "alpha", getattr(batch, "mask", None))
        if truth is not None:
            found = self.model.separate(x)
            scores |= {"iou": mask_iou(found.mask, truth), "dice": mask_dice(found.mask, truth)}
        if isinstance(batch, Batch):
            scores |= {
                "fg_mse": foreground_mse(found.foreground, batch.tone, truth),
                "bg_mse": background_mse(found.background, batch.background),
            }
        for name, value in scores.items():
            self.scores[name].update(value)

    def _report(self, stage: str) -> None:
        for name, metric in self.scores.items():
            if metric.update_called:
                self.log(f"{stage}/{name}", metric.compute(), prog_bar=name == "iou")
                metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes what it takes to separate images with this checkpoint and nothing else."""
        describe = getattr(self.trainer.datamodule, "describe", dict)
        checkpoint["separation"] = {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            **describe(),
        }
        checkpoint["noise_seed"] = self.noise_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noise_seed = checkpoint["noise_seed"]

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.hparams.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.15,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
