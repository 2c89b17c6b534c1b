"""Which layers a configuration chooses, with which rank and scaling."""

import dataclasses
import math

import pytest
from flax import nnx

import jlora
from jlora import adapter, injection, targets
from jlora.adapter import Site, Target, layer_path
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.models.transformer import CausalLM, ModelConfig

LAYERS = 12  # two digits: layer 1 is no layer 11
MODULES = ("self_attn/q_proj", "self_attn/v_proj", "mlp/up_proj")
UNROLLED = [
    Site(f"model/layers/{i}/{module}", (6, 4), (0,), (1,))
    for i in range(LAYERS)
    for module in MODULES
]
STACKED = [
    Site(f"model/layers/{module}", (LAYERS, 6, 4), (1,), (2,), (0,), 1, "model/layers")
    for module in MODULES
]
HEAD = Site("lm_head", (6, 9), (0,), (1,))


def chosen(sites: list[Site], head: str | None = "lm_head", **config) -> dict[str, Target]:
    """Layer's dotted name -> its target."""
    plan = targets.plan(LoraConfig(**config), [*sites, HEAD], head).targets
    return {name.replace("/", "."): target for target in plan for name in target.site.names}


def names(*modules: str, layers=range(LAYERS)) -> set[str]:
    return {f"model.layers.{i}.{m.replace('/', '.')}" for i in layers for m in modules}


def describe(parameter: dict | set[str]) -> str:
    """Sets print in another order in each process, which pytest-xdist takes for other tests."""
    return str(parameter) if isinstance(parameter, dict) else f"{len(parameter)} layers"


@pytest.mark.parametrize("sites", [UNROLLED, STACKED], ids=["unrolled", "stacked"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, names(*MODULES)),
        ({"target_modules": "all-linear"}, names(*MODULES)),
        ({"target_modules": ("q_proj",)}, names("self_attn/q_proj")),
        ({"target_modules": ["q_proj", "up_proj"]}, names("self_attn/q_proj", "mlp/up_proj")),
        ({"target_modules": ("self_attn.v_proj",)}, names("self_attn/v_proj")),
        ({"target_modules": ("lm_head", "q_proj")}, names("self_attn/q_proj") | {"lm_head"}),
        ({"target_modules": ("lm_head",)}, {"lm_head"}),
        ({"target_modules": r".*\.(q|v)_proj"}, names("self_attn/q_proj", "self_attn/v_proj")),
        ({"target_modules": r".*self_attn.*|lm_head"}, names(*MODULES[:2]) | {"lm_head"}),
        ({"exclude_modules": ("mlp.up_proj",)}, names(*MODULES[:2])),
        ({"exclude_modules": r".*\.self_attn\..*"}, names("mlp/up_proj")),
        ({"target_modules": ("q_proj",), "layers_to_transform": range(12)}, names(MODULES[0])),
    ],
    ids=describe,
)
def test_names(sites: list[Site], config: dict, expected: set[str]) -> None:
    assert set(chosen(sites, **config)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ("layers.1.self_attn.q_proj",)}, names(MODULES[0], layers=[1])),
        ({"layers_to_transform": (1, 11)}, names(*MODULES, layers=[1, 11])),
        ({"layers_to_transform": [0]}, names(*MODULES, layers=[0])),
        (
            {"exclude_modules": r"model\.layers\.(0|11)\..*", "target_modules": ("v_proj",)},
            names("self_attn/v_proj", layers=range(1, 11)),
        ),
        # A layer's index is its own, so the head has none.
        ({"target_modules": ("lm_head", "q_proj"), "layers_to_transform": (2,)},
         names(MODULES[0], layers=[2])),
    ],
    ids=describe,
)  # fmt: skip
def test_single_layers(config: dict, expected: set[str]) -> None:
    assert set(chosen(UNROLLED, **config)) == expected


@pytest.mark.parametrize("pattern", [("proj",), ("attn.q_proj",), "q_proj", ".*q"])
def test_a_part_of_a_name_is_no_match(pattern: str | tuple[str, ...]) -> None:
    with pytest.raises(JloraError, match="LoraConfig matches nothing:\n  target_modules: "):
        chosen(UNROLLED, target_modules=pattern)


def test_all_linear_takes_the_head_where_nothing_says_it_is_one() -> None:
    assert "lm_head" in chosen(UNROLLED, head=None)


class Named(nnx.Module):
    output_head = "decoder"

    def __init__(self) -> None:
        self.body = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.lm_head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.decoder = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


class Unnamed(Named):
    output_head = None


@pytest.mark.parametrize(("cls", "head"), [(Named, "decoder"), (Unnamed, "lm_head")])
def test_the_head_is_named_by_the_model_or_known_by_its_name(cls: type, head: str) -> None:
    plan = injection.plan(cls(), LoraConfig()).targets
    assert {target.site.path for target in plan} == {"body", "lm_head", "decoder"} - {head}


@pytest.mark.parametrize(
    ("pattern", "q_of_layer_1", "q_of_layer_11", "up_of_layer_1"),
    [
        ({"q_proj": 2}, 2, 2, 8),
        ({"proj": 2}, 8, 8, 8),  # no part of a component, unless a pattern says so
        ({".*proj": 2}, 2, 2, 2),
        ({"layers.1.self_attn.q_proj": 2}, 2, 8, 8),
        ({"model.layers.1.self_attn.q_proj": 2}, 2, 8, 8),
        ({r"layers\.\d\..*": 2}, 2, 8, 2),
        ({r"1\.mlp\.up_proj": 3, ".*_proj": 2}, 2, 2, 3),
        ({".*_proj": 2, r"1\.mlp\.up_proj": 3}, 2, 2, 2),  # the first wins
        ({"q_proj|up_proj": 2}, 2, 2, 2),
    ],
    ids=str,
)
def test_patterns_of_rank_and_alpha(pattern, q_of_layer_1, q_of_layer_11, up_of_layer_1) -> None:
    where = (
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    )
    expected = [q_of_layer_1, q_of_layer_11, up_of_layer_1]
    if expected == [8, 8, 8]:
        with pytest.raises(JloraError, match=r"rank_pattern: 'proj'; nearest: "):
            chosen(UNROLLED, rank_pattern=pattern)
        return
    ranked = chosen(UNROLLED, rank_pattern=pattern)
    assert [ranked[name].r for name in where] == expected
    assert [ranked[name].alpha for name in where] == [8, 8, 8]  # a rank changes no alpha
    assert [ranked[name].scaling for name in where] == [8 / r for r in expected]
    scaled = chosen(UNROLLED, alpha_pattern=pattern)
    assert [scaled[name].alpha for name in where] == expected
    assert [scaled[name].scaling for name in where] == [alpha / 8 for alpha in expected]


def test_rank_stabilised_scaling_uses_the_sites_own_rank_and_alpha() -> None:
    plan = chosen(
        UNROLLED, r=16, lora_alpha=32, use_rslora=True,
        rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 6},
    )  # fmt: skip
    scalings = {name.split(".")[-1]: target.scaling for name, target in plan.items()}
    assert scalings == {"q_proj": 32 / 2, "v_proj": 6 / 4, "up_proj": 32 / 4}


def test_every_pattern_that_matches_nothing_is_named_with_its_nearest() -> None:
    with pytest.raises(JloraError) as caught:
        chosen(
            UNROLLED,
            target_modules=("q_prj", "v_proj", "self_attn.k_proj"),
            exclude_modules=r".*\.up",
            rank_pattern={"vv_proj": 4, "v_proj": 2},
            alpha_pattern={"(": 3},
            layers_to_transform=(3, 12),
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "LoraConfig matches nothing:"
    starts = [
        "  target_modules: 'q_prj'; nearest: q_proj",
        "  target_modules: 'self_attn.k_proj'; nearest: self_attn.",
        r"  exclude_modules: '.*\\.up'; nearest: ",
        "  rank_pattern: 'vv_proj'; nearest: v_proj",
        "  layers_to_transform: no layer 12; there are 0 to 11",
        "  alpha_pattern: '(.*\\\\.)?(()$' is no regular expression: ",
    ]
    assert len(lines) == 1 + len(starts)
    for line, start in zip(lines[1:], starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": (1, 3)},
        {"rank_pattern": {r"layers\.1\..*": 2}},
        {"alpha_pattern": {r"layers\.1\..*": 4}},
        {"exclude_modules": r".*layers\.(1|5)\..*", "rank_pattern": {"q_proj": 3}},
    ],
)
def test_layers_of_a_stack_are_told_apart_as_in_the_unrolled_model(config: dict) -> None:
    def each(model: list) -> dict:
        plan = targets.plan(LoraConfig(r=4, **config), [*model, HEAD], "lm_head")
        names = adapter.iter_names(plan.targets)
        return {n: (t.r, t.alpha, t.scaling) for n, t in names}, plan.parameters

    unrolled, stacked = each(UNROLLED), each(STACKED)
    assert stacked == unrolled
    assert len(set(unrolled[0].values())) > 1 or len(unrolled[0]) < len(UNROLLED)


def test_nothing_left() -> None:
    with pytest.raises(JloraError, match="every targeted module is excluded again"):
        chosen(UNROLLED, target_modules=("q_proj",), exclude_modules=("self_attn.q_proj",))
    with pytest.raises(JloraError, match="the model has no such layers at all"):
        targets.plan(LoraConfig(target_modules=("q_proj",)), [])


def test_names_of_layers() -> None:
    assert layer_path("a/b/c", "a", 2) == "a/2/b/c"
    assert layer_path("a/b", "a/b", 0) == "a/b/0"
    assert layer_path("a/b", None, 0) == "a/b"
    assert STACKED[2].names == tuple(f"model/layers/{i}/mlp/up_proj" for i in range(LAYERS))
    assert (STACKED[0].in_shape, STACKED[0].out_shape, STACKED[0].batch_shape) == (
        (6,),
        (4,),
        (12,),
    )


SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5,
    inv_freq=(1.0,) * 32, tie_word_embeddings=True,
)  # fmt: skip
LLAMA2_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-5,
    inv_freq=(1.0,) * 64, tie_word_embeddings=False,
)  # fmt: skip


def abstract(config: ModelConfig, lora: LoraConfig | None) -> CausalLM:
    """The model's shapes; no weight is made."""

    def make() -> CausalLM:
        model = CausalLM(config, rngs=nnx.Rngs(0), scan_layers=True)
        return model if lora is None else jlora.inject(model, lora, rngs=nnx.Rngs(0))

    return nnx.eval_shape(make)


def test_parameters_of_smollm2() -> None:
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)
    model = abstract(SMOLLM2, config)
    d, kv, m = 576, 3 * 64, 1536
    formula = 30 * 16 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + m))  # r (in + out) a layer
    assert injection.count(model) == (formula, 134_515_008 + formula) == (4_884_480, 139_399_488)
    assert jlora.summary(model) == (
        "trainable params: 4,884,480 || all params: 139,399,488 || trainable%: 3.5039"
    )


def test_parameters_of_llama2() -> None:
    model = abstract(LLAMA2_7B, None)
    assert injection.count(model) == (0, 6_738_415_616)
    config = LoraConfig(r=8, target_modules=("q_proj", "v_proj"))
    plan = injection.plan(model, config).targets
    assert sum(target.parameters for target in plan) == 4_194_304
    wide = injection.plan(model, dataclasses.replace(config, r=32)).targets
    assert math.isclose(sum(target.parameters for target in wide), 4 * 4_194_304)
