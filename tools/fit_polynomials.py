"""The coefficients of the polynomials in csrc/math/elementary.h: minimax fits by the Remez exchange.

    python tools/fit_polynomials.py

prints each polynomial's coefficients in Horner order, highest power first, as they stand in the header;
tests/test_polynomials.py compares them bit by bit. Everything is computed with 40 digits, so that the
result hangs on no machine, and rounded to float32 at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from mpmath import (
    cos,
    cospi,
    expm1,
    fabs,
    factorial,
    linspace,
    log,
    log1p,
    lu_solve,
    matrix,
    mp,
    mpf,
    pi,
    polyval,
    sinpi,
    sqrt,
)

DIGITS = 40
GRID = 400  # points among which the extrema of the error are looked for; a parabola then finds each


class Fit(NamedTuple):
    """f on [low, high] by the polynomial of this degree with the least maximum of weight(x) |f(x) - p(x)|."""

    f: Callable[[mpf], mpf]
    weight: Callable[[mpf], mpf]
    degree: int
    low: mpf
    high: mpf
    # The lowest coefficient where float32 has it exactly: the others are fitted around it.
    lowest: mpf | None = None


def _with_series(closed: Callable[[mpf], mpf], numbers: list[mpf]) -> Callable[[mpf], mpf]:
    """``closed``, and near 0, where that is 0 / 0, its Taylor series."""
    return lambda x: closed(x) if fabs(x) > mpf(10) ** -5 else polyval(numbers[::-1], x)


def fits() -> dict[str, Fit]:
    """By the names that the comments of the header give them."""
    half_ln2, half, quarter = log(2) / 2, mpf(1) / 2, mpf(1) / 4
    terms = range(8)
    # (exp(r) - 1 - r) / r^2 and (log(1 + x) - x) / x^2.
    exp = _with_series(lambda r: (expm1(r) - r) / r**2, [1 / factorial(k + 2) for k in terms])
    log_tail = _with_series(lambda x: (log1p(x) - x) / x**2, [-(mpf(-1) ** k) / (k + 2) for k in terms])
    # For x in quarter turns and y = x^2: sin(x) / x and (cos(x) - 1) / y.
    sine = _with_series(
        lambda y: sinpi(sqrt(y) / 2) / sqrt(y),
        [mpf(-1) ** k * (pi / 2) ** (2 * k + 1) / factorial(2 * k + 1) for k in terms],
    )
    cosine = _with_series(
        lambda y: (cospi(sqrt(y) / 2) - 1) / y,
        [-(mpf(-1) ** k) * (pi / 2) ** (2 * k + 2) / factorial(2 * k + 2) for k in terms],
    )
    return {
        "expm1_reduced": Fit(exp, lambda r: r**2, 4, -half_ln2, half_ln2, half),
        "log_normal": Fit(log_tail, fabs, 8, sqrt(half) - 1, sqrt(mpf(2)) - 1),
        "log1p_unit": Fit(log_tail, lambda x: x**2 / log1p(x), 7, mpf(0), mpf(1)),
        "expm1_minus_x": Fit(exp, lambda r: 1 / exp(r), 5, -half_ln2, half_ln2, half),
        "sin_turns": Fit(sine, lambda y: mpf(1), 3, mpf(0), quarter),
        "cos_turns": Fit(cosine, lambda y: y, 3, mpf(0), quarter),
    }


def remez(
    f: Callable[[mpf], mpf], weight: Callable[[mpf], mpf], degree: int, low: mpf, high: mpf
) -> list[mpf]:
    """Coefficients, lowest first, whose weighted error has degree + 2 equal extrema of alternating signs."""
    points = degree + 2
    middle, radius = (low + high) / 2, (high - low) / 2

    def away_from_zero(x: mpf) -> mpf:  # where weights may vanish and quotients are 0 / 0
        return x if fabs(x) > radius / 50 else x + radius / 50

    where = [away_from_zero(middle - radius * cos(pi * (2 * i + 1) / (2 * points))) for i in range(points)]
    tiny = mpf(10) ** -9
    grid = [middle - radius * cos(angle) for angle in linspace(0, pi, GRID + 1)]
    grid = [x if fabs(x) > tiny else tiny for x in grid]
    values = [(x, f(x), weight(x)) for x in grid]
    for _ in range(30):
        system, right = matrix(points, points), matrix(points, 1)
        for i, x in enumerate(where):
            for k in range(degree + 1):
                system[i, k] = x**k
            system[i, degree + 1] = (-1) ** i / weight(x)
            right[i] = f(x)
        *coefficients, level = lu_solve(system, right)
        polynomial = coefficients[::-1]
        errors = [w * (y - polyval(polynomial, x)) for x, y, w in values]
        where, largest = _extrema(
            lambda x, p=polynomial: weight(x) * (f(x) - polyval(p, x)), grid, errors, points
        )
        if largest < fabs(level) * (1 + mpf(10) ** -12):
            return coefficients
    raise ArithmeticError("the exchange does not converge")


def _extrema(
    error: Callable[[mpf], mpf], grid: list[mpf], errors: list[mpf], wanted: int
) -> tuple[list[mpf], mpf]:
    """The largest error between each two changes of its sign: where they are, and the largest of all."""
    runs = [[0]]
    for i in range(1, len(errors)):
        if (errors[i] > 0) == (errors[i - 1] > 0):
            runs[-1].append(i)
        else:
            runs.append([i])
    peaks = [max(run, key=lambda i: fabs(errors[i])) for run in runs]
    while len(peaks) > wanted:
        peaks.pop(0 if fabs(errors[peaks[0]]) < fabs(errors[peaks[-1]]) else -1)
    if len(peaks) < wanted:
        raise ArithmeticError("the error has too few extrema")
    found = []
    for i in peaks:
        x = grid[i]
        if 0 < i < len(grid) - 1:
            step = min(grid[i + 1] - x, x - grid[i - 1])
            for _ in range(3):
                before, here, after = error(x - step), error(x), error(x + step)
                bend = before - 2 * here + after
                if bend != 0:
                    move = step * (before - after) / (2 * bend)
                    x = min(max(x + min(max(move, -step), step), grid[0]), grid[-1])
                step /= 8
        found.append(x)
    return found, max(fabs(error(x)) for x in found)


def coefficients(fit: Fit) -> np.ndarray:
    """In float32 and Horner order: the highest power first."""
    if fit.lowest is None:
        found = remez(fit.f, fit.weight, fit.degree, fit.low, fit.high)
    else:
        rest = remez(
            lambda x: (fit.f(x) - fit.lowest) / x,
            lambda x: fit.weight(x) * fabs(x),
            fit.degree - 1,
            fit.low,
            fit.high,
        )
        found = [fit.lowest, *rest]
    return np.array([float(c) for c in reversed(found)]).astype(np.float32)


def all_coefficients() -> dict[str, np.ndarray]:
    with mp.workdps(DIGITS):
        return {name: coefficients(fit) for name, fit in fits().items()}


if __name__ == "__main__":
    for name, numbers in all_coefficients().items():
        print(f"{name}: {', '.join(f'{x:#.9g}f' for x in numbers)}")
