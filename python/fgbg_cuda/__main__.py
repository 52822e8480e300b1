"""The command line, ``fgbg`` or ``python -m fgbg_cuda``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

COMMANDS = {
    "fit": "train a model on your images or on a built-in data set",
    "validate": "score a trained model on the validation images",
    "test": "score a trained model on the test images",
    "separate": "write the foreground, background and mask of every image or frame",
    "demo": "train a model on digits over texture in minutes, and score it",
    "reproduce": "repeat the experiments whose results are shown in the README",
}


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="fgbg",
        description="Takes images apart into foreground, background and mask.",
        epilog="\n".join(["commands:", *(f"  {name:<10} {text}" for name, text in COMMANDS.items())])
        + "\n\nThe options of a command: fgbg COMMAND --help. With --debug an error shows its trace.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    # What follows the command is read by the command, which alone imports what it needs.
    command = parser.parse_args(arguments[:1]).command
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook, if it starts this, need not be installed here
    run: Callable[[list[str]], None]
    try:
        if command == "separate":
            from .vae.commands.separate import main as run
        elif command == "demo":
            from .vae.commands.demo import main as run
        elif command == "reproduce":
            from .vae.commands.reproduce import main as run
        else:
            from .vae.commands.fit import main as run
    except ImportError as error:
        parser.exit(1, f"fgbg {command}: {error}\n")
    from .vae.errors import MISTAKES, in_a_sentence

    try:
        run(arguments if command in ("fit", "validate", "test") else arguments[1:])
    except MISTAKES as error:
        if debug:
            raise
        parser.exit(2, f"fgbg {command}: {in_a_sentence(error)}\n")


if __name__ == "__main__":
    main()
