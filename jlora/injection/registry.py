"""How a layer type contracts its weight; each flavour keeps the table of its own layer types."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Axes of a layer type's weight, counted without the leading axes of stacked layers."""

    weight: str
    contracting: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Rank of one layer's weight; further leading axes are stacked layers."""
        return len(self.contracting) + len(self.output)


LINEAR = Contraction("kernel", contracting=(0,), output=(1,))
