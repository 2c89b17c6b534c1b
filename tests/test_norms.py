"""Updates as files tell them, and their norms, against the product itself."""

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Mlp
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import adapters, injection, norms, updates
from jlora.checkpoint import StoredAdapter, gather
from jlora.errors import JloraError


def draw(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def stored(factors: dict[str, Any], **config: Any) -> StoredAdapter:
    return StoredAdapter(config=jlora.LoraConfig(**config), factors=factors, where="here")


def pair(name: str, a: Any, b: Any) -> dict[str, Any]:
    return {f"{name}lora_a": a, f"{name}lora_b": b}


@settings(deadline=None, max_examples=40)
@given(
    r=st.integers(1, 5),
    batch=st.lists(st.integers(1, 5), max_size=2),
    ins=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    outs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    rslora=st.booleans(),
)
def test_norm_of_the_product(r, batch, ins, outs, rslora) -> None:
    """Also with experts, and with factored weights, whose axes have the rank's size by chance."""
    if len(ins) == len(outs) == 2 and ins[0] == outs[0] == r:
        outs = outs[1:]  # the one layout that shapes don't tell from experts
    a, b = draw(0, *batch, r, *ins), draw(1, *batch, r, *outs)
    adapter = stored(pair("q/", a, b), r=r, lora_alpha=3, use_rslora=rslora)
    update = updates.updates(adapter)["q"]
    assert (update.batch_shape, update.r) == (tuple(batch), r)
    assert (update.in_shape, update.out_shape) == (tuple(ins), tuple(outs))
    rows = (int(np.prod(batch)), r, -1)
    delta = np.einsum("nri,nro->nio", *(np.asarray(x, np.float64).reshape(rows) for x in (a, b)))
    expected = np.linalg.norm(delta) * 3 / (r**0.5 if rslora else r)
    np.testing.assert_allclose(norms.delta_norms(adapter)["q"], expected, rtol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_every_layer_with_its_own_rank_and_alpha(stacked: bool) -> None:
    config = jlora.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=r"layers\.\d|lm_head",
        rank_pattern={r"layers\.1": 4},
        alpha_pattern={"lm_head": 5},
        init_lora_weights=False,
    )
    model = jlora.inject(Mlp(nnx.Rngs(0), stacked=stacked), config, rngs=nnx.Rngs(1))
    before, _ = injection.partition(model, everything=True)
    after, _ = injection.partition(jlora.merge(model), everything=True)
    found = norms.delta_norms(gather(model, config))
    assert list(found) == ["layers/0", "layers/1", "layers/2", "lm_head"]
    for name, value in found.items():
        kernel, index = f"{name}/kernel", ...
        if stacked and name != "lm_head":
            kernel, index = "layers/kernel", int(name[-1])
        delta = np.asarray(after[kernel][index]) - np.asarray(before[kernel][index])
        np.testing.assert_allclose(value, np.linalg.norm(delta), rtol=1e-5)


def test_names_that_patterns_match() -> None:
    """A plain parameter's module, and a stack that is itself the layer, as for a model."""
    a, b = draw(0, 2, 3), draw(1, 2, 3)
    factors = pair("moe/w_up_", a, b) | pair("blocks/0/", a, b) | pair("up/", a, b)
    patterns = {"moe": 4, "blocks": 6, "up": 8}
    found = updates.updates(stored(factors, r=2, lora_alpha=2, alpha_pattern=patterns))
    assert {name: u.alpha for name, u in found.items()} == {"moe/w_up": 4, "blocks/0": 6, "up": 8}
    assert found["moe/w_up"].paths == ("moe/w_up_lora_a", "moe/w_up_lora_b")


def test_zero_and_not_finite() -> None:
    a, b = draw(0, 2, 3), draw(1, 2, 3)
    factors = pair("zero/", a, b * 0) | pair("nan/", a.at[0, 0].set(jnp.nan), b)
    found = norms.delta_norms(stored(factors, r=2))
    assert found["zero"] == 0
    assert not np.isfinite(found["nan"])


def test_inner_keeps_the_difference_of_like_updates() -> None:
    x = updates.updates(stored(pair("q/", draw(0, 4, 30), draw(1, 4, 20)), r=4))["q"]
    y = dataclasses.replace(x, lora_b=x.lora_b * (1 + 1e-6))
    square = norms.inner(x, x) - 2 * norms.inner(x, y) + norms.inner(y, y)
    np.testing.assert_allclose(square**0.5 / norms.norm(x), 1e-6, rtol=0.1)


def test_distance_holds_few_rows(monkeypatch) -> None:
    value, base = np.asarray(draw(0, 7, 5)), np.asarray(draw(1, 5, 7), jnp.bfloat16).T
    expected = np.linalg.norm(value.astype(np.float64) - base.astype(np.float64))
    large = np.ones((32000, 256), np.float32)
    tracemalloc.start()
    try:
        assert norms.distance(large, np.zeros_like(large)) == 32000**0.5 * 16
        peak = tracemalloc.get_traced_memory()[1] - large.nbytes  # the zeros
    finally:
        tracemalloc.stop()
    assert peak < large.nbytes
    monkeypatch.setattr(norms, "_BLOCK", 11)
    np.testing.assert_allclose(norms.distance(value, base), expected, rtol=1e-12)
    assert norms.distance(np.float32(-3)) == 3
    assert np.isnan(norms.distance(np.asarray([1, np.nan], np.float32)))


def test_leaves_that_are_no_factors() -> None:
    factors = pair("q/", draw(0, 2, 3), draw(1, 2, 3))
    more = {"q/bias": draw(2, 3), "embed/lora_tokens": draw(3, 1, 3)}
    adapter = stored(factors | more, r=2)
    assert list(updates.updates(adapter)) == ["q"]
    assert updates.others(adapter) == more


def test_factors_that_are_not_what_the_configuration_says() -> None:
    a, b = draw(0, 2, 3), draw(1, 2, 3)
    factors = pair("q/", a, b) | {"k/lora_a": a, "v/lora_b": b} | pair("o/", a, draw(1, 4, 3))
    with pytest.raises(JloraError) as caught:
        updates.updates(stored(factors, r=2, rank_pattern={"q": 3}))
    assert str(caught.value).splitlines() == [
        "the adapter in here is not what its configuration says:",
        "  q: factors (2, 3) and (2, 3), where the rank is 3",
        "  k/lora_a is there without k/lora_b",
        "  o: factors (2, 3) and (4, 3), where the rank is 2",
        "  v/lora_b is there without v/lora_a",
    ]


def test_a_saved_adapter(tmp_path: Path) -> None:
    config = jlora.LoraConfig(r=3, init_lora_weights=False)
    model = jlora.inject(Mlp(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    jlora.save_adapter(tmp_path / "orbax", model, config)
    jlora.export_peft(tmp_path / "peft", model, config)
    read = [jlora.adapters.read(tmp_path / form) for form in ("orbax", "peft")]
    assert norms.delta_norms(read[0]) == norms.delta_norms(read[1])


def test_experts_are_told_from_factored_axes_by_the_base(tmp_path: Path) -> None:
    """Both factors' next axes are as many as the rank: what the base's shape says is right."""

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.mix = nnx.LinearGeneral((2, 3), (2, 4), axis=(-2, -1), rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    config = jlora.LoraConfig(r=2, target_modules=("mix",), init_lora_weights=False)
    model = jlora.inject(Model(), config, rngs=nnx.Rngs(1))
    jlora.save_adapter(tmp_path / "a", model, config)
    read = adapters.read(tmp_path / "a")
    change = jlora.merge(model).mix.kernel[...] - Model().mix.kernel[...]
    assert norms.delta_norms(read) == pytest.approx({"mix": float(jnp.linalg.norm(change))})
    jlora.load_adapter(jlora.combine_adapters([read], [1], "cat"), Model())
