"""Fixtures that several files use."""

from pathlib import Path

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
