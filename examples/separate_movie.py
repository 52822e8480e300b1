"""Real nuclei under simulated out-of-focus light: make a movie, train on it, separate it, score the result.

    python examples/separate_movie.py [--out runs/nuclei] [--minutes 3]

The nuclei and their true masks are those of a fluorescence micrograph (Data Science Bowl 2018, CC0) that the
package stardist ships; nothing is downloaded. In each frame of 64 x 64 pixels one nucleus drifts through the
light of others far out of focus: blurred, moving, adding up, and in places as bright as the nucleus. The
nuclei of the right half of the micrograph make the movie that the model is trained on, without masks; it is
scored on a movie of those of the left half, which it has never seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import numpy as np
import tifffile
import torch
from scipy.ndimage import gaussian_filter
from skimage.measure import regionprops

from fgbg_cuda.vae import ImagesDataModule, LayeredVAEModule
from fgbg_cuda.vae.figures import save_separation
from fgbg_cuda.vae.metrics import mask_dice, mask_iou, threshold_scores
from fgbg_cuda.vae.models import Separation

SIDE = 64  # of a frame, in pixels; a nucleus is about 25 long
BLACK, WHITE = 100, 3000  # what a camera of 12 bits would count for 0 and 1


def nuclei(half: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each whole nucleus of one half of the micrograph: its light above the surroundings, and its mask."""
    spec = importlib.util.find_spec("stardist")  # finds the package without importing it
    if spec is None:
        sys.exit('this example needs the nuclei that stardist ships: pip install "fgbg_cuda[examples]"')
    folder = Path(spec.submodule_search_locations[0], "data", "images")
    micrograph, labels = (tifffile.imread(folder / name) for name in ("img2d.tif", "mask2d.tif"))
    dark = np.median(micrograph[labels == 0])
    found = []
    for region in regionprops(labels):
        top, left, bottom, right = region.bbox
        at_border = top == 0 or left == 0 or bottom == labels.shape[0] or right == labels.shape[1]
        in_half = (right <= labels.shape[1] // 2) if half == "left" else (left >= labels.shape[1] // 2)
        if in_half and not at_border and region.area >= 200:
            light = np.where(region.image, micrograph[region.slice] - dark, 0).clip(0)
            found.append((light / np.median(light[region.image]), region.image))
    return found


def out_of_focus_light(cells: list, frames: int, rng: np.random.Generator) -> np.ndarray:
    """[frames, SIDE, SIDE], up to 0.6: a wide field of nuclei, far out of focus, through which one moves."""
    field = np.zeros((4 * SIDE, 4 * SIDE))
    for _ in range(120):
        light, _ = cells[rng.integers(len(cells))]
        row, column = rng.integers(0, 4 * SIDE - np.array(light.shape))
        field[row : row + light.shape[0], column : column + light.shape[1]] += light
    field = gaussian_filter(field, 10, mode="wrap")
    field = 0.6 * (field - field.min()) / np.ptp(field)
    where = np.cumsum(rng.normal(0, 1.5, (frames, 2)), axis=0).astype(int) + rng.integers(0, 4 * SIDE, 2)
    return np.stack([np.roll(field, tuple(-place), (0, 1))[:SIDE, :SIDE] for place in where])


def make_movie(half: str, frames: int, seed: int, frames_per_cell: int = 20) -> tuple[np.ndarray, ...]:
    """The movie (uint16), and the truth in [0, 1]: light of the nucleus, of the background, and the mask."""
    rng = np.random.default_rng(seed)
    cells = nuclei(half)
    background = out_of_focus_light(cells, frames, rng)
    foreground, mask = np.zeros_like(background), np.zeros(background.shape, bool)
    for start in range(0, frames, frames_per_cell):
        light, shape = cells[rng.integers(len(cells))]
        turns = rng.integers(4)
        light, shape = np.rot90(light, turns), np.rot90(shape, turns)
        brightness = rng.uniform(0.3, 0.5)
        room = SIDE - np.array(shape.shape)
        place = rng.uniform(0, room)
        for t in range(start, min(start + frames_per_cell, frames)):
            place = (place + rng.normal(0, 1, 2)).clip(0, room)
            rows, columns = (slice(int(p), int(p) + n) for p, n in zip(place, shape.shape, strict=True))
            foreground[t, rows, columns] = brightness * light
            mask[t, rows, columns] = shape
    counts = BLACK + (WHITE - BLACK) * (foreground + background + rng.normal(0, 0.02, foreground.shape))
    return counts.clip(0, 4095).round().astype(np.uint16), foreground, background, mask


def train(movie: Path, out: Path, minutes: float, epochs: int) -> Path:
    """Trains on the movie alone; returns the checkpoint."""
    L.seed_everything(0)
    data = ImagesDataModule(movie, intensity_range="auto", batch_size=32)
    trainer = L.Trainer(
        max_epochs=epochs,
        max_time=timedelta(minutes=minutes),
        gradient_clip_val=500.0,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(LayeredVAEModule(), datamodule=data)
    trainer.save_checkpoint(out / "nuclei.ckpt")
    return out / "nuclei.ckpt"


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/nuclei"))
    parser.add_argument("--minutes", type=float, default=5, help="stop training then")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--frames", type=int, default=2000)
    options = parser.parse_args(argv)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)

    tifffile.imwrite(out / "training.tif", make_movie("right", options.frames, seed=0)[0])
    movie, _, background, mask = make_movie("left", 400, seed=1)
    tifffile.imwrite(out / "movie.tif", movie)
    checkpoint = train(out / "training.tif", out, options.minutes, options.epochs)

    command = [
        sys.executable,
        "-m",
        "fgbg_cuda",
        "separate",
        checkpoint,
        out / "movie.tif",
        out / "layers",
        "--overwrite",
    ]
    print("$", *command)
    subprocess.run(command, check=True)

    def layer(name: str) -> torch.Tensor:
        return torch.from_numpy(tifffile.imread(out / "layers" / f"{name}.tif").astype(np.float32))[:, None]

    truth = torch.from_numpy(mask)[:, None]
    image, fg, bg = (
        (x - BLACK) / (WHITE - BLACK)
        for x in (
            torch.from_numpy(movie.astype(np.float32))[:, None],
            layer("foreground"),
            layer("background"),
        )
    )
    found = layer("mask") / 65535
    scores = {
        "mask IoU": mask_iou(found, truth).mean().item(),
        "mask Dice": mask_dice(found, truth).mean().item(),
        **{f"IoU of threshold, {name}": value for name, value in threshold_scores(image, truth).items()},
        "background RMSE": (bg[:, 0] - torch.from_numpy(background)).square().mean().sqrt().item(),
        "background RMSE if taken for the image": (image[:, 0] - torch.from_numpy(background))
        .square()
        .mean()
        .sqrt()
        .item(),
    }
    for name, value in scores.items():
        print(f"{name:<40} {value:.3f}")
    rows = slice(0, None, 50)
    save_separation(
        out / "separation.png",
        image[rows],
        Separation(fg, bg, found, found * fg + (1 - found) * bg)._make(
            x[rows] for x in (fg, bg, found, found * fg + (1 - found) * bg)
        ),
        truth[rows],
    )
    return scores


if __name__ == "__main__":
    main()
