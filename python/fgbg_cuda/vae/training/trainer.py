"""The trainer of every training: what ``fgbg fit``, ``fgbg demo`` and ``fgbg reproduce`` have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from .resume import AtomicCheckpointIO, LastCheckpoint, ResumeCheckpoint, ResumeState

DEFAULTS = {
    "gradient_clip_val": 500.0,  # nats per image are large numbers: this cuts the spikes alone
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def make_trainer(
    out: Path,
    name: str,
    seconds: float,
    *,
    callbacks: Iterable[Callback] = (),
    plugins: Iterable[Any] = (),
    **options: Any,
) -> L.Trainer:
    """A trainer whose run ends with the model in ``out/name``, and can be resumed from ``out/checkpoints``.

    Args:
        seconds: between two checkpoints to resume from: the most that a kill can cost.
        options: of Lightning's trainer; :data:`DEFAULTS` are those that differ from its own.
    """
    return L.Trainer(
        callbacks=[
            ResumeState(),
            *callbacks,
            LastCheckpoint(out / name),
            ResumeCheckpoint(out / "checkpoints", seconds),
        ],
        plugins=[AtomicCheckpointIO(), *plugins],
        **{**DEFAULTS, **options},
    )


def quiet() -> None:
    """Silences what is no news for who trains: deprecations between the libraries, and reused folders."""
    for message in (
        ".*LeafSpec.* is deprecated",
        "Checkpoint directory .* exists and is not empty",
        ".*does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=message)
