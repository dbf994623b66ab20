"""Errors that are the user's to mend: one line each that says what, where and what to do."""

from contextlib import contextmanager


class Refused(SystemExit, ValueError):
    """What the user gave cannot be used: ends a script with one line that says what, where and what to do."""

    def __init__(self, told: str):
        # a DataLoader's worker tells it once more, behind its traceback
        told = told.rpartition("Refused: error: ")[2].rstrip()
        # a file's name may hold line breaks, and what a terminal obeys
        self.told = "".join(char if char.isprintable() else " " for char in told)
        super().__init__("error: " + self.told)


@contextmanager
def refusing(told: str, *errors: type[Exception]):
    """Turns `errors` into a Refused that says what was `told` and why."""
    try:
        yield
    except errors as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # which says nothing
        raise Refused(f"{told}: {kind}{' '.join(str(error).split())}") from error
