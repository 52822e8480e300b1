"""From the numbers in an image file to [0, 1] and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import InputError

IntensityRange = tuple[float, float] | Literal["auto"] | None


@dataclass(frozen=True)
class Intensity:
    """The linear map from the values of an image to [0, 1].

    - ``range=(low, high)``: low becomes 0 and high 1; values beyond are clipped.
    - ``range=None``: that of the data type. 8-bit values are divided by 255, 16-bit ones by 65535;
      floats have to be in [0, 1] already.

    NaN and infinite values are errors.
    """

    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.range is None:
            return
        low, high = self.range
        if not (np.isfinite(self.range).all() and low < high):
            raise InputError(f"intensity_range is ({low:g}, {high:g}), expected two numbers, low < high")

    def bounds(self, dtype: np.dtype) -> tuple[float, float]:
        """The values that become 0 and 1."""
        if self.range is not None:
            return self.range
        return (0.0, float(np.iinfo(dtype).max)) if dtype.kind == "u" else (0.0, 1.0)

    def to_unit(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """Pixels (uint8, uint16 or float) as float32 in [0, 1]. ``where`` names them in errors.

        Raises:
            InputError: another data type, NaN or infinite values, floats outside [0, 1] with no range given.
        """
        if pixels.dtype.kind != "f" and pixels.dtype not in (np.uint8, np.uint16):
            raise InputError(f"{where} has pixels of type {pixels.dtype}, expected uint8, uint16 or float")
        low, high = self.bounds(pixels.dtype)
        if pixels.dtype.kind == "f":
            least, most = pixels.min(), pixels.max()
            if not np.isfinite([least, most]).all() or (self.range is None and not 0 <= least <= most <= 1):
                raise InputError(
                    f"{where} has float values from {least:g} to {most:g}, expected "
                    + ("0 to 1, or an intensity_range" if self.range is None else "finite ones")
                )
        # In float64, as floats of any offset may come; each value is then rounded once.
        return ((pixels - np.float64(low)) / (high - low)).clip(0, 1).astype(np.float32)

    def from_unit(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The inverse: values in [0, 1] as pixels of type ``dtype``, rounded if those are integers."""
        low, high = self.bounds(dtype)
        pixels = values * np.float64(high - low) + low
        if dtype.kind == "u":
            pixels = pixels.round().clip(0, np.iinfo(dtype).max)
        return pixels.astype(dtype)


def measure(frames: list[np.ndarray], pixels: int = 2**22) -> tuple[float, float]:
    """What ``intensity_range="auto"`` stands for: the 0.01 and 99.99 percentiles of the frames' values.

    They pass over a camera's few dead and hot pixels. Of many pixels every k-th is looked at, about
    ``pixels`` in all, so that the result is the same each time.

    Raises:
        InputError: NaN or infinite values, or no two different ones.
    """
    step = max(1, int(np.sqrt(sum(frame[..., :1].size for frame in frames) / pixels)))
    values = np.concatenate([np.asarray(frame[::step, ::step], np.float64).ravel() for frame in frames])
    low, high = np.percentile(values, [0.01, 99.99]).tolist()
    if not low < high:  # NaN included
        low, high = values.min(), values.max()
    if not (np.isfinite(values).all() and low < high):
        raise InputError(
            f"the images have values from {values.min():g} to {values.max():g}, from which no "
            "intensity_range can be measured"
        )
    return float(low), float(high)
