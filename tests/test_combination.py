"""Combining adapters: what is exact, what is cut, what is refused. tests/parity has PEFT's side."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Mlp, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import adapters, checkpoint, cli, combination, injection, mixture, peft, updates
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError
from jlora.fingerprint import Fingerprint

KINDS = combination.COMBINATION_TYPES
PRUNED = [kind for kind in KINDS if kind.removesuffix("_svd") in mixture.PRUNED]


def adapter(
    seed: int, r: int = 2, names: tuple[str, ...] = ("q", "v"), batch: tuple = (), **config: Any
) -> StoredAdapter:
    """Random factors of (3, 2) inputs and 5 outputs."""
    rng = np.random.default_rng(seed)
    factors = {}
    for name in names:
        factors[f"{name}/lora_a"] = jnp.asarray(rng.normal(size=(*batch, r, 3, 2)), jnp.float32)
        factors[f"{name}/lora_b"] = jnp.asarray(rng.normal(size=(*batch, r, 5)), jnp.float32)
    settings = {"r": r, "lora_alpha": 3, "target_modules": names} | config
    return StoredAdapter(config=jlora.LoraConfig(**settings), factors=factors, where=f"a{seed}")


def deltas(stored: StoredAdapter) -> dict[str, np.ndarray]:
    """Path -> scaling * A B, (batch, in, out) in float64."""
    result = {}
    for name, update in updates.updates(stored).items():
        a, b = (np.asarray(x, np.float64) for x in update.matrices())
        result[name] = update.scaling * np.einsum("nri,nro->nio", a, b)
    return result


def assert_near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        near = 1e-5 * max(1.0, np.abs(delta).max())
        np.testing.assert_allclose(found[name], delta, rtol=0, atol=near, err_msg=name)


def summed(read: list[StoredAdapter], weights: list[float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for stored, weight in zip(read, weights, strict=True):
        for name, delta in deltas(stored).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_cat_and_svd_of_full_rank_are_the_sum(data: st.DataObject) -> None:
    """Over ranks, alphas, rsLoRA, experts, signs, and layers that not all of them have."""
    count, batch = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([(), (7,)]))
    read, weights = [], []
    for seed in range(count):
        names = tuple(data.draw(st.sets(st.sampled_from(["q", "k", "x/v"]), min_size=1)))
        r, alpha = data.draw(st.sampled_from([1, 4])), data.draw(st.integers(1, 9))
        stabilised = data.draw(st.booleans())
        read.append(adapter(seed, r, names, batch, lora_alpha=alpha, use_rslora=stabilised))
        weights.append(data.draw(st.floats(-2, 2, width=32)))
    expected = summed(read, weights)
    whole = jlora.combine_adapters(read, weights, "cat")
    assert_near(deltas(whole), expected)
    assert {u.scaling for u in updates.updates(whole).values()} == {1.0}
    ranks = {name: u.r for name, u in updates.updates(whole).items()}
    assert ranks == {
        name: sum(stored.config.r for stored in read if f"{name}/lora_a" in stored.factors)
        for name in expected
    }
    cut = jlora.combine_adapters(read, weights, "svd", svd_rank=20)
    assert_near(deltas(cut), expected)
    assert all(u.r <= 5 for u in updates.updates(cut).values())


def test_svd_is_the_nearest_of_its_rank() -> None:
    read = [adapter(0, 3), adapter(1, 2)]
    expected = summed(read, [0.7, -1.0])
    found = jlora.combine_adapters(read, [0.7, -1.0])
    assert {name: u.r for name, u in updates.updates(found).items()} == {"q": 3, "v": 3}
    for name, delta in deltas(found).items():
        left = np.linalg.svd(expected[name][0], compute_uv=False)[3:]
        assert left.max() > 0.1
        apart = np.linalg.norm(expected[name] - delta)
        np.testing.assert_allclose(apart, np.linalg.norm(left), rtol=1e-4)
    a, b = (np.asarray(found.factors[f"q/lora_{x}"]).reshape(3, -1) for x in "ab")
    np.testing.assert_allclose((a**2).sum(1), (b**2).sum(1), rtol=1e-4)  # equally large


def test_svd_of_rows_of_any_length() -> None:
    """Small rows of A count as much as the rows of B that they go with are large."""
    read = adapter(0, 3)
    scale = jnp.asarray([1.0, 1e-9, 1e9])
    scaled = {}
    for path, leaf in read.factors.items():
        by = scale if path.endswith("lora_a") else 1 / scale
        scaled[path] = leaf * by.reshape(-1, *[1] * (leaf.ndim - 1))
    given = dataclasses.replace(read, factors=scaled)
    assert_near(deltas(jlora.combine_adapters([given], [1.0], "svd")), deltas(read))


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_itself(kind: str) -> None:
    density = 1.0 if kind in PRUNED else None
    found = jlora.combine_adapters([adapter(0)], [0.5], kind, density=density)
    assert_near(deltas(found), summed([adapter(0)], [0.5]))


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_same_is_the_sum(kind: str) -> None:
    """Without cross terms only where factors are not added up; ties averages."""
    density = 1.0 if kind in PRUNED else None
    found = jlora.combine_adapters([adapter(0)] * 2, [0.25, 0.25], kind, density=density)
    scale = 0.25 if "ties" in kind else 0.5
    if kind in ("linear", "dare_linear", "magnitude_prune"):
        scale = 1.0  # (2 sqrt(1/4) A) (2 sqrt(1/4) B)
    assert_near(deltas(found), summed([adapter(0)], [scale]))


def test_linear_has_cross_terms() -> None:
    read, weights = [adapter(0), adapter(1, lora_alpha=8)], [0.5, -0.8]
    found = deltas(jlora.combine_adapters(read, weights, "linear"))["q"][0]
    a, b = np.zeros((2, 6)), np.zeros((2, 5))
    for stored, weight in zip(read, weights, strict=True):
        root = np.sqrt(abs(weight) * stored.config.lora_alpha / 2)
        a += np.sign(weight) * root * np.asarray(stored.factors["q/lora_a"]).reshape(2, 6)
        b += root * np.asarray(stored.factors["q/lora_b"])
    np.testing.assert_allclose(found, a.T @ b, atol=1e-5)
    assert np.abs(found - summed(read, weights)["q"][0]).max() > 0.1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), count=st.integers(1, 4), total=st.booleans())
def test_ties_entry_by_entry(seed: int, count: int, total: bool) -> None:
    """Each entry, as the paper says it, in plain Python."""
    rng = np.random.default_rng(seed)
    tensors = rng.integers(-2, 3, (count, 1, 12)).astype(np.float32)
    weights = rng.normal(size=count)
    merge = mixture.Merge("ties", 1.0, "total" if total else "frequency")
    found = merge([jnp.asarray(x) for x in tensors], list(weights), [jax.random.key(0)] * count)
    for j in range(12):
        values = tensors[:, 0, j]
        vote = sum(values if total else np.sign(values))
        sign = 1 if vote >= 0 else -1
        kept = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        expected = sum(kept) / len(kept) if kept else 0
        np.testing.assert_allclose(found[0, j], expected, atol=1e-5)


def test_what_is_kept_is_the_largest_of_each_expert() -> None:
    x = jnp.asarray([[[1.0, -9, 3, 0]], [[50, 60, -70, 80]]])
    keys = [jax.random.key(0)]
    found = mixture.Merge("magnitude_prune", 0.5)([x], [2.0], keys)
    np.testing.assert_array_equal(found, [[[0, -18, 6, 0]], [[0, 0, -140, 160]]])


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_mean(kind: str) -> None:
    x = jnp.ones((1, 400, 400))
    keys = list(jax.random.split(jax.random.key(3)))
    found = mixture.Merge(kind, 0.25)([x, x], [1.0, 1.0], keys)
    kept = {0.0, 4.0, 8.0} if kind == "dare_linear" else {0.0, 4.0}
    assert set(np.unique(found)) == kept
    if kind == "dare_linear":
        np.testing.assert_allclose(found.mean(), 2, rtol=0.02)  # each adapter its own mask
        np.testing.assert_allclose((found == 8).mean(), 1 / 16, rtol=0.1)
    else:
        np.testing.assert_allclose((found == 4).mean(), 7 / 16, rtol=0.1)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties_svd"])
def test_what_is_dropped_depends_on_the_seed_and_the_layer_alone(kind: str) -> None:
    def combined(names: tuple[str, ...], seed: int = 0) -> dict[str, np.ndarray]:
        read = [adapter(0, names=names)] * 2  # the first layer's numbers are always the same
        return deltas(jlora.combine_adapters(read, [1.0, 0.5], kind, density=0.5, seed=seed))

    both, other = combined(("v", "q")), combined(("v", "q"), seed=1)
    np.testing.assert_array_equal(both["v"], combined(("v",))["v"])
    assert np.abs(both["v"] - other["v"]).max() > 0.1
    assert np.abs(both["v"] - combined(("q",))["q"]).max() > 0.1
    if kind == "dare_linear":  # of two like adapters with one mask, all entries would be alike
        a = np.abs(np.asarray(jlora.combine_adapters(
            [adapter(0)] * 2, [1.0, 0.5], kind, density=0.5
        ).factors["q/lora_a"] / adapter(0).factors["q/lora_a"]))  # fmt: skip
        assert len(np.unique(a.round(3))) == 4


def test_rslora_is_the_sum() -> None:
    """Where PEFT gives the square root of the new rank too much; see tests/parity."""
    read = [adapter(0, 4, use_rslora=True), adapter(1, 4)]
    for kind in ("cat", "svd"):
        found = jlora.combine_adapters(
            read, [1.0, 1.0], kind, **({"svd_rank": 8} if kind == "svd" else {})
        )
        assert found.config.use_rslora is False
        assert_near(deltas(found), summed(read, [1.0, 1.0]))


class TestConfiguration:
    def test_what_all_choose_alike_is_kept(self) -> None:
        read = [adapter(i, target_modules="all-linear", lora_dropout=0.1 * i) for i in (1, 2)]
        config = jlora.combine_adapters(read, [1, 1], "linear").config
        assert config == jlora.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.1)

    def test_otherwise_each_layer_is_named(self) -> None:
        read = [adapter(0, 2, ("m/q", "m/k")), adapter(1, 3, ("m/q", "m/v"))]
        found = jlora.combine_adapters(read, [1, 1], "cat")
        assert found.config == jlora.LoraConfig(
            r=5,
            lora_alpha=5,
            target_modules=r"m\.q|m\.k|m\.v",
            rank_pattern={r"^m\.k": 2, r"^m\.v": 3},
            alpha_pattern={r"^m\.k": 2, r"^m\.v": 3},
        )

    def test_names_that_end_in_others(self) -> None:
        class Block(nnx.Module):
            def __init__(self, rngs: nnx.Rngs):
                self.head, self.proj = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))

        class Model(nnx.Module):
            def __init__(self) -> None:
                rngs = nnx.Rngs(0)
                self.block, self.head = Block(rngs), nnx.Linear(4, 4, rngs=rngs)

        read = []
        for seed, names in enumerate((r"head", r"block\.proj")):
            config = jlora.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
            model = jlora.inject(Model(), config, rngs=nnx.Rngs(seed))
            read.append(checkpoint.gather(model, config))
        combined = jlora.combine_adapters(read, [1, 1], "cat")
        trained, _ = injection.partition(jlora.load_adapter(combined, Model()))
        assert {path.rpartition("/")[0] for path in trained} == {"head", "block/proj"}

    @pytest.mark.parametrize("stacked", [False, True])
    def test_on_a_model(self, stacked: bool, tmp_path: Path) -> None:
        """Layers of one model, some of them, in all forms: the outputs are those of the sum."""

        def plain() -> Mlp:
            return Mlp(nnx.Rngs(0), stacked=stacked)

        configs = [
            jlora.LoraConfig(r=2, target_modules=("layers.0", "layers.2"), init_lora_weights=False),
            jlora.LoraConfig(
                r=3, target_modules=r"layers\.[01]|lm_head", init_lora_weights=False,
                rank_pattern={"lm_head": 1}, use_rslora=True,
            ),
        ]  # fmt: skip
        x = jax.random.normal(jax.random.key(0), (4, 8))
        merged, base = [], injection.partition(plain(), everything=True)[0]
        for i, config in enumerate(configs):
            model = jlora.inject(plain(), config, rngs=nnx.Rngs(i))
            if i:
                jlora.export_peft(tmp_path / str(i), model, config)
            else:
                jlora.save_adapter(tmp_path / str(i), model, config)
            merged.append(injection.partition(jlora.merge(model), everything=True)[0])
        wanted = {
            path: leaf + 0.5 * (merged[0][path] - leaf) - 0.25 * (merged[1][path] - leaf)
            for path, leaf in base.items()
        }
        expected = plain()
        injection.update(expected, wanted)
        paths = [tmp_path / "0", tmp_path / "1"]
        combined = jlora.combine_adapters(paths, [0.5, -0.25], "cat")
        combined.save(tmp_path / "both")
        for source in (combined, tmp_path / "both"):
            model = jlora.load_adapter(source, plain())
            np.testing.assert_allclose(model(x), expected(x), atol=1e-5)
        again = adapters.read(tmp_path / "both")
        assert again.config == combined.config


REFUSED: dict[str, tuple[list[StoredAdapter], list[float], str, dict[str, Any], list[str]]] = {
    "numbers": (
        [adapter(0)], [1.0, float("nan")], "ties", {"density": 0, "svd_rank": 0},
        ["weights: 2 of them for 1 adapters", "weights must be finite, got nan",
         "density must be above 0 and at most 1, got 0", "svd_rank must be at least 1, got 0",
         "svd_rank: 'ties' decomposes nothing; leave it out"],
    ),
    "no such way": (
        [], [], "tie", {"majority_sign_method": "most"},
        ["adapters is empty: give at least one",
         "combination_type: no 'tie'; did you mean 'ties'",
         "majority_sign_method must be 'total' or 'frequency', got 'most'"],
    ),
    "no density": ([adapter(0)], [1.0], "dare_ties_svd", {},
                   ["density: 'dare_ties_svd' needs the part of the entries to keep"]),
    "not needed": (
        [adapter(0)], [1.0], "linear", {"density": 0.5, "majority_sign_method": "frequency"},
        ["density: 'linear' drops nothing", "majority_sign_method: 'linear' elects none"],
    ),
    "ranks": (
        [adapter(0, 2), adapter(1, 3)], [1.0, 1.0], "linear", {},
        ["q: ranks 2 and 3 in a0 and a1", "v: ranks 2 and 3",
         "ranks may differ for cat, svd and those that end in _svd"],
    ),
    "other weights": (
        [adapter(0), adapter(1, batch=(4,))], [1.0, 1.0], "svd", {},
        ["q: shapes (3, 2, 5) and (4, 3, 2, 5) in a0 and a1", "v: shapes (3, 2, 5)"],
    ),
    "more than factors": (
        [dataclasses.replace(adapter(0), factors=adapter(0).factors | {"q/bias": jnp.ones(5)}),
         dataclasses.replace(adapter(1), factors={"norm/scale": jnp.ones(5)})],
        [1.0, 1.0], "svd", {},
        ["a0 trains q/bias beside factors", "a1 trains norm/scale beside", "a1 has no factors"],
    ),
    "other bases": (
        [dataclasses.replace(adapter(i), tensors={"q.base_layer.weight": np.full(3, i)})
         for i in (0, 1)],
        [1.0, 1.0], "svd", {}, ["q.base_layer.weight: the base weights in a0 and a1 differ"],
    ),
    "bases that were not the same": (
        [dataclasses.replace(adapter(i), base=Fingerprint("Model", {"q": (2,)}, {"q": f"{i}"}))
         for i in (0, 1)],
        [1.0, 1.0], "svd", {}, ["a0 and a1 were trained on other bases: other values in 1 of 1: q"],
    ),
    "not finite": (
        [dataclasses.replace(
            adapter(0), factors=adapter(0).factors | {"q/lora_a": jnp.full((2, 3, 2), jnp.nan)}
        )],
        [1.0], "cat", {}, ["the combination is not finite at q/lora_a"],
    ),
    "not finite, cut": (
        [dataclasses.replace(
            adapter(0, 8), factors={
                path: leaf.at[(0,) * leaf.ndim].set(jnp.nan) if path == "q/lora_a" else leaf
                for path, leaf in adapter(0, 8).factors.items()
            }
        )],
        [1.0], "svd", {}, ["the combination is not finite at q/lora_a, q/lora_b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_all_reasons(case: str) -> None:
    read, weights, kind, options, problems = REFUSED[case]
    with pytest.raises(JloraError) as caught:
        jlora.combine_adapters(read, weights, kind, **options)
    assert [problem for problem in problems if problem not in str(caught.value)] == []
    assert str(caught.value).count("\n") <= len(problems)  # and nothing else


class TestCommand:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return write_model(tmp_path / "model")

    @pytest.fixture
    def two(self, model: Path, tmp_path: Path) -> list[str]:
        for i, names in enumerate([("q_proj",), ("q_proj", "up_proj")]):
            config = jlora.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
            injected = jlora.inject(jlora.load(model), config, rngs=nnx.Rngs(i))
            jlora.save_adapter(tmp_path / f"a{i}", injected, config)
        return [str(tmp_path / f"a{i}") for i in range(2)]

    def combine(self, two: list[str], to: Path, *more: str) -> None:
        cli.main(["combine", "--adapters", *two, "--weights", "1", "-0.5", "--to", str(to), *more])

    def test_orbax_and_peft(self, model: Path, two: list[str], tmp_path: Path, capsys) -> None:
        self.combine(two, tmp_path / "orbax")
        self.combine(two, tmp_path / "peft", "--model", str(model))
        assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'peft'}"
        expected = jlora.combine_adapters(two, [1, -0.5])
        assert repr(expected) == f"StoredAdapter(12 tensors, r=2, 'svd of {two[0]}, {two[1]}')"
        for form in ("orbax", "peft"):
            read = adapters.read(tmp_path / form)
            assert read.factors.keys() == expected.factors.keys()
            for path, leaf in expected.factors.items():
                np.testing.assert_array_equal(read.factors[path], leaf)
        config = peft.read_peft(tmp_path / "peft").config
        assert config.target_modules == ("q_proj", "up_proj")
        assert (config.r, config.lora_alpha) == (2, 2)

    def test_every_option(self, two: list[str], tmp_path: Path) -> None:
        flags = ("--combination-type", "dare_ties_svd", "--density", "0.5", "--seed", "3")
        flags += ("--majority-sign-method", "frequency", "--svd-rank", "1")
        self.combine(two, tmp_path / "to", *flags)
        expected = jlora.combine_adapters(
            two, [1, -0.5], "dare_ties_svd", density=0.5, seed=3,
            majority_sign_method="frequency", svd_rank=1,
        )  # fmt: skip
        for path, leaf in adapters.read(tmp_path / "to").factors.items():
            np.testing.assert_array_equal(leaf, expected.factors[path])

    def test_refused(self, model: Path, two: list[str], tmp_path: Path, capsys) -> None:
        for more, said in (
            (("--combination-type", "ties"), "density: 'ties' needs the part"),
            (("--model", str(tmp_path / "none")), "none/config.json does not exist"),
        ):
            with pytest.raises(SystemExit, match="2"):
                self.combine(two, tmp_path / "to", *more)
            assert said in capsys.readouterr().err
            assert not (tmp_path / "to").exists()
        with pytest.raises(SystemExit, match="2"):
            self.combine(two, Path(two[0]))
        assert "a0 exists already; choose another --to" in capsys.readouterr().err
