"""What lets a killed training go on as if nothing had happened: whole checkpoints and random state."""

from __future__ import annotations

import os
import random
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..errors import InputError, ResumeError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear under their name only when whole.

    Lightning's own writes to the system's temporary folder; from there to another file system a move is
    a copy, which a kill can cut in two.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("unfinished.tmp")  # one name: kills leave one such file at most
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
        os.replace(unfinished, path)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest model in the file ``path``: after each validation, and at the end in any case."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent, filename=path.stem, enable_version_counter=False)
        self.path = path

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)


class ResumeCheckpoint(ModelCheckpoint):
    """Keeps the two newest checkpoints of a run, so that one is left should the other get damaged.

    Args:
        folder: where they go, as ``step=000000123.ckpt``.
        seconds: time between two of them; 0 saves after every step.
    """

    def __init__(self, folder: str | Path, seconds: float) -> None:
        super().__init__(
            folder,
            filename="{step:09d}",  # the order of the names is the order of the steps
            monitor="step",
            mode="max",
            save_top_k=2,
            train_time_interval=timedelta(seconds=seconds),
            enable_version_counter=False,
        )

    # A checkpoint between the last batch of an epoch and its validation would resume after the
    # validation, which draws random numbers: the last batch's turn comes at the end of the epoch.
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_last_batch:  # and not cut short by a time limit
            super().on_train_batch_end(trainer, module, None, None, -1)


class ResumeState(Callback):
    """Restores what Lightning does not: the random generators and, at times, the place in the epoch.

    The state is made of tensors and plain numbers, so that ``weights_only=True`` can load it. The training
    loader should be a :class:`~fgbg_cuda.vae.data.loaders.ResumableLoader`.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002  (libraries draw from the global one)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict

    def _restore(self) -> None:
        if self.loaded is None:
            return
        torch.set_rng_state(self.loaded["torch"])
        torch.cuda.set_rng_state_all(self.loaded["cuda"][: torch.cuda.device_count()])
        name, keys, *rest = self.loaded["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        random.setstate(self.loaded["python"])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()
        if self.loaded is not None and not hasattr(trainer.train_dataloader, "load_state_dict"):
            warnings.warn("the loader of the training images starts anew, as it cannot resume", stacklevel=2)
        elif self.loaded is not None:
            # Lightning restores a loader as it makes it; one made before the checkpoint is read, for a
            # scheduler that asks for the number of steps, it forgets.
            trainer.train_dataloader.load_state_dict({"batches": trainer.fit_loop.batch_idx + 1})

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The loader draws a number when an epoch starts. Resumed within an epoch it draws one more than
        # the uninterrupted run did; at the start of an epoch that draw belongs to the run.
        if batch_idx > 0:
            self._restore()
        self.loaded = None

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()  # nothing was left to train: what comes after the training draws from here
        self.loaded = None


def read_checkpoint(path: str | Path, name: str) -> Any:
    """An entry of a checkpoint.

    Raises:
        InputError: the file is no whole checkpoint, or one without that entry.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)[name]
    except Exception as error:  # zip, pickle and key errors, each with a text of its own
        raise InputError(
            f"{path} cannot be read, expected a whole checkpoint of fgbg fit ({type(error).__name__})"
        ) from error


def newest_checkpoint(folder: str | Path, *others: Path) -> Path:
    """The newest whole checkpoint of a :class:`ResumeCheckpoint` in ``folder``, else one of the ``others``.

    Warns of each newer one that is truncated or corrupt.

    Raises:
        ResumeError: there is none.
    """
    found = [*sorted(Path(folder).glob("*.ckpt"), reverse=True), *(path for path in others if path.exists())]
    for path in found:
        try:
            with zipfile.ZipFile(path) as archive:  # torch.save writes a zip archive, with checksums
                damaged = archive.testzip() is not None
        except (zipfile.BadZipFile, EOFError, OSError):
            damaged = True
        if not damaged:
            return path
        warnings.warn(f"{path} is truncated or corrupt: resuming from the checkpoint before it", stacklevel=2)
    raise ResumeError(f"nothing to resume in {folder}: it holds {len(found)} checkpoints, none of them whole")


def check_settings(now: dict[str, Any], before: dict[str, Any], folder: Path, within: str = "") -> None:
    """Refuses to go on with the run in ``folder`` with settings other than those it was started with.

    Raises:
        ResumeError: naming the first that differs.
    """
    for name, value in now.items():
        was = before.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            check_settings(value, was, folder, f"{within}{name}.")
        elif value != was:
            raise ResumeError(
                f"{within}{name} is {value!r}, but the run in {folder} was started with {was!r}"
            )
