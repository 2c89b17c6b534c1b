"""Adapters where models, names or machines are unusual."""

import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Mlp
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jlora
from jlora import adapters, checkpoint, injection, peft
from jlora.errors import JloraError

CONFIG = jlora.LoraConfig(r=2, lora_alpha=4, target_modules=r".*", init_lora_weights=False)
X = jnp.linspace(-1, 1, 16).reshape(2, 8)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.lin = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.lin(x))


class Encoder(nnx.Module):
    """A stack as the only thing in its module, which no shape tells from a stack of modules."""

    stacked_layers = ("layers",)

    def __init__(self, rngs: nnx.Rngs, *, stacked: bool):
        keys = jax.random.split(rngs.params(), 3)
        if stacked:
            self.layers = nnx.vmap(Block, in_axes=0)(nnx.Rngs(params=keys))
        else:
            self.layers = nnx.List([Block(nnx.Rngs(params=key)) for key in keys])


class Wrapped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, stacked: bool):
        self.encoder = Encoder(rngs, stacked=stacked)
        self.head = nnx.Linear(8, 3, rngs=rngs)


class Overlapping(nnx.Module):
    """`fc` and `sub.fc`: the one's full name is the end of the other's."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc = nnx.Linear(8, 8, rngs=rngs)
        self.sub = nnx.Dict(fc=nnx.Linear(8, 8, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.sub["fc"](self.fc(x))


@pytest.mark.parametrize("saved", [False, True])
def test_a_stack_in_a_module_of_its_own_has_the_unrolled_names(saved: bool, tmp_path: Path) -> None:
    models = [Wrapped(nnx.Rngs(0), stacked=stacked) for stacked in (saved, not saved)]
    names = [{n for site in injection.sites(m) for n in site.names} for m in models]
    assert names[0] == names[1]
    assert names[0] == {"head", *(f"encoder/layers/{i}/lin" for i in range(3))}
    jlora.save_adapter(tmp_path / "a", jlora.inject(models[0], CONFIG, rngs=nnx.Rngs(1)), CONFIG)
    jlora.load_adapter(tmp_path / "a", models[1], allow_zero=True)
    first, second = (checkpoint.gather(m, CONFIG).factors for m in models)
    assert first.keys() == second.keys()
    for name, factor in first.items():
        np.testing.assert_array_equal(factor, second[name])


@pytest.mark.parametrize("target", ["fc", r"sub\.fc"])
def test_an_export_chooses_just_what_was_trained(target: str, tmp_path: Path) -> None:
    config = jlora.LoraConfig(
        r=2, target_modules=target, rank_pattern={f"^{target}": 3}, init_lora_weights=False
    )
    model = jlora.inject(Overlapping(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    jlora.export_peft(tmp_path / "p", model, config)
    again = jlora.load_adapter(tmp_path / "p", Overlapping(nnx.Rngs(0)))
    assert injection.scalings(again).keys() == injection.scalings(model).keys()
    np.testing.assert_array_equal(again(X), model(X))
    written = json.loads((tmp_path / "p" / peft.CONFIG_FILE).read_text())
    (pattern,) = written["rank_pattern"]  # as PEFT matches it
    hits = [n for n in ("fc", "sub.fc") if re.match(rf"(.*\.)?({pattern})$", n)]
    assert hits == [target.replace("\\", "")]


def test_a_loaded_adapter_is_ready_to_answer(tmp_path: Path) -> None:
    config = jlora.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)
    trained = jlora.inject(Mlp(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    jlora.save_adapter(tmp_path / "a", trained, config)
    trained.eval()
    model = jlora.load_adapter(tmp_path / "a", Mlp(nnx.Rngs(0)))
    np.testing.assert_array_equal(model(X), trained(X))
    model.train()
    assert not np.array_equal(model(X), model(X))


def test_factors_keep_the_models_dtype(tmp_path: Path) -> None:
    model = jlora.inject(Mlp(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), jlora.partition(model)[0])
    injection.update(model, half)
    assert {leaf.dtype for leaf in jlora.partition(model)[0].values()} == {jnp.dtype("float32")}


def test_a_checkpoint_of_another_device_is_read(tmp_path: Path) -> None:
    model = jlora.inject(Mlp(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    jlora.save_adapter(tmp_path / "a", model, CONFIG)
    sharding = tmp_path / "a" / "adapters" / "_sharding"
    text, moved = re.subn("cpu:0|TFRT_CPU_0", "cuda:3", sharding.read_text(), flags=re.IGNORECASE)
    assert moved
    sharding.write_text(text)
    stored = checkpoint.read_adapter(tmp_path / "a")
    for name, factor in checkpoint.gather(model, CONFIG).factors.items():
        np.testing.assert_array_equal(stored.factors[name], factor)


@pytest.mark.parametrize("item", ["adapters", "meta"])
def test_a_damaged_checkpoint_is_named(item: str, tmp_path: Path) -> None:
    model = jlora.inject(Mlp(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    jlora.save_adapter(tmp_path / "a", model, CONFIG)
    for file in (tmp_path / "a" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(JloraError, match=re.escape(str(tmp_path / "a")) + " is damaged"):
        adapters.read(tmp_path / "a")


def test_one_string_that_names_an_end_is_explained() -> None:
    config = jlora.LoraConfig(target_modules="mlp")
    model = nnx.Dict(block=nnx.Dict(mlp=nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(JloraError, match=r"regular expression for the whole name.*'\.\*\\\.mlp'"):
        jlora.inject(model, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "is itself a Linear layer"),
        (lambda: nnx.Dict(norm=nnx.LayerNorm(2, rngs=nnx.Rngs(0))), "no layer of a type that can"),
    ],
)
def test_models_that_hold_no_adapter(model, message: str) -> None:
    with pytest.raises(JloraError, match=message):
        jlora.inject(model(), jlora.LoraConfig(), rngs=nnx.Rngs(0))


class Leaves(nnx.Module):
    """Parameters of any shapes."""

    def __init__(self, values: dict[str, np.ndarray]):
        for name, value in values.items():
            setattr(self, name, nnx.Param(jnp.asarray(value)))


class Holder(nnx.Module):
    """One layer to adapt, and a tree that is saved whole."""

    def __init__(self, values: dict[str, np.ndarray], inner: dict[str, np.ndarray]):
        self.lin = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.own = Leaves(values)
        self.own.inner = Leaves(inner)


shapes = st.lists(st.integers(1, 3), max_size=4).map(tuple)
trees = st.dictionaries(st.sampled_from(["a", "scale", "weight", "temperature"]), shapes)


@settings(deadline=None, max_examples=15)
@given(trees, trees, st.integers(0, 2**32 - 1))
@example({"scale": ()}, {}, 0)
@example({"a": (1,), "weight": (1, 1)}, {"a": ()}, 1)
@example({}, {"scale": (2,), "weight": (3,)}, 2)
def test_any_tree_saved_whole_comes_back(outer: dict, inner: dict, seed: int) -> None:
    if not outer and not inner:
        return
    rng = np.random.default_rng(seed)

    def drawn(tree: dict) -> dict[str, np.ndarray]:
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in tree.items()}

    config = jlora.LoraConfig(r=1, target_modules=("lin",), modules_to_save=("own",), task_type="",
                        init_lora_weights=False)  # fmt: skip
    model = jlora.inject(Holder(drawn(outer), drawn(inner)), config, rngs=nnx.Rngs(1))
    expected = jlora.partition(model)[0]
    assert len(expected) == 2 + len(outer) + len(inner)
    with tempfile.TemporaryDirectory() as scratch:
        jlora.save_adapter(Path(scratch, "orbax"), model, config)
        jlora.export_peft(Path(scratch, "peft"), model, config)
        for form in ("orbax", "peft"):
            fresh = Holder(drawn(outer), drawn(inner))  # of other values
            jlora.load_adapter(Path(scratch, form), fresh, force=True)
            got = jlora.partition(fresh)[0]
            assert got.keys() == expected.keys()
            for path, leaf in expected.items():
                assert got[path].shape == leaf.shape, path
                assert np.asarray(got[path]).tobytes() == np.asarray(leaf).tobytes(), path
