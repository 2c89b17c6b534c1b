"""What a user reads who asked for something that cannot be done; and that nothing was touched."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from transform_cases import quick  # noqa: F401

import jlora
from jlora.errors import JloraError

pytestmark = pytest.mark.usefixtures("quick")

X = jnp.ones((2, 6))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4, name="up_proj")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(6, name="down_proj")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up_proj = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.down_proj = nnx.Linear(4, 6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.norm(self.up_proj(x)))


def config(**changes: Any) -> jlora.LoraConfig:
    return jlora.LoraConfig(**({"r": 2, "lora_alpha": 4} | changes))


def attempts(flavour: str, changed: jlora.LoraConfig) -> list[Any]:
    """The calls that a configuration can fail in."""
    if flavour == "nnx":
        return [
            lambda: jlora.inject(NnxModel(nnx.Rngs(0)), changed, rngs=nnx.Rngs(0)),
            lambda: jlora.plan_targets(NnxModel(nnx.Rngs(0)), changed),
        ]
    return [
        lambda: jlora.inject(LinenModel(), changed).init(jax.random.key(0), X),
        lambda: jlora.plan_targets(LinenModel(), changed, X),
    ]


UNMATCHED = {
    "no match": (
        {"target_modules": ("up_prj",)},
        r"(?s)matches nothing:\s+target_modules: 'up_prj'; nearest: up_proj",
    ),
    "no match of several": (
        {"target_modules": ("up_proj", "dwn_proj")},
        r"target_modules: 'dwn_proj'; nearest: down_proj",
    ),
    "no match of a regular expression": (
        {"target_modules": r".*\.up_prj"},
        r"target_modules: '.*up_prj'; nearest: up_proj",
    ),
    "no match of what is left out": (
        {"exclude_modules": ("down",)},
        r"exclude_modules: 'down'; nearest: down_proj",
    ),
    "no match of a rank": ({"rank_pattern": {"dwn_proj": 3}}, r"rank_pattern: 'dwn_proj'"),
    "a norm": (
        {"target_modules": ("norm",)},
        r"target_modules: 'norm'; norm is there, but is of no type that can be adapted "
        r".*modules_to_save trains a module as a whole",
    ),
    "nothing saved": ({"modules_to_save": ("nrm",)}, r"modules_to_save: 'nrm'; nearest: norm"),
    "all left out": (
        {"exclude_modules": ("up_proj", "down_proj")},
        r"every targeted module is excluded again: nothing is left to train",
    ),
    "no such layer": ({"layers_to_transform": (1,)}, r"layers_to_transform: no layer 1; .*none"),
    "no embedding": (
        {"trainable_token_indices": {"embed": (1,)}},
        r"trainable_token_indices: no embedding 'embed'; there are: none",
    ),
}


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize(("changes", "message"), UNMATCHED.values(), ids=UNMATCHED)
def test_patterns_that_match_nothing(flavour: str, changes: dict, message: str) -> None:
    for attempt in attempts(flavour, config(**changes)):
        with pytest.raises(JloraError, match=message):
            attempt()


@pytest.mark.parametrize(("changes", "message"), UNMATCHED.values(), ids=UNMATCHED)
def test_a_refused_nnx_model_is_untouched(changes: dict, message: str) -> None:
    model = NnxModel(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    bits = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    with pytest.raises(JloraError, match=message):
        jlora.inject(model, config(**changes), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == graphdef
    assert type(model.up_proj) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), bits)
    jlora.inject(model, config(), rngs=nnx.Rngs(0))  # and can still be injected


def test_a_refused_linen_module_is_untouched() -> None:
    module = LinenModel()
    before = module.init(jax.random.key(0), X)
    with pytest.raises(JloraError, match="nearest: up_proj"):
        jlora.inject(module, config(target_modules=("up_prj",))).init(jax.random.key(0), X)
    after = module.init(jax.random.key(0), X)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_injecting_twice(flavour: str) -> None:
    if flavour == "linen":
        module = jlora.inject(LinenModel(), config())
        before = module.init(jax.random.key(0), X)
        with pytest.raises(JloraError, match=r"holds adapters already: jlora\.eject\(module\)"):
            jlora.inject(module, config(r=1))
        after = module.init(jax.random.key(0), X)
        jax.tree.map(np.testing.assert_array_equal, after, before)
        return
    model = jlora.inject(NnxModel(nnx.Rngs(0)), config(), rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(JloraError, match=r"holds adapters already: jlora\.eject\(model\)"):
        jlora.inject(model, config(r=1), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == graphdef


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_rank_above_the_layers_dimensions_is_a_warning(flavour: str) -> None:
    message = r"the rank is above what the weight itself can have at (?=.*up_proj \(5 > 4\)).*down"
    for attempt in attempts(flavour, config(r=5)):
        with pytest.warns(UserWarning, match=message):
            attempt()
    for attempt in attempts(flavour, config(r=4)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            attempt()


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_bare_layer_has_no_path(flavour: str) -> None:
    layer: Any = nn.Dense(4) if flavour == "linen" else nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(JloraError, match=r"the model is itself a (Dense|Linear) layer: put it in"):
        jlora.inject(layer, config(), **({} if flavour == "linen" else {"rngs": nnx.Rngs(0)}))


@pytest.mark.parametrize("given", [{"rngs": jax.random.key(0)}, {"inputs": (X,)}])
def test_what_is_for_nnx_alone(given: dict[str, Any]) -> None:
    with pytest.raises(JloraError, match=r"rngs and inputs are for NNX models"):
        jlora.inject(LinenModel(), config(), **given)


def test_nnx_without_random_numbers() -> None:
    model = NnxModel(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(JloraError, match=r"inject needs rngs=nnx\.Rngs"):
        jlora.inject(model, config())
    assert nnx.graphdef(model) == graphdef


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, r"r must be a positive integer, got 0"),
        ({"r": -3}, r"r must be a positive integer, got -3"),
        ({"r": 1.5}, r"r must be a positive integer, got 1\.5"),
        ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] must be a positive integer, got 0"),
        ({"lora_alpha": 0}, r"lora_alpha must be positive, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1\.0"),
        ({"target_modules": ()}, r"target_modules is empty; name layers or say 'all-linear'"),
        ({"modules_to_save": "norm"}, r"modules_to_save must be a list, got 'norm'"),
        ({"bias": "some"}, r"bias must be 'none', 'all' or 'lora_only', got 'some'"),
        ({"lora_alhpa": 3}, r"unknown field 'lora_alhpa'; did you mean 'lora_alpha'"),
        ({"use_dora": True}, r"PEFT's use_dora = True is not supported yet"),
        ({"fan_in_fan_out": True, "rank": 1}, r"fan_in_fan_out = True is .*; unknown field 'rank'"),
    ],
)
def test_values_of_a_configuration(values: dict, message: str) -> None:
    with pytest.raises(JloraError, match=message):
        jlora.LoraConfig(**values)


def test_settings_of_peft_at_their_default_are_passed_over() -> None:
    assert jlora.LoraConfig(use_dora=False, layers_pattern=None) == jlora.LoraConfig()
