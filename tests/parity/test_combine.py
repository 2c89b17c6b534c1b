"""Combinations of adapters, against PEFT's `add_weighted_adapter`; and where it is at fault."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from counterpart import torch_model
from peft.tuners.lora.layer import LoraLayer

import jlora
from jlora import adapters, combination, mixture, norms, updates

WEIGHTS = {"one": [0.6], "two": [0.7, 0.4], "three": [1.3, -0.5, 0.25]}
# Scaling differs, and no two adapt the same layers.
CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj", "up_proj"]},
    {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"]},
]
RANKS = {"like": [4, 4, 4], "unlike": [2, 6, 3]}


def write(directory: Any, to: Path, configs: list[dict[str, Any]]) -> tuple[Any, list[Path]]:
    """PEFT's model with random adapters "adapter0", ..., and where they are saved."""
    torch.manual_seed(1)
    made = [peft.LoraConfig(init_lora_weights=False, **settings) for settings in configs]
    model = peft.get_peft_model(torch_model(directory), made[0], adapter_name="adapter0")
    for i, config in enumerate(made[1:], 1):
        model.add_adapter(f"adapter{i}", config)
    model.save_pretrained(to)
    return model, [to / f"adapter{i}" for i in range(len(made))]


def theirs(model: Any, weights: list[float], kind: str, **settings: Any) -> dict[str, np.ndarray]:
    """Path of each layer -> PEFT's combined update, (in, out)."""
    names = [f"adapter{i}" for i in range(len(weights))]
    model.add_weighted_adapter(names, weights, "mix", combination_type=kind, **settings)
    return {
        name.removeprefix("base_model.model.").replace(".", "/"): layer.get_delta_weight("mix")
        .detach()
        .numpy()
        .T
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and "mix" in layer.lora_A
    }


def ours(stored: Any) -> dict[str, np.ndarray]:
    result = {}
    for name, update in updates.updates(stored).items():
        a, b = (np.asarray(x, np.float64)[0] for x in update.matrices())
        result[name] = update.scaling * a.T @ b
    return result


def assert_near(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, cut: bool = True
) -> None:
    """`cut`: the rest of a decomposition was left out, which multiplies what rounding there was."""
    near = 1e-4 if cut else 1e-6
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert np.abs(delta).max() > 1e-3, name
        np.testing.assert_allclose(
            found[name], delta, atol=near * np.abs(delta).max(), rtol=0, err_msg=name
        )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Each mask that torch draws, in order."""
    masks: list[np.ndarray] = []
    draw = torch.bernoulli

    def recorded(probability: torch.Tensor) -> torch.Tensor:
        masks.append(draw(probability).numpy().astype(bool))
        return torch.tensor(masks[-1], dtype=probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", recorded)
    return masks


def by_key(masks: list[np.ndarray], layers: Any, read: list[Any], kind: str) -> dict[bytes, Any]:
    """The masks, in PEFT's order, by the keys that ours are drawn with; as ours are laid out."""
    result = {}
    for layer in layers:
        own = [i for i, stored in enumerate(read) if f"{layer}/lora_a" in stored.factors]
        keys = [mixture.key_of(0, layer, i) for i in own]
        if not kind.endswith("_svd"):
            pairs = [jax.random.split(key) for key in keys]
            for a in pairs:
                result[bits(a[0])] = masks.pop(0)
            keys = [pair[1] for pair in pairs]
        for key in keys:  # PEFT has B and the update itself the other way round
            result[bits(key)] = masks.pop(0).T
    assert not masks
    return result


def bits(key: Any) -> bytes:
    return np.asarray(jax.random.key_data(key)).tobytes()


CASES = [
    (kind, ranks, sign)
    for kind in combination.COMBINATION_TYPES
    for ranks in RANKS
    for sign in ("total", "frequency")
    if (ranks == "like" or kind == "cat" or kind.endswith("svd"))
    and (sign == "total" or "ties" in kind)
]


@pytest.mark.parametrize("count", ["two", "three"])
@pytest.mark.parametrize(("kind", "ranks", "sign"), CASES)
def test_like_peft(tiny, tmp_path, drawn, monkeypatch, kind, ranks, sign, count):
    weights = WEIGHTS[count]
    configs = [c | {"r": r} for c, r, _ in zip(CONFIGS, RANKS[ranks], weights, strict=False)]
    model, paths = write(tiny("llama"), tmp_path, configs)
    settings: dict[str, Any] = {}
    if kind.removesuffix("_svd") in mixture.PRUNED:
        settings["density"] = 0.6
    if "ties" in kind:
        settings["majority_sign_method"] = sign
    expected = theirs(model, weights, kind, **settings)
    read = [adapters.read(path) for path in paths]
    if "dare" in kind:
        masks = by_key(drawn, expected, read, kind)
        monkeypatch.setattr(
            mixture,
            "kept_at_random",
            lambda key, density, shape: masks.pop(bits(key)).reshape(shape),
        )
    found = jlora.combine_adapters(read, weights, kind, **settings)
    assert "dare" not in kind or not masks  # each was used
    assert_near(ours(found), expected, cut=kind.endswith("svd"))
    summed = ours(jlora.combine_adapters(read, weights, "cat"))
    far = [name for name in summed if not np.allclose(summed[name], expected[name], rtol=1e-3)]
    assert bool(far) == (kind != "cat")  # no other way is the sum: each shows what it does


@pytest.mark.parametrize("svd_rank", [1, 5])
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_a_rank_of_its_own(tiny, tmp_path, kind, svd_rank):
    model, paths = write(tiny("llama"), tmp_path, CONFIGS[:2])
    settings: dict[str, Any] = {"svd_rank": svd_rank}
    if kind == "ties_svd":
        settings["density"] = 0.5
    expected = theirs(model, [1.0, 0.5], kind, **settings)
    found = jlora.combine_adapters(paths, [1.0, 0.5], kind, **settings)
    assert_near(ours(found), expected)


def test_ranks_of_layers_of_their_own(tiny, tmp_path):
    configs = [c | {"rank_pattern": {"q_proj": 6}} for c in CONFIGS]
    model, paths = write(tiny("llama"), tmp_path, configs)
    for kind in ("cat", "linear", "svd"):
        expected = theirs(model, WEIGHTS["three"], kind)
        assert_near(ours(jlora.combine_adapters(paths, WEIGHTS["three"], kind)), expected)
        model.delete_adapter("mix")


def test_one_adapter_is_itself(tiny, tmp_path):
    model, paths = write(tiny("llama"), tmp_path, CONFIGS[:1])
    expected = theirs(model, [0.6], "cat")  # for one, PEFT does "linear" whatever it is asked for
    for kind in ("cat", "linear", "svd"):
        assert_near(ours(jlora.combine_adapters(paths, [0.6], kind)), expected)


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_peft_scales_rslora_wrongly(tiny, tmp_path, kind):
    """Its result keeps the first adapter's use_rslora, with alpha = r: a scaling of sqrt(r)."""
    stabilised = CONFIGS[0] | {"use_rslora": True}
    for first, second in ((stabilised, CONFIGS[1]), (CONFIGS[1], stabilised)):
        directory = tmp_path / str(first.get("use_rslora"))
        model, paths = write(tiny("llama"), directory, [first, second])
        expected = theirs(model, [0.7, 0.4], kind)
        found = jlora.combine_adapters(paths, [0.7, 0.4], kind)
        wrong = math.sqrt(8 if kind == "cat" else 4) if "use_rslora" in first else 1.0
        assert_near({name: wrong * delta for name, delta in ours(found).items()}, expected)
        if kind == "cat":  # and ours is the sum
            each = [ours(adapters.read(path)) for path in paths]
            q = "model/layers/0/self_attn/q_proj"
            summed = 0.7 * each[0][q] + 0.4 * each[1][q]
            np.testing.assert_allclose(ours(found)[q], summed, atol=1e-6)


def test_peft_loses_layers_that_the_first_adapter_leaves_out(tiny, tmp_path):
    """Its result has the first adapter's layers_to_transform and exclude_modules."""
    first = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    model, paths = write(tiny("llama"), tmp_path, [first, {"target_modules": ["q_proj"]}])
    expected = theirs(model, [0.7, 0.4], "svd")
    found = ours(jlora.combine_adapters(paths, [0.7, 0.4], "svd"))
    assert len(expected) == 1
    assert len(found) == 3
    assert_near({name: found[name] for name in expected}, expected)
    second = ours(adapters.read(paths[1]))
    for name in found.keys() - expected.keys():
        np.testing.assert_allclose(found[name], 0.4 * second[name], atol=1e-6)


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_a_combination_in_peft(tiny, tmp_path, kind):
    """Written for a model, it is what PEFT itself makes of the same adapters."""
    model, paths = write(tiny("llama"), tmp_path / "theirs", CONFIGS)
    expected = theirs(model, WEIGHTS["three"], kind)
    combined = jlora.combine_adapters(paths, WEIGHTS["three"], kind)
    flax = jlora.load_adapter(combined, jlora.load(tiny("llama")))
    jlora.export_peft(tmp_path / "ours", flax, combined.config)
    fresh = peft.PeftModel.from_pretrained(torch_model(tiny("llama")), tmp_path / "ours")
    assert ours(adapters.read(tmp_path / "ours")).keys() == expected.keys()
    for name, layer in fresh.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".", "/")
            delta = layer.get_delta_weight("default").detach().numpy().T
            np.testing.assert_allclose(delta, expected[name], atol=1e-6, err_msg=name)
    assert norms.delta_norms(adapters.read(tmp_path / "ours")) == norms.delta_norms(combined)
