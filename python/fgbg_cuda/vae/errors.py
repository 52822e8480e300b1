"""What can go wrong through no fault of the program, and how the command line says so."""

from __future__ import annotations

import argparse
import numbers
import re

from lightning.fabric.utilities.exceptions import MisconfigurationException


class InputError(ValueError):
    """What the user gave cannot be used. The message, one sentence, says what it is and what is accepted."""


class ResumeError(RuntimeError):
    """There is no run to continue, or not the one asked for."""


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the message says through which term, and where."""


# Lines of jsonargparse about a type that is one of several.
NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
# What options and files can cause, in this package or in a library; anything else is a fault of the program.
OURS = (InputError, ResumeError, NonFiniteLossError, argparse.ArgumentError)
MISTAKES = (*OURS, MisconfigurationException, ValueError, TypeError, RuntimeError, OSError, ImportError)


def in_a_sentence(error: BaseException) -> str:
    """What an error says, on one line, without what the libraries put around it."""
    if str(error).startswith("Call to compute_fn of link"):
        error = error.__cause__  # of the images, which are opened for the model
    cause = error
    while cause := cause.__cause__:
        if isinstance(cause, InputError):
            error = cause
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith(NOISE)) or type(error).__name__
    given = re.search(r"^ *Given value: (?:NestedArg\(.*, val=)?(.*?)\)?$", str(error), re.MULTILINE)
    if given and "Got value" not in said:
        said += f". Got value: {given[1]}"
    return said if isinstance(error, OURS) else f"{said} (--debug shows where)"


def at_least(least: float, **options: float) -> None:
    """Refuses an option that is less, NaN, or no number."""
    for name, value in options.items():
        if not (isinstance(value, numbers.Real) and value >= least):
            raise InputError(f"{name} is {value}, expected a number, at least {least:g}")


def whole(least: int, **options: int) -> None:
    """Refuses an option that is less, or no whole number."""
    for name, value in options.items():
        if not (isinstance(value, numbers.Integral) and value >= least):
            raise InputError(f"{name} is {value}, expected a whole number, at least {least}")


def positive(**options: float) -> None:
    """Refuses an option that is 0 or less, NaN, or no number."""
    for name, value in options.items():
        if not (isinstance(value, numbers.Real) and value > 0):
            raise InputError(f"{name} is {value}, expected a positive number")
