"""From the numbers in an image file to [0, 1] and back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError

# A string: "auto", or the two numbers as one writes them on a command line, "0,4095".
IntensityRange = tuple[float, float] | str | None


@dataclass(frozen=True)
class Intensity:
    """The linear map from the values of an image to [0, 1].

    - ``range=(low, high)``: low becomes 0 and high 1; values beyond are clipped.
    - ``range=None``: that of the data type. 8-bit values are divided by 255, 16-bit ones by 65535; signed
      ones go from their lowest to their highest, so that 0 becomes 1/2; bool is 0 and 1; floats have to be
      in [0, 1] already.

    NaN and infinite values are errors.

    Attributes:
        trained: where in [0, 1] the values lay that a model was trained on, from 0.01 to 99.99 %.
    """

    range: tuple[float, float] | None = None
    trained: tuple[float, float] | None = None
    by_index: ClassVar[bool] = False  # True: the numbers are those of labels, and a palette is left alone

    def __post_init__(self) -> None:
        if self.range is None:
            return
        given = self.range
        try:
            numbers = given.strip("[()]").replace(",", " ").split() if isinstance(given, str) else given
            low, high = map(float, numbers)
            given = f"({low:g}, {high:g})"
        except (TypeError, ValueError):  # not two, or no numbers
            low = high = 0.0
        if not (np.isfinite([low, high]).all() and low < high):
            words = " or auto" if isinstance(self.range, str) else ""
            raise InputError(f"intensity_range is {given}, expected two numbers, low < high{words}")
        object.__setattr__(self, "range", (low, high))

    def bounds(self, dtype: np.dtype) -> tuple[float, float]:
        """The values that become 0 and 1."""
        if self.range is not None:
            return self.range
        return _limits(dtype) if dtype.kind in "iu" else (0.0, 1.0)

    def occupied(self, frames: list[np.ndarray]) -> tuple[float, float]:
        """From where to where the values of frames lie in [0, 1], or beyond: of those of the first's type."""
        low, high = self.bounds(frames[0].dtype)
        found = percentiles([frame for frame in frames if frame.dtype == frames[0].dtype])
        return tuple((value - low) / (high - low) for value in found)

    def to_unit(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """Pixels (integers of 8 to 32 bits, bool or float) as float32 in [0, 1]. ``where`` is for errors.

        Raises:
            InputError: another data type, NaN or infinite values, floats outside [0, 1] with no range given.
        """
        if pixels.dtype.kind not in "biuf" or (pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 4):
            raise InputError(
                f"{where} has pixels of type {pixels.dtype}, expected integers of 8 to 32 bits, bool or float"
            )
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
        """The inverse: values in [0, 1] as pixels of type ``dtype``, rounded unless those are floats."""
        low, high = self.bounds(dtype)
        # float32 is finer than any step of 16 bits, and twice as fast.
        exact = np.float32 if dtype.kind in "biu" and dtype.itemsize <= 2 else np.float64
        pixels = values * exact(high - low)
        pixels += exact(low)
        if dtype.kind in "biu":
            np.rint(pixels, out=pixels).clip(*_limits(dtype), out=pixels)
        return pixels.astype(dtype)


class Labels(Intensity):
    """Masks of bool or any integer type, labels of objects included: what is not 0 becomes 1."""

    by_index = True

    def to_unit(self, pixels: np.ndarray, where: str) -> np.ndarray:
        if pixels.dtype.kind not in "biu" or pixels.shape[-1] != 1:
            kind = "colours" if pixels.shape[-1] != 1 else f"values of type {pixels.dtype}"
            raise InputError(
                f"{where} has {kind}, expected a mask of one integer or bool a pixel, 0 elsewhere"
            )
        return (pixels != 0).astype(np.float32)


def _limits(dtype: np.dtype) -> tuple[float, float]:
    return (0.0, 1.0) if dtype.kind == "b" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))


def probability(dtype: np.dtype) -> Intensity:
    """How a probability is written: from 0 to the largest value of an integer type, else to 1."""
    return Intensity((0.0, _limits(dtype)[1] if dtype.kind in "iu" else 1.0))


def percentiles(frames: list[np.ndarray], pixels: int = 2**22) -> tuple[float, float]:
    """The 0.01 and 99.99 percentiles of the frames' values, or the least and most where those are equal.

    They pass over a camera's few dead and hot pixels. Of many pixels every k-th is looked at, about
    ``pixels`` in all, so that the result is the same each time.
    """
    step = max(1, int(np.sqrt(sum(frame[..., :1].size for frame in frames) / pixels)))
    values = np.concatenate([np.asarray(frame[::step, ::step], np.float64).ravel() for frame in frames])
    low, high = np.percentile(values, [0.01, 99.99]).tolist()
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def measure(frames: list[np.ndarray]) -> tuple[float, float]:
    """What ``intensity_range="auto"`` stands for: the :func:`percentiles` of the frames' values.

    Raises:
        InputError: NaN or infinite values, no two different ones, or frames of several data types.
    """
    if len(types := sorted({str(frame.dtype) for frame in frames})) > 1:
        raise InputError(
            f"the images are of types {' and '.join(types)}, which have no intensity_range in common: "
            "expected one type"
        )
    low, high = percentiles(frames)
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(
            f"the images have values from {low:g} to {high:g}, from which no intensity_range can be measured"
        )
    return low, high


def warn_of_other_intensities(what: str, frames: list[np.ndarray], intensity: Intensity) -> None:
    """Warns where the values of ``frames`` and those that ``intensity`` is for have hardly any in common.

    That is where the range of both together is more than eight times as wide as what they share: as it is
    with 8-bit images and a model of 16-bit ones, and where a camera of 12 bits writes files of 16.
    """
    for dtype in {frame.dtype: None for frame in frames}:  # a folder may have several
        found = intensity.occupied([frame for frame in frames if frame.dtype == dtype])
        expected = intensity.trained or (0.0, 1.0)
        shared = min(found[1], expected[1]) - max(found[0], expected[0])
        if 8 * shared >= max(found[1], expected[1]) - min(found[0], expected[0]):
            continue
        low, high = intensity.bounds(dtype)
        found, expected = (
            "{:g} to {:g}".format(*(low + (high - low) * share for share in pair))
            for pair in (found, expected)
        )
        reason = "the model was trained on" if intensity.trained else "the intensity range is"
        warnings.warn(
            f"the values of {what} are {found}, but {reason} {expected}: "
            "the model may see no more than one gray level"
            + ("" if intensity.trained else '; try intensity_range="auto"'),
            stacklevel=3,
        )
