"""Movies and stills with the truth about their layers: each scene has one thing that makes separation hard.

Scenes are made, from a seed and from photographs that scikit-image ships; pictures come with packages.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ..errors import InputError


class Scene(NamedTuple):
    """A movie, or stills, and the truth; of cells also where each is and what it does."""

    frames: np.ndarray  # uint8 [T, H, W, C] (C 1 or 3), of cells and nuclei uint16
    mask: np.ndarray  # bool [T, H, W]: where the foreground is; of cells, where one is active
    # float32 [T, H, W, C] in the units of the frames, noise-free, objects left out; None: not known
    background: np.ndarray | None
    footprints: np.ndarray | None = None  # float32 [N, H, W], at most 1
    traces: np.ndarray | None = None  # float32 [N, T], what a cell adds where its footprint is 1


def _photograph(name: str, height: int, width: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A crop of a photograph, [height, width, channels] in [0, 1]."""
    import skimage.data

    image = getattr(skimage.data, name)().astype(np.float32) / 255
    if image.ndim == 2:
        tint = rng.uniform(0.7, 1, channels).astype(np.float32) if channels > 1 else np.ones(1, np.float32)
        image = image[..., None] * tint
    if image.shape[-1] != channels:
        image = image.mean(-1, keepdims=True)
    top, left = rng.integers(0, image.shape[0] - height + 1), rng.integers(0, image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def _smooth(shape: tuple[int, ...], sigma: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise with mean 0 and variance 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _warped(image: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The image [H, W, C] where each pixel (y, x) shows that at (y, x) + shift[:, y, x]."""
    grid = np.indices(image.shape[:2]).astype(np.float32) + shift
    return np.stack(
        [
            ndimage.map_coordinates(channel, grid, order=1, mode="reflect")
            for channel in np.moveaxis(image, -1, 0)
        ],
        -1,
    )


class _Object(NamedTuple):
    """An opaque object with a path of its own."""

    shape: np.ndarray  # bool [S, S]
    look: np.ndarray  # float32 [S, S, C]
    place: np.ndarray  # [T, 2], its centre


def _object(
    side: int, path: np.ndarray, tone: np.ndarray, texture: float, rng: np.random.Generator
) -> _Object:
    """A blob of about ``side`` pixels across, of one tone with some texture."""
    span = 2 * side
    y, x = (np.indices((span, span)) - (span - 1) / 2) / (side / 2)
    wobble = 0.25 * _smooth((span, span), (side / 4,) * 2, rng)
    aspect = rng.uniform(0.6, 1.6)
    shape = (y * aspect) ** 2 + (x / aspect) ** 2 < (1 + wobble) ** 2
    look = tone + texture * _smooth((span, span, len(tone)), (2, 2, 0), rng)
    return _Object(shape, look.astype(np.float32), path)


def _path(frames: int, height: int, width: int, speed: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth walk over the frame and a little beyond it, [T, 2]."""
    start = rng.uniform((-0.1 * height, -0.1 * width), (1.1 * height, 1.1 * width))
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.05, frames))
    walk = start + np.cumsum(speed * np.stack([np.sin(heading), np.cos(heading)], 1), 0)
    span = 1.2 * np.array([height, width])  # reflected at the ends, so that it comes back
    folded = np.mod(walk + 0.1 * np.array([height, width]), 2 * span)
    return np.where(folded > span, 2 * span - folded, folded) - 0.1 * np.array([height, width])


def _draw_object(frame: np.ndarray, mask: np.ndarray, thing: _Object, t: int) -> None:
    top, left = np.round(thing.place[t] - len(thing.shape) / 2).astype(int)
    side = len(thing.shape)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + side, frame.shape[0]), min(left + side, frame.shape[1])
    if y0 >= y1 or x0 >= x1:
        return
    part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    here = thing.shape[part]
    frame[y0:y1, x0:x1][here] = thing.look[part][here]
    mask[y0:y1, x0:x1] |= here


def _movie(background: np.ndarray, objects: list[_Object], noise: float, rng: np.random.Generator) -> Scene:
    """Objects over a background [T, H, W, C] in [0, 1], as a camera takes them."""
    frames = background.copy()
    mask = _draw(frames, objects)
    return _taken(frames, mask, background, noise, rng)


def _draw(frames: np.ndarray, objects: list[_Object]) -> np.ndarray:
    """Draws objects into frames [T, H, W, C], each over those before it: where they are, [T, H, W]."""
    mask = np.zeros(frames.shape[:3], bool)
    for t in range(len(frames)):
        for thing in objects:
            _draw_object(frames[t], mask[t], thing, t)
    return mask


def _taken(
    frames: np.ndarray, mask: np.ndarray, background: np.ndarray, noise: float, rng: np.random.Generator
) -> Scene:
    """Frames as a camera takes them: through a lens, with noise, in 8 bits."""
    frames, background = (ndimage.gaussian_filter(layer, (0, 0.6, 0.6, 0)) for layer in (frames, background))
    frames += noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return Scene(np.round(255 * frames.clip(0, 1)).astype(np.uint8), mask, 255 * background)


def _objects(
    count: int,
    background: np.ndarray,
    sides: tuple[int, int],
    rng: np.random.Generator,
    contrast: float = 0.3,
) -> list[_Object]:
    """Objects of both signs: half of them brighter than the background's middle tone, half darker."""
    frames, height, width, channels = background.shape
    middle = background.mean((0, 1, 2))
    things = []
    for k in range(count):
        side = int(rng.integers(sides[0], sides[1] + 1))
        sign = 1 if k % 2 else -1
        tone = middle + sign * contrast * rng.uniform(0.8, 1.4) + rng.normal(0, 0.05, channels)
        path = _path(frames, height, width, rng.uniform(0.6, 2.0), rng)
        things.append(_object(side, path, tone.clip(0.03, 0.97), 0.06, rng))
    return things


def _still(picture: np.ndarray, frames: int) -> np.ndarray:
    return np.broadcast_to(picture, (frames, *picture.shape)).copy()


def static(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """A fixed camera, and objects of 10 to 30 pixels brighter and darker than a textured background."""
    background = _still(_photograph("gravel", height, width, 3, rng), frames)
    return _movie(background, _objects(6, background, (10, 30), rng), 0.02, rng)


def small(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """As static, gray, with many objects of 5 to 8 pixels of low contrast."""
    background = _still(0.5 + 0.5 * (_photograph("grass", height, width, 1, rng) - 0.5), frames)
    return _movie(background, _objects(14, background, (5, 8), rng, 0.25), 0.02, rng)


def large(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """One object of a third of the frame, in a quarter of the frames, before swaying foliage."""
    picture = _photograph("grass", height, width, 3, rng)
    background = _sway(picture, frames, 1.5, rng)
    side = height // 2
    path = np.stack([np.full(frames, 0.65 * height), np.linspace(-3.2 * width, 1.0 * width, frames)], 1)
    tone = background.mean((0, 1, 2)) * rng.uniform(0.3, 1.6, 3)
    thing = _object(side, path, tone.clip(0.05, 0.95), 0.06, rng)
    return _movie(background, [thing], 0.015, rng)


def _sway(picture: np.ndarray, frames: int, pixels: float, rng: np.random.Generator) -> np.ndarray:
    height, width = picture.shape[:2]
    sigma = (height / 8, width / 8)
    fields = [np.stack([_smooth((height, width), sigma, rng) for _ in range(2)]) for _ in range(3)]
    rates = rng.uniform(0.05, 0.3, 3)
    phases = rng.uniform(0, 2 * np.pi, 3)
    t = np.arange(frames)[:, None]
    gains = pixels * np.sin(2 * np.pi * rates * t / 3 + phases) / np.sqrt(1.5)
    return np.stack(
        [_warped(picture, sum(g * f for g, f in zip(gain, fields, strict=True))) for gain in gains]
    )


def waving(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """Foliage that sways by up to some pixels behind objects."""
    background = _sway(_photograph("grass", height, width, 3, rng), frames, 1.5, rng)
    return _movie(background, _objects(4, background, (14, 36), rng), 0.015, rng)


def light(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """Light that grows and fades by a third, and a brighter spot of it that wanders."""
    picture = _photograph("brick", height, width, 1, rng)
    t = np.linspace(0, 1, frames, dtype=np.float32)
    gain = 1 + 0.25 * np.sin(2 * np.pi * (1.3 * t + rng.uniform()))
    x = np.linspace(-1, 1, width, dtype=np.float32)
    slope = 1 + 0.2 * np.sin(2 * np.pi * (0.7 * t + rng.uniform()))[:, None] * x
    background = (0.7 * picture * (gain[:, None] * slope)[:, None, :, None]).clip(0, 1)
    return _movie(background, _objects(5, background, (10, 26), rng), 0.02, rng)


def drift(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """A camera that drifts by a pixel and comes back."""
    picture = _photograph("gravel", height, width, 1, rng)
    t = np.linspace(0, 2 * np.pi, frames)
    shifts = np.stack([np.sin(t), np.cos(0.7 * t)], 1)
    grid = np.ones((2, height, width), np.float32)
    background = np.stack([_warped(picture, s[:, None, None].astype(np.float32) * grid) for s in shifts])
    return _movie(background, _objects(5, background, (10, 26), rng), 0.02, rng)


def stopping(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """Half of the objects come to a stop and stay for the last 35 % of the frames."""
    background = _still(_photograph("brick", height, width, 3, rng), frames)
    things = _objects(6, background, (12, 26), rng)
    stop = int(0.65 * frames)
    for thing in things[::2]:
        thing.place[stop:] = thing.place[stop].clip((15, 15), (height - 15, width - 15))
    return _movie(background, things, 0.02, rng)


def cells(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """Calcium imaging: cells that light up and decay, over vessels, neuropil that glows, and shot noise."""
    count, decay = height * width // 220, np.exp(-1 / 8)
    y, x = np.indices((height, width))
    footprints, traces = [], []
    for _ in range(count):
        cy, cx = rng.uniform((4, 4), (height - 4, width - 4))
        a, b, turn = rng.uniform(2.2, 3.5), rng.uniform(2.2, 3.5), rng.uniform(0, np.pi)
        u, v = (
            (y - cy) * np.cos(turn) + (x - cx) * np.sin(turn),
            (x - cx) * np.cos(turn) - (y - cy) * np.sin(turn),
        )
        footprints.append(np.exp(-0.5 * ((u / a) ** 2 + (v / b) ** 2) ** 1.5))
        spikes = (rng.uniform(size=frames) < rng.uniform(0.01, 0.03)) * rng.uniform(0.5, 1.5, frames)
        trace = np.zeros(frames)
        for t in range(frames):
            trace[t] = (trace[t - 1] * decay if t else 0) + spikes[t]
        traces.append(rng.uniform(0.05, 0.25) * trace)
    footprints, traces = (np.array(values, np.float32) for values in (footprints, traces))
    still = 0.3 + 0.06 * _smooth((height, width), (height / 6, width / 6), rng)
    vessels = ndimage.gaussian_filter(
        (np.abs(_smooth((height, width), (7, 7), rng)) < 0.08).astype(np.float32), 1.2
    )
    still = still * (1 - 0.4 * vessels)
    glow = 0.03 * _smooth((frames, height, width), (10, height / 8, width / 8), rng)
    background = (still + glow).clip(0.02).astype(np.float32)
    active = np.tensordot(traces.T, footprints, 1)
    shining = background + active
    shining += np.sqrt(0.0012 * shining) * rng.standard_normal(shining.shape, dtype=np.float32)
    scale = 4000
    return Scene(
        np.round(scale * shining.clip(0, 4)).astype(np.uint16)[..., None],
        active > 0.03,
        scale * background[..., None],
        footprints,
        scale * traces,
    )


def crowd(frames: int, height: int, width: int, rng: np.random.Generator) -> Scene:
    """Stills under uneven light: objects of 18 to 30 pixels, of a tone each, that touch and overlap."""
    things = []
    for _ in range(height * width // 1500):
        places = rng.uniform((0, 0), (height, width), (frames, 2))
        tone = rng.uniform(0.08, 0.5, 1)
        things.append(_object(int(rng.integers(18, 31)), places, tone, 0.02, rng))
    glow = _smooth((frames, height, width, 1), (0, height / 4, width / 4, 0), rng)
    background = (0.25 + 0.08 * glow).clip(0.02)
    shining = np.zeros_like(background)
    mask = _draw(shining, things)
    return _taken(background + shining, mask, background, 0.02, rng)


def nuclei() -> Scene:
    """A still of 512 x 512 pixels: the cell nuclei that the package stardist ships, with its own masks."""
    import tifffile

    stardist = find_spec("stardist")  # without importing it, which takes TensorFlow
    if stardist is None:
        raise InputError(
            'nuclei: needs the picture that stardist ships: pip install "fgbg_cuda[examples]", or choose '
            "other --scenes"
        )
    folder = Path(stardist.submodule_search_locations[0]) / "data" / "images"
    image, labels = (tifffile.imread(folder / name) for name in ("img2d.tif", "mask2d.tif"))
    return Scene(image[None, ..., None], labels[None] > 0, None)


def coins() -> Scene:
    """A still of 303 x 384 pixels: scikit-image's coins.

    For the truth stands what a watershed finds whose markers were set by hand, as in that package's tutorial
    on region-based segmentation.
    """
    from skimage import data, filters, segmentation

    image = data.coins()
    markers = np.where(image < 30, 1, 0) + np.where(image > 150, 2, 0)
    labels = segmentation.watershed(filters.sobel(image), markers)
    return Scene(image[None, ..., None], ndimage.binary_fill_holes(labels == 2)[None], None)


SCENES: dict[str, Callable[[int, int, int, np.random.Generator], Scene]] = {
    make.__name__: make for make in (static, small, large, waving, light, drift, stopping, cells, crowd)
}
PICTURES: dict[str, Callable[[], Scene]] = {"nuclei": nuclei, "coins": coins}


def make_scene(name: str, frames: int = 200, height: int = 120, width: int = 160, seed: int = 0) -> Scene:
    """The scene of that name, the same for the same arguments; one of the pictures is as it is, for any.

    Raises:
        InputError: the picture is not there.
    """
    if name in PICTURES:
        return PICTURES[name]()
    return SCENES[name](frames, height, width, np.random.default_rng([seed, list(SCENES).index(name)]))
