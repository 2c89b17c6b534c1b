"""config.json: each field as transformers takes it, or refused by its name."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

import jlora
from jlora.errors import JloraError
from jlora.models import families
from jlora.models.attention import causal_attention, windowed
from jlora.models.transformer import CausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
FIELDS: dict[str, list[Any]] = {
    "num_key_value_heads": [None, 0, 1, 2, 8, 2.0, True, "2"],
    "head_dim": [None, 0, 4, 16, 16.0, True],
    "rms_norm_eps": [None, 1e-6, 0.5, True, "1e-6"],
    "hidden_act": [None, "silu", "swish"],
    "tie_word_embeddings": [None, True, False, 1, "true"],
    "max_position_embeddings": [None, 64, 64.0, "64"],
    "attention_bias": [None, True, 1],
    "mlp_bias": [None, True, "no"],
    "sliding_window": [None, 16, 1, "16", 2.5],
    "use_sliding_window": [True, False],
    "max_window_layers": [None, 0, 2, 40, "2", 1.5],
    "layer_types": [
        None, ["full_attention"] * 3, ["full_attention"] * 2, ["sliding_attention"] * 3,
        ["full_attention", "sliding_attention", "full_attention"],
    ],
}  # fmt: skip
CASES = [
    (kind, {key: value})
    for kind in families.FAMILIES
    for key, values in FIELDS.items()
    for value in values
    if not (key == "layer_types" and not kind.startswith("qwen"))  # where it says nothing
]
CASES += [
    ("qwen2", {"use_sliding_window": True, key: value})
    for key in ("sliding_window", "max_window_layers", "layer_types")
    for value in FIELDS[key]
]
CASES += [(kind, {}) for kind in families.FAMILIES]


def read(at: Path, **about: Any) -> Any:
    (at / "config.json").write_text(json.dumps(about))
    return families.read_config(at)


def theirs(about: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of ours as transformers' configuration has them; None where it refuses."""
    try:
        c = transformers.AutoConfig.for_model(**json.loads(json.dumps(about)))
    except Exception:
        return None
    windows = [None] * c.num_hidden_layers
    if c.model_type == "mistral":
        windows = [c.sliding_window] * c.num_hidden_layers
    elif c.model_type.startswith("qwen"):
        if None in (c.sliding_window,) and "sliding_attention" in c.layer_types:
            return None  # its model raises at the first call
        windows = [c.sliding_window if k == "sliding_attention" else None for k in c.layer_types]
    heads = c.num_attention_heads
    return {
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // heads,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "max_position_embeddings": c.max_position_embeddings,
        "windows": tuple(windows) if any(windows) else (),
        "o_bias": c.model_type != "qwen2" and getattr(c, "attention_bias", False)
        if c.model_type != "mistral"
        else False,
        "qkv_bias": c.model_type == "qwen2"
        or (c.model_type != "mistral" and getattr(c, "attention_bias", False)),
        "mlp_bias": c.model_type == "llama" and c.mlp_bias,
    }


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_fields_are_those_of_transformers(kind: str, changes: dict, tmp_path: Path) -> None:
    about = {"model_type": kind, **SIZES, **changes}
    if kind.startswith("qwen") and "num_key_value_heads" not in changes:
        about["num_key_value_heads"] = 8  # 32 is no divisor of the heads
    expected = theirs(about)
    if expected is None or _means_nothing(changes):
        with pytest.raises(JloraError, match="|".join(changes)):
            read(tmp_path, **about)
        return
    got = read(tmp_path, **about)
    assert {key: getattr(got, key) for key in expected} == expected


def _means_nothing(changes: dict) -> bool:
    """What transformers' configuration takes, and its model then fails with."""
    heads, size = changes.get("num_key_value_heads", 1), changes.get("head_dim", 16)
    return heads == 0 or size == 0 or type(size) in (float, bool)


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (("architectures",), None),
        (("model_type",), None),
        (("architectures", "model_type"), "this architecture is not supported; these are: llama"),
    ],
)
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_the_family_by_either_name(absent, said, kind, tmp_path: Path) -> None:
    about = {"model_type": kind, "architectures": [families.FAMILIES[kind].architecture], **SIZES,
             "num_key_value_heads": 2}  # fmt: skip
    whole = read(tmp_path, **about)
    about = {key: value for key, value in about.items() if key not in absent}
    if said is None:
        assert read(tmp_path, **about) == whole
    else:
        with pytest.raises(JloraError, match=said):
            read(tmp_path, **about)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, tuple[dict[str, Any], str]] = {
    "a theta of zero": ({"rope_theta": 0}, r"rope_theta 0 \(only a positive number\)"),
    "a theta of null": ({"rope_theta": None}, "rope_theta None"),
    "a theta below zero": ({"rope_theta": -1e4}, "rope_theta -10000"),
    "a theta in words": ({"rope_theta": "abc"}, "rope_theta 'abc'"),
    "no number": ({"rope_theta": float("nan")}, "rope_theta nan"),
    "infinity": ({"rope_theta": float("inf")}, "rope_theta inf"),
    "beyond every float": ({"rope_theta": 10**400}, "rope_theta 1000"),
    "a factor beyond every float": (
        {"rope_scaling": {"type": "linear", "factor": 10**309}}, r"rope_scaling\.factor 1000"
    ),
    "true": ({"rope_theta": True}, "rope_theta True"),
    "a theta within": ({"rope_parameters": {"rope_theta": 0}}, r"rope_parameters\.rope_theta 0"),
    "null within": ({"rope_scaling": {"rope_theta": None}}, r"rope_scaling\.rope_theta None"),
    "a theta that float32 has not": ({"rope_theta": 1e-320}, "float32"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, r"'linear' lacks rope_scaling\.factor"),
    "a factor of null": (
        {"rope_scaling": {"type": "linear", "factor": None}}, r"rope_scaling\.factor None"
    ),
    "a factor of zero": (
        {"rope_parameters": {"type": "linear", "factor": 0.0}}, r"rope_parameters\.factor 0\.0"
    ),
    "a factor in words": ({"rope_scaling": LLAMA3 | {"factor": "8"}}, r"rope_scaling\.factor '8'"),
    "low above high": (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, r"high_freq_factor 4 \(only above"
    ),
    "an original length of null": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
        "original_max_position_embeddings None",
    ),
    "an original length of null at the top": (
        {
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16},
            "original_max_position_embeddings": None,
        },
        " original_max_position_embeddings None",
    ),
    "a kind of null": ({"rope_scaling": {"rope_type": None}}, "of kind None"),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        r"rotary scaling: rope_scaling of kind 'yarn' \(only default, linear, llama3\)",
    ),
    "longrope beside": (
        {"rope_scaling": {"type": "longrope"}, "rope_parameters": {"rope_theta": 5.0}}, "'longrope'"
    ),
    "one for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "rope_parameters for each kind of layer, full_attention",
    ),
    "no object": ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    "a list": ({"rope_parameters": [1]}, r"rope_parameters \[1\]"),
    "a part of the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "a part of the head within": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        r"rope_parameters\.partial_rotary_factor 0\.5",
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "an activation": ({"hidden_act": "gelu"}, r"hidden_act 'gelu' \(only 'silu'"),
    "a null size": ({"hidden_size": None}, "hidden_size None"),
    "a size of zero": ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    "a fraction": ({"vocab_size": 97.5}, "vocab_size 97.5"),
    "an eps below zero": ({"rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    "an odd head": ({"head_dim": 5}, "head_dim 5"),
    "quantised otherwise": ({"quantization_config": {"bits": 4}}, "quantization_config of None"),
    "quantised in a word": ({"quantization_config": "gptq"}, "quantization_config of 'gptq'"),
    "other weights": ({"transformers_weights": "x.safetensors"}, "transformers_weights"),
    "another model type": ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    "two families": ({"architectures": ["Qwen3ForCausalLM"]}, "are of two families"),
    "a model type in a list": ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
    "a number for a class": ({"architectures": 3}, "architecture '3' is not supported"),
    "an object for a class": ({"architectures": [{}]}, r"architecture '\{\}' is not supported"),
    "an eps beyond every float": ({"rms_norm_eps": 10**400}, "rms_norm_eps 1000"),
    "a class of none": (
        {"architectures": ["GPT2LMHeadModel"]},
        "'GPT2LMHeadModel' is not supported",
    ),
    "two fields at once": (
        {"hidden_act": "relu", "head_dim": -1},
        "head_dim -1.*hidden_act 'relu'",
    ),
}


@pytest.mark.parametrize(
    ("changes", "said"), [*ROPES.values(), *OTHERS.values()], ids=[*ROPES, *OTHERS]
)
def test_what_is_refused_is_named(changes: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(JloraError, match=said) as caught:
        read(tmp_path, **{"model_type": "llama", **SIZES, **changes})
    assert str(tmp_path) in str(caught.value)


def test_rope_scaling_beats_rope_parameters(tmp_path: Path) -> None:
    def freq(**changes: Any) -> np.ndarray:
        return np.asarray(read(tmp_path, model_type="llama", **SIZES, **changes).inv_freq)

    own = {"rope_parameters": {"rope_type": "default", "rope_theta": 81.0}, "rope_theta": 16.0}
    power = -np.arange(4) / 4
    np.testing.assert_allclose(freq(**own), 81.0**power, rtol=1e-6)
    np.testing.assert_allclose(freq(**own, rope_scaling={}), 81.0**power, rtol=1e-6)
    linear = {"type": "linear", "factor": 2.0}
    # The theta at the top, not the other table's.
    np.testing.assert_allclose(freq(**own, rope_scaling=linear), 16.0**power / 2, rtol=1e-6)
    linear |= {"rope_theta": 625.0}
    np.testing.assert_allclose(freq(**own, rope_scaling=linear), 625.0**power / 2, rtol=1e-6)
    # llama3's original length is max_position_embeddings where nothing says it.
    said = LLAMA3 | {"original_max_position_embeddings": 64}
    assert (freq(rope_scaling=LLAMA3, max_position_embeddings=64) == freq(rope_scaling=said)).all()
    assert (freq(rope_scaling=LLAMA3) != freq(rope_scaling=said)).any()


@pytest.mark.parametrize("within", [{}, {"original_max_position_embeddings": 512}])
@pytest.mark.parametrize("table", ["rope_scaling", "rope_parameters"])
def test_the_original_length_at_the_top_beats_that_within(within, table, tmp_path: Path) -> None:
    """Write it as Phi-3 does; transformers moves it into the table for each family."""
    about = {"model_type": "llama", **SIZES, "max_position_embeddings": 1024}
    top = {table: LLAMA3 | within, "original_max_position_embeddings": 64}
    expected = {table: LLAMA3 | {"original_max_position_embeddings": 64}}
    got = read(tmp_path, **about, **top).inv_freq
    assert got == read(tmp_path, **about, **expected).inv_freq
    assert got != read(tmp_path, **about, **{table: LLAMA3 | within}).inv_freq
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}  # which has no use for it
    assert read(tmp_path, **about, **linear, original_max_position_embeddings=None).inv_freq


def test_nothing_said_of_a_part_of_the_head(tmp_path: Path) -> None:
    about = {"model_type": "llama", **SIZES}
    assert read(tmp_path, **about, partial_rotary_factor=None) == read(tmp_path, **about)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "{", "\ufeff{}", ""])
def test_what_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(JloraError, match=r"config\.json is not JSON"):
        families.read_config(tmp_path)


class TestWindows:
    @pytest.mark.parametrize("window", [1, 3, 8, 20])
    def test_a_query_sees_so_many_slots(self, window: int) -> None:
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(2, 8, 2, 4)), jnp.float32) for _ in range(3))
        real = jnp.asarray([[True] * 8, [False] * 2 + [True] * 6])
        got = causal_attention(q, k, v, windowed(real, None, window))
        for row, i in itertools.product(range(2), range(8)):
            keys = [j for j in range(8) if i - window < j <= i and real[row, j]]
            if not keys:
                continue
            for head in range(2):
                scores = np.asarray(q[row, i, head] @ k[row, jnp.asarray(keys), head].T) / 2
                share = np.exp(scores - scores.max())
                expected = share / share.sum() @ np.asarray(v[row, jnp.asarray(keys), head])
                np.testing.assert_allclose(got[row, i, head], expected, rtol=1e-5, atol=1e-6)

    def test_mistral_has_one_where_its_key_is_absent(self, tmp_path: Path) -> None:
        about = {"model_type": "mistral", **SIZES}
        assert read(tmp_path, **about).windows == (4096,) * 3
        assert read(tmp_path, **about, sliding_window=None).windows == ()

    def test_layers_that_differ_are_stacked_while_rows_are_within(self, tmp_path: Path) -> None:
        model_dir = helpers.write_model(
            tmp_path / "m", architectures=["Qwen2ForCausalLM"], use_sliding_window=True,
            sliding_window=6, max_window_layers=1,
        )  # fmt: skip
        tokens = jnp.arange(3, 13, dtype=jnp.int32)[None]
        unrolled, stacked = (jlora.load(model_dir, scan_layers=scan) for scan in (False, True))
        np.testing.assert_allclose(
            stacked(tokens[:, :6]), unrolled(tokens[:, :6]), rtol=1e-4, atol=1e-5
        )
        with pytest.raises(JloraError, match=r"rows of 10 slots.*others 6.*scan_layers=False"):
            stacked(tokens)
        whole = unrolled(tokens)
        np.testing.assert_allclose(whole[:, :6], unrolled(tokens[:, :6]), rtol=1e-4, atol=1e-5)
        helpers.write_model(tmp_path / "n", architectures=["Qwen2ForCausalLM"])
        assert np.abs(jlora.load(tmp_path / "n")(tokens) - whole)[:, 6:].max() > 1e-3

    def test_stacked_layers_with_one_window(self, tmp_path: Path) -> None:
        model_dir = helpers.write_model(
            tmp_path / "m", architectures=["MistralForCausalLM"], sliding_window=4
        )
        tokens = jnp.arange(3, 15, dtype=jnp.int32)[None]
        unrolled, stacked = (jlora.load(model_dir, scan_layers=scan) for scan in (False, True))
        np.testing.assert_allclose(stacked(tokens), unrolled(tokens), rtol=1e-4, atol=1e-5)

        def loss(model: CausalLM) -> jax.Array:
            return jnp.sin(model(tokens)).mean()

        grads = [nnx.grad(loss)(model) for model in (unrolled, stacked)]
        weight = grads[0]["model"]["layers"][1]["self_attn"]["k_proj"]["kernel"][...]
        other = grads[1]["model"]["layers"]["self_attn"]["k_proj"]["kernel"][...][1]
        np.testing.assert_allclose(weight, other, rtol=1e-3, atol=1e-7)
        # A token that no later one sees, through 3 layers of 4 slots, has no say in their logits.
        changed = unrolled(tokens.at[0, 0].set(99))
        assert np.abs(changed - unrolled(tokens))[0, 9].max() > 0
        np.testing.assert_array_equal(changed[0, 10:], unrolled(tokens)[0, 10:])


def test_rows_beyond_the_positions_are_warned_of_once(tmp_path: Path, caplog) -> None:
    model_dir = helpers.write_model(tmp_path / "m", max_position_embeddings=12)
    model = jlora.load(model_dir)
    short, long = np.arange(3, 9, dtype=np.int32), np.arange(3, 13, dtype=np.int32)
    with caplog.at_level(logging.WARNING, "jlora"):
        jlora.generate(model, [short], max_new_tokens=4, stop_ids=())
        assert caplog.text == ""
        for _ in range(2):
            jlora.generate(model, [short, long], max_new_tokens=4, stop_ids=())
    (record,) = caplog.records
    assert "up to 14 tokens: the model was made for 12" in record.getMessage()
