"""Real nuclei under simulated out-of-focus light: make a movie, train on it, separate it, score the result.

    python examples/separate_movie.py

The nuclei and their true masks are those of a fluorescence micrograph (Data Science Bowl 2018) that the
package stardist ships; nothing is downloaded. In each frame of 64 x 64 pixels one nucleus, cut out along its
mask, drifts through the light of others far out of focus: blurred, moving, adding up, in places as bright as
the nucleus. The nuclei of the right half of the micrograph make the movie that the model is trained on,
without masks. It is scored on a movie of those of the left half, which it has never seen.

What to expect: the masks are found, well beyond what a threshold finds, and the background is estimated
behind the nucleus too. The foreground is one grey level for each nucleus; the texture inside is left out, as
that is this model's idea of a foreground. It takes a background that is too coarse to draw a nucleus: with
the default, which suits thinner objects, the background draws everything, and no nucleus is found. Frames
with many nuclei would take other networks.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import tifffile
import torch
from scipy.ndimage import gaussian_filter
from skimage.measure import regionprops

from fgbg_cuda.vae import ImagesDataModule, LayeredVAEModule, ObjectNetworks, Separation
from fgbg_cuda.vae.evaluation.figures import save_separation
from fgbg_cuda.vae.evaluation.metrics import background_mse, mask_dice, mask_iou, threshold_scores

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
    """[frames, SIDE, SIDE] in [0, 0.8]: a wide field of nuclei, far out of focus, through which one moves."""
    field = np.zeros((4 * SIDE, 4 * SIDE))
    for _ in range(120):
        light, _ = cells[rng.integers(len(cells))]
        row, column = rng.integers(0, 4 * SIDE - np.array(light.shape))
        field[row : row + light.shape[0], column : column + light.shape[1]] += light
    field = gaussian_filter(field, 16, mode="wrap")
    field = 0.8 * (field - field.min()) / np.ptp(field)
    where = np.cumsum(rng.normal(0, 1.5, (frames, 2)), axis=0).astype(int) + rng.integers(0, 4 * SIDE, 2)
    return np.stack([np.roll(field, tuple(-place), (0, 1))[:SIDE, :SIDE] for place in where])


def make_movie(half: str, frames: int, seed: int, frames_per_cell: int = 20) -> tuple[np.ndarray, ...]:
    """A movie [frames, SIDE, SIDE] as the camera counts it, and the truth: background light and mask."""
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
    return counts.clip(0, 4095).round().astype(np.uint16), background.astype(np.float32), mask


def train(movie: Path, checkpoint: Path, epochs: int, width: int) -> None:
    """Trains on the movie alone."""
    L.seed_everything(0)
    module = LayeredVAEModule(
        # The background is drawn with 2 x 2 values: light far out of focus, but no nucleus.
        networks=ObjectNetworks(width=width, bg_cell=SIDE // 2),
        fg_scale=0.1,  # how far the texture of a nucleus is from its one grey level
        fg_scale_start=0.15,
    )
    data = ImagesDataModule(movie, intensity_range="auto", batch_size=32)
    trainer = L.Trainer(
        max_epochs=epochs,
        gradient_clip_val=500.0,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(checkpoint)


def read(path: Path) -> torch.Tensor:
    """A stack as [T, 1, H, W], in what the camera counted."""
    return torch.from_numpy(tifffile.imread(path).astype(np.float32))[:, None]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/nuclei"), help="default: runs/nuclei")
    parser.add_argument("--frames", type=int, default=2000, help="of the training movie (default: 2000)")
    parser.add_argument("--epochs", type=int, default=16, help="default: 16")
    parser.add_argument("--width", type=int, default=16, help="channels of the networks (default: 16)")
    options = parser.parse_args(argv)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)

    tifffile.imwrite(out / "training.tif", make_movie("right", options.frames, seed=0)[0])
    movie, background, mask = make_movie("left", 400, seed=1)
    tifffile.imwrite(out / "movie.tif", movie)
    train(out / "training.tif", out / "nuclei.ckpt", options.epochs, options.width)

    command = ["separate", f"{out}/nuclei.ckpt", f"{out}/movie.tif", f"{out}/layers", "--overwrite"]
    print("$ fgbg", *command)
    subprocess.run([sys.executable, "-m", "fgbg_cuda", *command], check=True)

    image, fg, bg = (
        (read(path) - BLACK) / (WHITE - BLACK)
        for path in (out / "movie.tif", out / "layers" / "foreground.tif", out / "layers" / "background.tif")
    )
    found = read(out / "layers" / "mask.tif") / 65535
    mask, background = (torch.from_numpy(truth)[:, None] for truth in (mask, background))
    scores = {
        "mask IoU": mask_iou(found, mask).mean().item(),
        "mask Dice": mask_dice(found, mask).mean().item(),
        **{f"IoU of a threshold, {how}": value for how, value in threshold_scores(image, mask).items()},
        "background RMSE": background_mse(bg, background).mean().sqrt().item(),
        "background RMSE of the image itself": background_mse(image, background).mean().sqrt().item(),
    }
    for name, value in scores.items():
        print(f"{name:<40} {value:.3f}")
    layers = Separation(fg, bg, found, fg + (1 - found) * bg)
    shown = slice(0, None, 50)
    save_separation(
        out / "separation.png", image[shown], Separation(*(layer[shown] for layer in layers)), mask[shown]
    )
    print(f"see {out}/separation.png")
    return scores


if __name__ == "__main__":
    main()
