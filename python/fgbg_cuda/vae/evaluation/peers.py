"""Classical methods that find what moves, lights up or stands out: what a model has to beat.

Each takes a movie or stills as float32 [T, H, W, C] in [0, 1]. Those of ``MASKS`` and, for stills,
``THRESHOLDS`` give masks, bool [T, H, W]; those of ``ACTIVITIES`` what cells add, float [T, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from scipy import ndimage

from ..models.local_tones import SPREAD


def median_and_mad(movie: np.ndarray) -> np.ndarray:
    """A Gaussian about each pixel's median against a uniform density, over windows of 5 x 5 pixels."""
    middle = np.median(movie, axis=0)
    noise = np.maximum(SPREAD * np.median(np.abs(movie - middle), axis=0), 0.02)
    log_p = -0.5 * ((movie - middle) / noise) ** 2 - np.log(noise * np.sqrt(2 * np.pi))
    evidence = np.clip(-log_p.sum(-1), -6, 6)
    return ndimage.uniform_filter(evidence, (1, 5, 5)) > 0


def mog2(movie: np.ndarray) -> np.ndarray:
    """OpenCV's mixture of Gaussians (Zivkovic, 2004), on its second pass; a 7 x 7 median."""
    import cv2

    return _subtracted(movie, cv2.createBackgroundSubtractorMOG2(history=len(movie), detectShadows=False))


def knn(movie: np.ndarray) -> np.ndarray:
    """OpenCV's k nearest neighbours (Zivkovic & van der Heijden, 2006), as :func:`mog2`."""
    import cv2

    return _subtracted(movie, cv2.createBackgroundSubtractorKNN(history=len(movie), detectShadows=False))


def _subtracted(movie: np.ndarray, subtractor) -> np.ndarray:
    frames = np.round(255 * movie).astype(np.uint8)
    for frame in frames:
        subtractor.apply(frame)
    masks = np.stack([subtractor.apply(frame) for frame in frames])
    return ndimage.median_filter(masks, (1, 7, 7)) > 0


def robust_pca(movie: np.ndarray, steps: int = 40) -> np.ndarray:
    """Where a low-rank background is off by a tenth (Candès et al., 2011), after a 3 x 3 median.

    By inexact augmented Lagrange multipliers (Lin et al., 2010).
    """
    data = movie.reshape(len(movie), -1)
    weight, size = 1 / np.sqrt(max(data.shape)), np.linalg.norm(data, 2)
    sparse, multiplier = np.zeros_like(data), data / max(size, np.abs(data).max() / weight)
    penalty = 1.25 / size
    for _ in range(steps):
        full = data - sparse + multiplier / penalty
        # Singular vectors by way of the frames, of which there are fewer than pixels.
        squares, u = np.linalg.eigh(full @ full.T)
        s = np.sqrt(squares.clip(min=1e-12))
        low = (u * (np.maximum(s - 1 / penalty, 0) / s)) @ (u.T @ full)
        left = data - low + multiplier / penalty
        sparse = np.sign(left) * np.maximum(np.abs(left) - weight / penalty, 0)
        multiplier += penalty * (data - low - sparse)
        penalty *= 1.2
    return ndimage.median_filter(np.abs(sparse).reshape(movie.shape).max(-1), (1, 3, 3)) > 0.1


def top_hat(movie: np.ndarray) -> np.ndarray:
    """What a disk of radius 5 does not fit under, of each frame over the movie's minimum."""
    y, x = np.indices((11, 11)) - 5
    rest = movie[..., 0] - movie[..., 0].min(0)
    return np.stack([ndimage.white_tophat(frame, footprint=np.hypot(y, x) <= 5) for frame in rest])


def nmf(movie: np.ndarray, components: int = 40) -> np.ndarray:
    """Non-negative matrix factorisation of the movie over its minimum, the largest component left out."""
    from sklearn.decomposition import NMF

    rest = (movie[..., 0] - movie[..., 0].min(0)).reshape(len(movie), -1)
    model = NMF(components, init="nndsvda", max_iter=60, tol=1e-3, random_state=0)
    traces = model.fit_transform(rest)
    size = traces.sum(0) * model.components_.sum(1)
    cells = np.delete(np.arange(components), size.argmax())
    return (traces[:, cells] @ model.components_[cells]).reshape(movie.shape[:3])


def otsu(stills: np.ndarray) -> np.ndarray:
    """What is brighter than Otsu's threshold, of each still."""
    from skimage.filters import threshold_otsu

    return np.stack([image > threshold_otsu(image) for image in stills.mean(-1)])


def top_hat_and_otsu(stills: np.ndarray) -> np.ndarray:
    """Otsu's threshold of what a disk of radius 25, larger than an object's, does not fit under."""
    from skimage.morphology import disk, white_tophat

    around = disk(25, decomposition="sequence")
    return otsu(np.stack([white_tophat(image, around) for image in stills.mean(-1)])[..., None])


Method = Callable[[np.ndarray], np.ndarray]
MASKS: dict[str, Method] = {"median and MAD": median_and_mad, "robust PCA": robust_pca}
if find_spec("cv2"):
    MASKS |= {"MOG2": mog2, "KNN": knn}
THRESHOLDS: dict[str, Method] = {"Otsu": otsu, "top-hat and Otsu": top_hat_and_otsu}
ACTIVITIES: dict[str, Method] = {"white top-hat": top_hat, "NMF": nmf}
