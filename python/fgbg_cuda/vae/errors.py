"""What can go wrong through no fault of the program."""


class InputError(ValueError):
    """What the user gave cannot be used. The message, one sentence, says what it is and what is accepted."""
