"""What can go wrong through no fault of the program."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used. The message, one sentence, says what it is and what is accepted."""


def at_least(least: float, **options: float) -> None:
    """Refuses an option that is less, or NaN."""
    for name, value in options.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}, expected at least {least:g}")


def positive(**options: float) -> None:
    """Refuses an option that is 0 or less, or NaN."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected a positive number")
