"""``fgbg demo``: train the layered VAE on digits over texture, and show it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from ..data.digits import BACKGROUNDS, DIGIT_SIDE, DigitsOnTexture
from ..evaluation.figures import save_separation
from ..evaluation.metrics import threshold_scores
from ..models.object_networks import ObjectNetworks
from ..training.modules import LayeredVAEModule
from ..training.resume import check_settings, newest_checkpoint
from ..training.trainer import make_trainer, quiet

CLOSING_SECONDS = 30  # scoring and drawing on a busy machine, kept back from the time limit


@dataclass
class DemoConfig:
    """Everything that decides a run. Results follow from it, as long as the limit is not hit."""

    background: str = "grass"
    size: int = 64
    seed: int = 0
    out: str = "runs/demo"
    max_minutes: float = 3.5
    epochs: int = 6
    train: int = 8000
    val: int = 200
    test: int = 500
    rows: int = 8
    width: int = 32
    checkpoint_seconds: float = 10.0  # between two checkpoints: the most that a kill can cost


# What a resumed run may change, as it does not decide the result.
FREE_ON_RESUME = {"out", "max_minutes", "rows", "checkpoint_seconds"}


def run(config: DemoConfig, resume: bool = False) -> dict:
    """Train, score and draw; returns what is written to ``metrics.json``.

    With ``resume``, a run that was killed or stopped by its time limit goes on from its last whole
    checkpoint under ``config.out``: on the CPU, with the same number of threads, to the bits it would have
    ended with. The time limit is one for the run's training as a whole.

    Raises:
        ResumeError: there is nothing to resume, or the run had other settings.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    started = time.monotonic()
    quiet()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = version = None
    if resume:
        checkpoint, version = _find_earlier_run(config)
    else:
        _forget_earlier_run(config)
    L.seed_everything(config.seed)
    data = DigitsOnTexture(config.background, config.size, config.seed, config.train, config.val, config.test)
    data.setup()
    module = LayeredVAEModule(networks=ObjectNetworks(width=config.width, tone="bright"))
    spent = time.monotonic() - started
    trainer = make_trainer(
        out,
        "layered_vae.ckpt",
        config.checkpoint_seconds,
        devices=1,
        max_epochs=config.epochs,
        # The limit is a safety net for slow machines; a run is meant to end by its epochs.
        max_time=timedelta(seconds=max(1.0, 60 * config.max_minutes - spent - CLOSING_SECONDS)),
        logger=TensorBoardLogger(out, name="tensorboard", version=version),
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    planned = int(config.epochs * len(data.train_dataloader()))
    scores = trainer.test(module, datamodule=data, verbose=False)[0]

    test = data.splits["test"]
    truth = test.alpha > 0.5
    module = module.cpu().eval()
    rows = slice(config.rows)
    image = test.image[rows]
    save_separation(out / "separation.png", image, module.model.separate(image), truth[rows])
    result = {
        "config": asdict(config),
        "test": {name.removeprefix("test/"): value for name, value in scores.items()},
        "threshold_iou": threshold_scores(test.image, truth),
        "steps": trainer.global_step,
        "steps_planned": planned,
        "seconds": round(time.monotonic() - started, 1),
        "device": str(trainer.strategy.root_device),
        "torch": torch.__version__,
    }
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _forget_earlier_run(config: DemoConfig) -> None:
    """Clears what an earlier run left to resume from, and notes the settings of this one."""
    shutil.rmtree(Path(config.out) / "checkpoints", ignore_errors=True)
    (Path(config.out) / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def _find_earlier_run(config: DemoConfig) -> tuple[Path, str | None]:
    """The checkpoint to resume from, and the name of the run's TensorBoard folder, if it has one."""
    out = Path(config.out)
    checkpoint = newest_checkpoint(out / "checkpoints")
    now = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    check_settings(now, json.loads((out / "config.json").read_text()), out)
    versions = sorted((out / "tensorboard").glob("version_*"), key=lambda path: path.stat().st_mtime)
    return checkpoint, versions[-1].name if versions else None


def table(result: dict) -> str:
    """The numbers of a run as a small table."""
    test, threshold, config = result["test"], result["threshold_iou"], result["config"]
    title = f"{config['test']} held-out images, digits on {config['background']}"
    rows = [
        ("ELBO", f"{test['elbo']:.1f}", "nats/image"),
        ("mask IoU", f"{test['iou']:.3f}", ""),
        ("mask Dice", f"{test['dice']:.3f}", ""),
        ("foreground MSE", f"{test['fg_mse']:.5f}", "inside the true mask"),
        ("background MSE", f"{test['bg_mse']:.5f}", "whole image, hidden part included"),
        ("IoU of Otsu's threshold", f"{threshold['otsu']:.3f}", ""),
        ("IoU of the best threshold", f"{threshold['oracle_global']:.3f}", "chosen on the truth"),
        ("IoU, best for each image", f"{threshold['oracle_per_image']:.3f}", "chosen on the truth"),
    ]
    lines = [title, "-" * 72, *(f"{name:<26} {value:>9}  {note}" for name, value, note in rows)]
    if result["steps"] < result["steps_planned"]:
        lines.append(
            f"Stopped by the time limit after {result['steps']} of {result['steps_planned']} "
            "steps: expect worse numbers than a full run's."
        )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fgbg demo", description=__doc__)
    parser.add_argument("--background", choices=BACKGROUNDS, default=DemoConfig.background)
    parser.add_argument("--size", type=int, choices=sorted(DIGIT_SIDE), default=DemoConfig.size)
    parser.add_argument("--seed", type=int, default=DemoConfig.seed)
    parser.add_argument("--out", type=os.path.expanduser, default=DemoConfig.out)
    parser.add_argument(
        "--max-minutes", type=float, default=DemoConfig.max_minutes, help="give up training then"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in OUT from its last checkpoint"
    )
    options = vars(parser.parse_args(argv))
    resume = options.pop("resume")
    config = DemoConfig(**options)
    result = run(config, resume)
    print(f"\n{table(result)}\n\n{result['seconds']:.0f} s on {result['device']}; see {config.out}/")
