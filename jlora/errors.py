"""The one exception type that jlora raises for what a user can mend."""

import difflib
from collections.abc import Iterable


class JloraError(ValueError):
    """Bad input: the message says what was wrong, where, and the next step.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return "; did you mean 'x' or 'y'?", or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
