"""Fixtures that several files use."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import jax
import pytest


@pytest.fixture
def strict_promotion():
    """Make an implicit promotion of dtypes an error."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with tied head. Read it, never write to it."""
    return helpers.write_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep compiled programs for all tests of whole runs and commands, which run the same ones."""
    with helpers.compilation_cache(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model of whole runs: of two layers."""
    return helpers.write_model(tmp_path_factory.mktemp("run") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the chats of whole runs."""
    return helpers.write_chats(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture(scope="module")
def settings(model: Path, data: Path) -> Callable[..., Any]:
    """Return (output, **changes) -> the settings of a tiny run."""
    import train_cases  # of the training loop, which environments of other libraries lack needs of

    return functools.partial(train_cases.configuration, model, data)
