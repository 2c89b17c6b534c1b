"""A Hugging Face directory, opened once: its configuration, and where each leaf of ours lies."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jlora.errors import JloraError, warn_once
from jlora.models import families
from jlora.models.tensors import Tensors
from jlora.models.transformer import ModelConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Directory:
    """A model's directory, of which headers and config.json are read when it is opened."""

    path: Path
    config: ModelConfig
    """Of config.json; not tied where the files have a head and an embedding that differ."""
    tensors: Tensors

    @classmethod
    def open(cls, given: "str | Path | Directory") -> "Directory":
        """Open a directory; one that is open is returned as it is.

        Raises:
            JloraError: files that are missing, truncated or not supported.
        """
        if isinstance(given, Directory):
            return given
        path = Path(given)
        config, tensors = families.read_config(path), Tensors(path)
        if config.tie_word_embeddings and _apart(tensors):
            config = dataclasses.replace(config, tie_word_embeddings=False)
            warn_once(
                f"{path}: config.json ties the output head to the embedding (tie_word_embeddings), "
                f"and the files hold {HEAD} and {EMBEDDING} with different values: they are not "
                "tied, as in transformers 5; say false there"
            )
        if adapters := sorted(file.name for file in path.glob("adapter_model.*")):
            warn_once(
                f"{path}: {adapters[0]} beside the weights is an adapter, which transformers may "
                "put on the model, and which is not on it here: give it as an adapter, or remove it"
            )
        return cls(path, config, tensors)

    @property
    def tied_names(self) -> tuple[str, ...]:
        """The names of a tied embedding in the files: the embedding's, the head's, or both."""
        if not self.config.tie_word_embeddings:
            return ()
        return tuple(name for name in (EMBEDDING, HEAD) if name in self.tensors)

    def name(self, path: str) -> tuple[str, bool]:
        """Return the name of a leaf's tensor by the leaf's canonical path, and if it is transposed.

        A tied embedding may lie under the head's name alone.
        """
        name, transposed = families.hf_name(path)
        if name == EMBEDDING and self.tied_names:
            name = self.tied_names[0]
        return name, transposed

    def expected(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each tensor that a leaf of this shape has in the files."""
        name, transposed = self.name(path)
        for each in self.tied_names if name in self.tied_names else (name,):
            yield each, tuple(reversed(shape)) if transposed else shape

    def read(self, path: str) -> np.ndarray | None:
        """Return a leaf of the model by its canonical path, without the rest; None if quantised.

        Raises:
            JloraError: the files have no such tensor.
        """
        name, transposed = self.name(path)
        if name in self.tensors.quantised:
            return None
        if name not in self.tensors:
            raise JloraError(f"{self.path} has no tensor {name}")
        value = self.tensors.read(name)
        return value.T if transposed else value


def _apart(tensors: Tensors) -> bool:
    """Return whether the files hold an output head that is not the embedding."""
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    return HEAD in tensors.quantised or not tensors.equal(HEAD, EMBEDDING)
