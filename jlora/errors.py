"""The one exception type that jlora raises for what a user can mend; warnings said once."""

import difflib
import functools
import logging
from collections.abc import Iterable


class JloraError(ValueError):
    """Bad input: the message says what was wrong, where, and the next step.

    The command line prints it without a traceback and exits with status 2.
    """


class UnmatchedError(JloraError):
    """Patterns of a configuration that match nothing, where nothing else is wrong with it."""

    def __init__(self, message: str, patterns: Iterable[tuple[str, str | int]]):
        super().__init__(message)
        self.patterns = tuple(patterns)
        """(field, pattern or index of a layer) of each."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return "; did you mean 'x' or 'y'?", or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, by the logger "jlora", unless this process has logged the same before."""
    logging.getLogger("jlora").warning("%s", message)
