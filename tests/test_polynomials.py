"""The coefficients in csrc/math/elementary.h are those that tools/fit_polynomials.py finds."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpmath")

from tools import fit_polynomials

HEADER = Path(__file__).parent.parent / "csrc/math/elementary.h"


@pytest.fixture(scope="module")
def fitted() -> dict[str, np.ndarray]:
    return fit_polynomials.all_coefficients()


def _in_header(name: str, count: int) -> np.ndarray:
    """The float literals that follow the comment which begins with the polynomial's name."""
    (code,) = re.findall(rf"// {name}: .*\n((?:.*\n){{{count}}})", HEADER.read_text())
    literals = re.findall(r"(?<![\w.])-?\d+\.\d+(?:e-?\d+)?(?=f\b)", code)[:count]
    return np.array([float(x) for x in literals]).astype(np.float32)


@pytest.mark.parametrize("name", list(fit_polynomials.fits()))
def test_the_header_has_the_fitted_coefficients(name, fitted):
    wanted = fitted[name]
    found = _in_header(name, len(wanted))
    assert found.view(np.int32).tolist() == wanted.view(np.int32).tolist(), (found, wanted)


def test_the_error_of_a_fit_has_equal_extrema():
    """What makes it the best: 1/(2 + x) on [-1, 1] by a line, whose least maximum error is known exactly."""
    constant, slope = fit_polynomials.remez(lambda x: 1 / (2 + x), lambda x: 1, 1, -1, 1)
    # The chord from 1 to 1/3, lowered by half of what it lies above the curve at x = sqrt(3) - 2.
    assert float(slope) == pytest.approx(-1 / 3, abs=1e-12)
    above = 2 / 3 - (3**0.5 - 2) / 3 - 3**-0.5
    assert float(constant) == pytest.approx(2 / 3 - above / 2, abs=1e-9)
