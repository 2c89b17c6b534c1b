"""How each layer type contracts its weight. Flavour modules read this table; nothing else does."""

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
