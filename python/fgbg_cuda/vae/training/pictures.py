"""Pictures of a model as it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from ..evaluation.figures import curves_figure, montage, overlay_figure, separation_figure, traversal_figure
from .modules import images_of


class Pictures(Callback):
    """Draws images of the first validation batch, into ``folder`` and into TensorBoard if that logs.

    Written are ``separation.png`` (the layers), ``overlay.png`` (outlines of the masks), ``traversal.png``
    (what each latent does; for models that have ``decode``), ``scene.png`` (what a model knows of its scene,
    if it has ``scene_pictures``: the background, its noise, how it changes) and ``curves.png`` (losses and
    scores), each over the one before; TensorBoard keeps them all. No random number is drawn.

    Args:
        folder: where to.
        every_n_epochs: how often; the last epoch is drawn in any case.
        rows: number of images.
    """

    def __init__(self, folder: str | Path, every_n_epochs: int = 10, rows: int = 8) -> None:
        self.folder, self.every_n_epochs, self.rows = Path(folder), every_n_epochs, rows

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        if batch_idx > 0 or not due or not trainer.is_global_zero or trainer.sanity_checking:
            return
        image = images_of(batch)
        chosen = torch.linspace(0, len(image) - 1, min(self.rows, len(image))).round().long()
        image = image[chosen]
        truth = getattr(batch, "mask", getattr(batch, "alpha", None))
        truth = None if truth is None else truth[chosen] > 0.5
        found = module.separate(image)
        self._write(trainer, "separation", separation_figure(image, found, truth))
        self._write(trainer, "overlay", overlay_figure(image, found.mask, truth))
        if hasattr(module.model, "scene_pictures"):
            pictures = module.model.scene_pictures()
            self._write(trainer, "scene", montage([list(pictures.values())], list(pictures)))
        if hasattr(module.model, "decode"):
            self._write(trainer, "traversal", traversal_figure(module.model, image[:1]))

    def _write(self, trainer: L.Trainer, name: str, figure: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{name}.png", dpi=120)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_figure(name, figure, trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero and (epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs):
            self._curves(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._curves(trainer)  # of a run that was stopped early too

    def _curves(self, trainer: L.Trainer) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        trainer.logger.save()
        if (figure := curves_figure(trainer.logger.log_dir)) is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / "curves.png", dpi=120)
