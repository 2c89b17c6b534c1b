"""The real model and data, which `make parity` gets: nothing here is skipped without them."""

from pathlib import Path

import pytest
from counterpart import write_tiny

ROOT = Path(__file__).parents[2]


def fetched(path: Path) -> Path:
    """`path`, which must be there."""
    assert path.exists(), f"{path} is absent: `make parity` fetches it, and then runs these tests"
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, converted by us."""
    return fetched(ROOT / "models" / "smollm2" / "model.safetensors").parent


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file that it was converted from."""
    return fetched(ROOT / "models" / "smollm2-gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def sentiment() -> Path:
    """Movie reviews as chats."""
    return fetched(ROOT / "data" / "sentiment" / "train.jsonl").parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory of a random model of a family, as transformers writes it."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = write_tiny(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return directory
