"""Training models of one scene with Lightning."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, at_least, positive, whole
from ..models.calcium import CalciumModel, CalciumOutput
from ..models.scene import SceneOutput, SceneVAE
from .modules import SeparationModule


class MovieModule(SeparationModule):
    """What training has in common for models of one scene; not a model in itself.

    The model starts from whole frames of the training set, spread over the movie, which the data module
    gives: ``frames(count) -> [N, C, H, W]``.
    """

    start_frames: int

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.trainer.precision.endswith("16-true"):
            raise InputError(
                f"trainer.precision is {self.trainer.precision}, but what is known of a scene is solved for "
                "in 32 bits: expected 32-true, bf16-mixed or 16-mixed"
            )
        data = self.trainer.datamodule
        if not hasattr(data, "frames"):
            raise InputError(
                f"{type(data).__name__} has no method frames, which a model of a scene starts from: "
                "expected ImagesDataModule, or one that has it"
            )
        # Of a run that is resumed, what is found here gives way to what the checkpoint holds.
        self.model.start(data.frames(self.how_many(data.frames(1)[0])))

    def how_many(self, frame: Tensor) -> int:
        """How many frames like this one [C, H, W] the model starts from, if the movie has as many."""
        return self.start_frames


class SceneModule(MovieModule):
    """Minimises the loss of a :class:`SceneVAE` on the frames of one movie.

    Args:
        lr: peak of the one-cycle learning rate (Adam).
        background_lr: the background's, as a part of it. It starts near where it should be; one that learns
            fast takes in objects that stop.
        kl_warmup: for how much of the training, a fraction, the weight of the KLs rises.
        window: side in pixels of the square of a larger frame that a step is about: its time and memory are
            then nearly those of frames of this size. The ELBO of the validation is one of such squares too.
        model_options: those of :class:`SceneVAE`.

    Warns where frames are so large that the background is found from few of them.
    """

    start_frames = 200
    start_values = 2**28  # in all; finding the background takes ten times their memory
    few_frames = 40

    def __init__(
        self,
        lr: float = 3e-3,
        background_lr: float = 0.07,
        kl_warmup: float = 0.2,
        window: int = 256,
        **model_options: Any,
    ) -> None:
        at_least(0, kl_warmup=kl_warmup, background_lr=background_lr)
        whole(1, window=window)
        positive(lr=lr)
        super().__init__(SceneVAE(**model_options))
        self.save_hyperparameters()

    def objective(self, out: SceneOutput, batch: Any, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        evidence = self.model.evidence(out)
        terms = {
            "reconstruction": self.model.reconstruction(out, evidence).mean(),
            "tone": self.model.tone_loss(out, evidence).mean(),
            "kl_fg": out.kl_fg.mean(),
            "kl_mask": self.model.mask_kl(out).mean(),
        }
        kl = kl_weight * (terms["kl_fg"] + terms["kl_mask"])
        return terms["reconstruction"] + terms["tone"] + kl, terms

    def elbo(self, out: SceneOutput, x: Tensor) -> Tensor:
        nats = self.model.reconstruction(out, self.model.evidence(out))
        return -(nats + out.kl_fg + self.model.mask_kl(out))

    def how_many(self, frame: Tensor) -> int:
        count = max(self.model.least_frames, min(self.start_frames, self.start_values // frame.numel()))
        if count < self.few_frames:
            warnings.warn(
                f"frames of {' x '.join(map(str, frame.shape))} are so large that the background is found "
                f"from only {count} of them",
                stacklevel=2,
            )
        return count

    def _sampling(self, x: Tensor, batch_idx: int) -> dict[str, int]:
        return super()._sampling(x, batch_idx) | {"window": self.hparams.window}

    def suspects(self, out: SceneOutput, x: Tensor) -> dict[str, Tensor]:
        return {
            "the background": out.background,
            "the KL of the foreground latents": out.kl_fg,
            "the mask (mask_logits)": out.mask_logits,
        }

    def _adam(self) -> torch.optim.Adam:
        background = [self.model.mean, self.model.components]
        known = {id(parameter) for parameter in background}
        networks = [parameter for parameter in self.parameters() if id(parameter) not in known]
        lr = self.hparams.lr
        return torch.optim.Adam(
            [{"params": networks}, {"params": background, "lr": self.hparams.background_lr * lr}],
            lr,
            betas=(0.9, 0.99),
        )


class CalciumModule(MovieModule):
    """Learns the footprints of a :class:`CalciumModel` from whole frames of one movie.

    Args:
        lr: peak of the one-cycle learning rate (Adam).
        model_options: those of :class:`CalciumModel`.
    """

    start_frames = 500

    def __init__(self, lr: float = 1e-3, **model_options: Any) -> None:
        positive(lr=lr)
        super().__init__(CalciumModel(**model_options))
        self.save_hyperparameters()

    def objective(self, out: CalciumOutput, batch: Any, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.model.reconstruction(out).mean()
        return loss, {"reconstruction": loss}

    def elbo(self, out: CalciumOutput, x: Tensor) -> Tensor:
        """log p(activity | cells), with the traces that explain it best: no bound on log p(x)."""
        return -self.model.reconstruction(out)

    def suspects(self, out: CalciumOutput, x: Tensor) -> dict[str, Tensor]:
        return {"the activity": out.activity, "the cells": out.cells}
