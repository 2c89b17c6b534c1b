"""The updates in a stored adapter, weight by weight, as files tell them: no model is needed."""

import dataclasses
import math

from jax import Array

from jlora.adapter import LORA_A, LORA_B
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError
from jlora.matching import Choice, dotted
from jlora.peft import is_copy, is_factor


@dataclasses.dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight of one layer: scaling * A B."""

    lora_a: Array
    """(*batch, r, *in)."""
    lora_b: Array
    """(*batch, r, *out)."""
    batch: int
    """How many leading axes are neither rank, nor input, nor output: experts."""
    alpha: float
    scaling: float
    paths: tuple[str, str]
    """Where the factors are stored."""

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_a.shape[self.batch]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.lora_a.shape[: self.batch])

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        return tuple(self.lora_a.shape[self.batch + 1 :])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the output axes."""
        return tuple(self.lora_b.shape[self.batch + 1 :])

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all of these: of the weight, where its axes come in this order."""
        return (*self.batch_shape, *self.in_shape, *self.out_shape)

    @property
    def parameters(self) -> int:
        """Number of values in both factors."""
        return math.prod(self.lora_a.shape) + math.prod(self.lora_b.shape)

    def matrices(self) -> tuple[Array, Array]:
        """A as (batch, r, in) and B as (batch, r, out), each role merged into one axis."""
        count = math.prod(self.batch_shape)
        return (
            self.lora_a.reshape(count, self.r, math.prod(self.in_shape)),
            self.lora_b.reshape(count, self.r, math.prod(self.out_shape)),
        )


def updates(stored: StoredAdapter) -> dict[str, Update]:
    """Canonical path of each adapted weight's module, of a plain parameter itself -> its update.

    Which axis is the rank follows from the configuration. Where the axes after it have that size
    too, in both factors, the base's shapes tell whether the first are experts; of an adapter that
    does not know its base they are taken for that.

    Raises:
        JloraError: a factor without the other, or of another rank than the configuration says; all
            at once.
    """
    choice = Choice(stored.config)
    problems, result = list(choice.problems), {}
    for path_a, a in stored.factors.items():
        if (name := _name(path_a, LORA_A)) is None:
            continue
        path_b = path_a.removesuffix(LORA_A) + LORA_B
        r, alpha = choice.values(_names(name, plain=not path_a.endswith("/" + LORA_A)))
        b = stored.factors.get(path_b)
        if b is None:
            problems.append(f"{path_a} is there without {path_b}")
        elif (batch := _batch(r, a.shape, b.shape, _sizes(stored, name))) is None:
            problems.append(f"{name}: factors {a.shape} and {b.shape}, where the rank is {r}")
        else:
            scaling = stored.config.scaling(r, alpha)
            result[name] = Update(a, b, batch, alpha, scaling, (path_a, path_b))
    for path_b in stored.factors:
        path_a = path_b.removesuffix(LORA_B) + LORA_A
        if _name(path_b, LORA_B) is not None and path_a not in stored.factors:
            problems.append(f"{path_b} is there without {path_a}")
    if problems:
        raise JloraError(
            "\n  ".join([f"the adapter in {stored.where} is not what its configuration says:",
                         *problems[:10]])
        )  # fmt: skip
    return result


def others(stored: StoredAdapter) -> dict[str, Array]:
    """What is trained and no factor: biases, saved modules, token rows.

    By canonical path; of what was read from a PEFT directory, by the names there.
    """
    unfitted = {k: v for k, v in stored.tensors.items() if not (is_factor(k) or is_copy(k))}
    return unfitted | {
        path: leaf
        for path, leaf in stored.factors.items()
        if _name(path, LORA_A) is None and _name(path, LORA_B) is None
    }


def _name(path: str, factor: str) -> str | None:
    """The path of the weight whose factor is at `path`: of "a/lora_a" or, plain, "a_lora_a"."""
    name = path.removesuffix(factor)
    return name[:-1] if name != path and name[-1:] in ("/", "_") else None


def _names(name: str, *, plain: bool) -> tuple[str, ...]:
    """What patterns may match: also the module of a plain parameter, the stack that is a layer."""
    module, _, last = name.rpartition("/")
    above = (module,) if module and (plain or last.isdecimal()) else ()
    return tuple(map(dotted, (name, *above)))


def _sizes(stored: StoredAdapter, name: str) -> set[int]:
    """How many values the base's leaves at a path have, and those of the module there."""
    shapes = {} if stored.base is None else stored.base.shapes
    return {math.prod(s) for p, s in shapes.items() if p == name or p.startswith(f"{name}/")}


def _batch(r: int, a: tuple[int, ...], b: tuple[int, ...], sizes: set[int]) -> int | None:
    """The number of batch axes of two factors of rank `r`, of a weight of one of the sizes."""
    possible = range(min(len(a), len(b)) - 1)
    found = [n for n in possible if a[n] == b[n] == r and a[:n] == b[:n]]
    if len(found) > 1:
        fitting = [n for n in found if math.prod((*a[:n], *a[n + 1 :], *b[n + 1 :])) in sizes]
        found = fitting or found
    return found[-1] if found else None
