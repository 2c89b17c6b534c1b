"""Writing to disk so that what is there is the old whole or the new whole."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jlora.errors import JloraError


def demand_free(to: Path) -> None:
    """Demand that a directory can be made at `to`, or is there and empty.

    Raises:
      JloraError: `to` is a file, or a directory with something in it.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        what = "a directory that isn't empty" if to.is_dir() else "a file"
        raise JloraError(f"{to} is {what}; give another path, or remove it first")


@contextmanager
def new_directory(to: Path) -> Iterator[Path]:
    """Give an empty directory beside `to` which becomes `to` when the block ends without an error.

    On an error nothing is left behind, so that `to` is never half written.

    Raises:
      JloraError: `to` is a file, or a directory with something in it.
    """
    demand_free(to)
    to = to.resolve()  # so that a link keeps pointing where it did
    to.parent.mkdir(parents=True, exist_ok=True)
    stage = to.parent / f".{to.name}.{uuid.uuid4().hex[:8]}.partial"
    stage.mkdir()
    try:
        yield stage
        if to.exists():  # empty: not every system renames onto an existing directory
            to.rmdir()
        stage.rename(to)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write `text` to `file`, which holds either its old content or all of the new one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
    ) as scratch:
        scratch.write(text)
    os.chmod(scratch.name, 0o644)  # temporary files are their owner's alone
    os.replace(scratch.name, file)


def save_tensors(
    tensors: Mapping[str, np.ndarray], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file as torch's readers want it; `file` must not exist yet.

    Args:
        tensors: name -> contiguous array.
        file: within a directory that is not in place yet, since this is not atomic.
        metadata: more for the file's header.
    """
    save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(0o644)  # the library makes files that their owner alone can read
