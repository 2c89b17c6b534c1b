"""Places: files here, and buckets that Orbax reads and writes by their URL.

`pathlib` takes a URL for a local path, and "gs://bucket/x" for "gs:/bucket/x": nothing here makes
a directory called "gs:".
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.errors import JloraError

if TYPE_CHECKING:
    from etils import epath

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):(?:(?P<slashes>/+)(?P<rest>.*))?", re.IGNORECASE)
BUCKETS = ("gs", "s3")
"""Schemes that Orbax reads and writes, with `gcsfs` or `s3fs` beside it."""


def url_of(path: Any) -> str | None:
    """Return the URL that `path` is, with the slash that pathlib took from it; None for others."""
    if (found := _URL.fullmatch(str(path))) is None:
        return None
    scheme = found["scheme"].lower()  # after "file" comes no host, and a path from the root
    slashes = "///" if scheme == "file" and found["slashes"] != "//" else "//"
    return f"{scheme}:{slashes}{found['rest'] or ''}"


def local(path: str | Path, what: str = "") -> Path:
    """Return a path that must be one of files here.

    Args:
        path: the path.
        what: for messages: the flag or field that it was given by.

    Raises:
        JloraError: it is a URL.
    """
    if (url := url_of(path)) is not None:
        raise JloraError(_refusal(url, what))
    return Path(path)


def place(path: "str | Path | epath.Path") -> Any:
    """Return the place of an Orbax adapter: an absolute path here, or an `epath.Path` of a bucket.

    Raises:
        JloraError: another URL.
    """
    if (url := url_of(path)) is None:
        return Path(path).absolute()
    if url.partition(":")[0] not in BUCKETS:
        raise JloraError(_refusal(url, ""))
    from etils import epath

    return epath.Path(url)


@contextmanager
def reaching(path: Any) -> Iterator[None]:
    """Turn whatever a bucket's library says into an error that names the bucket.

    Raises:
        JloraError: the block raised something, and `path` is a bucket's.
    """
    try:
        yield
    except JloraError:
        raise
    except Exception as error:
        if url_of(path) is None:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise JloraError(
            f"{url_of(path)} cannot be reached: {reason[:200]}. Install what is missing, log in, "
            "or use a local path"
        ) from error


def check(settings: Any) -> None:
    """Refuse URLs among the paths of a command's settings, but for those that Orbax takes.

    A class says by `in_buckets` which of its fields may be such.

    Raises:
        JloraError: there are some; all are named.
    """
    if problems := list(_problems(settings, "")):
        raise JloraError("\n".join(problems))


def _problems(settings: Any, prefix: str) -> Iterator[str]:
    allowed = getattr(settings, "in_buckets", ())
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _problems(value, f"{flag}.")
            continue
        for each in _leaves(value):
            is_path = isinstance(each, Path) or field.name in ("data", "adapter")
            url = url_of(each.partition("=")[2] or each if isinstance(each, str) else each)
            if not is_path or url is None:
                continue
            if field.name not in allowed or url.partition(":")[0] not in BUCKETS:
                yield _refusal(url, f"--{flag}", allowed=field.name in allowed)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _refusal(url: str, what: str, *, allowed: bool = False) -> str:
    """Return why a URL is not taken, and what to give instead."""
    scheme, _, rest = url.partition("://")
    title = f"{what} {url}".strip()
    if scheme == "hf" and what in ("", "--model"):
        return f"{title}: a model on the hub is given by its name alone: {rest}"
    if scheme == "file":
        return f"{title}: what is here is given by its path alone: {rest}"
    taken = "gs:// and s3:// alone are" if allowed else "no URL is"
    return f"{title}: {taken} taken here; copy it to or from a local path, and give that"
