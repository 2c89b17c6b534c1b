"""Files: writing them so that what is there is the old whole or the new whole; templates."""

import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import JloraError
from jlora.places import local, place, reaching, url_of

TEMPLATE_FILE = "chat_template.jinja"
"""Name of the file in which a model, a run or an adapter has its chat template."""


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
    demand_free(local(to))
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


def read_template(file: Path) -> str:
    """Return the text of a chat template.

    Raises:
        JloraError: the file cannot be read, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JloraError(f"{file} cannot be read as a chat template: {error}") from None
    if not text.strip():
        raise JloraError(f"{file} is empty: it must hold a chat template, in Jinja")
    return text


def read_template_of(adapter: Path) -> str | None:
    """Return the chat template that a run or an adapter was trained with.

    None where it was the model's own.
    """
    if url_of(adapter) is None:
        file = adapter / TEMPLATE_FILE
        return read_template(file) if file.is_file() else None
    with reaching(adapter):
        file = place(adapter) / TEMPLATE_FILE
        return read_template(file) if file.is_file() else None


# safetensors' name of a dtype -> NumPy's
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"}
DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}


def save_tensors(
    tensors: Mapping[str, np.ndarray], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """`write_tensors` of whole arrays."""
    layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    write_tensors(file, layout, lambda name: iter([tensors[name]]), metadata)


def write_tensors(
    file: Path,
    layout: Mapping[str, tuple[Any, tuple[int, ...]]],
    pieces: Callable[[str], Iterator[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file as torch's readers want it, a piece of a tensor at a time.

    Args:
        file: within a directory that is not in place yet, since this is not atomic.
        layout: name -> dtype and shape.
        pieces: of a tensor's name, its rows in order, in any number of arrays of its dtype.
        metadata: text that the file carries beside the tensors.
    """
    # Wide ones first, so that each lies at a multiple of its own size.
    names = sorted(layout, key=lambda name: (-np.dtype(layout[name][0]).itemsize, name))
    codes = {name: code for code, name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        place = {"dtype": codes[np.dtype(dtype).name], "shape": list(shape)}
        header[name] = place | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in pieces(name):
                assert piece.dtype == layout[name][0], name
                out.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        assert out.tell() == 8 + len(text) + end, file
