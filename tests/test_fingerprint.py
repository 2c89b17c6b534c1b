"""An adapter knows its base: the same however that is held, and another one is named."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import Mlp, write_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_quant_sharding import Boxed

import jlora
from jlora import adapters, canonical, checkpoint, fingerprint, injection, peft
from jlora.errors import JloraError
from jlora.models import load

CONFIG = jlora.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
EVERY = dataclasses.replace(CONFIG, bias="all", modules_to_save=("lm_head",))


def injected(config: jlora.LoraConfig = CONFIG, *, seed: int = 0, **options: Any) -> Mlp:
    return jlora.inject(Mlp(nnx.Rngs(seed), **options), config, rngs=nnx.Rngs(1))


def trained(model: Any) -> Any:
    """With every trained leaf moved."""
    leaves, _ = jlora.partition(model)
    # Factors of layers that differ in rank are padded with zeros, which stay zeros.
    after = {path: 3 * x if "lora" in path else x + 0.5 for path, x in leaves.items()}
    injection.update(model, after)
    return model


def test_it_is_that_of_the_base_however_this_is_held(model_dir: Path) -> None:
    expected = fingerprint.of(jlora.load(model_dir))
    assert expected.architecture == "CausalLM"
    assert expected.shapes["model/layers/1/mlp/up_proj/kernel"] == (32, 48)
    assert expected.hashes.keys() == expected.shapes.keys()
    kernels = [value for path, value in expected.hashes.items() if path.endswith("kernel")]
    assert len(set(kernels)) == len(kernels) == 2 * 7
    for options in ({"scan_layers": True}, {"dtype": jnp.bfloat16}):
        model = jlora.load(model_dir, **options)
        assert fingerprint.of(model) == expected
    assert fingerprint.of(jlora.inject(model, CONFIG, rngs=nnx.Rngs(0))) == expected
    abstract = fingerprint.of(load.abstract(model_dir, scan_layers=True))
    assert abstract == dataclasses.replace(expected, hashes={})
    assert abstract.differences(expected) == expected.differences(abstract) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 500.0}, "rotary frequencies (rope_theta, rope_scaling), hash: "),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary frequencies"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps: 1e-05 then, 0.001 now"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
         "num_attention_heads: 4 then, 2 now"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
         "windows: [] then, [4, 4] now"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_configuration_changes_and_no_weight_shows(
    changes: dict, said: str, model_dir: Path, tmp_path: Path
) -> None:
    model = jlora.inject(jlora.load(model_dir), CONFIG, rngs=nnx.Rngs(0))
    jlora.save_adapter(tmp_path / "a", model, CONFIG)
    jlora.export_peft(tmp_path / "b", model, CONFIG)
    other = shutil.copytree(model_dir, tmp_path / "m")
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"bos_token_id": 5}))
    for path in ("a", "b"):  # nothing that an output depends on
        jlora.load_adapter(tmp_path / path, jlora.load(other))
    (other / "config.json").write_text(json.dumps(about | changes))
    x = jnp.arange(12, dtype=jnp.int32)[None]
    assert np.abs(jlora.load(other)(x) - jlora.load(model_dir)(x)).max() > 1e-6
    for path in ("a", "b"):
        with pytest.raises(JloraError, match="was trained on another base than this") as caught:
            jlora.load_adapter(tmp_path / path, jlora.load(other))
        lines = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
        assert said in lines[0]
        assert len(lines) == 1 + ("head_dim" in changes)  # of which there are other frequencies
        jlora.load_adapter(tmp_path / path, jlora.load(other), force=True)
    now = fingerprint.of_directory(other, load.abstract(other))
    assert now == fingerprint.of(jlora.load(other, scan_layers=True))
    older = dataclasses.replace(fingerprint.of(model), settings={})  # of before they were kept
    assert older.differences(now) == now.differences(older) == []


def test_what_is_trained_as_a_whole_is_hashed_as_it_was() -> None:
    expected = fingerprint.of(Mlp(nnx.Rngs(0)))
    for stacked in (False, True):
        assert fingerprint.of(trained(injected(EVERY, stacked=stacked))) == expected
    x = jnp.ones((2, 128))
    base = Boxed()
    params = base.init(jax.random.key(0), x)["params"]
    expected = fingerprint.of(base, params)
    assert expected.shapes == {"dense/kernel": (128, 64), "dense/bias": (64,)}
    model = jlora.inject(base, dataclasses.replace(CONFIG, bias="all"))
    own = model.init(jax.random.key(0), x)["params"]
    factors, rest = jlora.partition(own)
    moved = jax.tree.map(lambda leaf: leaf + 1, factors)
    assert fingerprint.of(model, jlora.combine(moved, rest)) == expected


def test_weights_in_codes_are_compared_by_shape(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", hidden_size=64, intermediate_size=128)
    plain = fingerprint.of(jlora.load(source))
    quant = jlora.QuantConfig(kind="fp4", double_quant=True, exclude_modules=("o_proj",))
    for options in ({}, {"scan_layers": True}):
        coded = fingerprint.of(jlora.load(source, quant=quant, **options))
        assert coded.quant == {"kind": "fp4", "block_size": 64, "double_quant": True}
        gone = plain.hashes.keys() - coded.hashes.keys()
        assert len(gone) == 3 * 6
        assert coded.differences(plain) == plain.differences(coded) == []
        again = coded.quant_config()
        assert again is not None
        chosen = injection.to_quantise(load.abstract(source), again)
        assert {site.weight_path for site in chosen} == gone
        assert fingerprint.of(jlora.load(source, quant=again)) == coded
    other = write_model(tmp_path / "o", seed=1, hidden_size=64, intermediate_size=128)
    (line,) = coded.differences(fingerprint.of(jlora.load(other)))
    assert line.startswith("other values in ")
    eight = fingerprint.of(jlora.load(source, quant=jlora.QuantConfig(kind="int8")))
    assert eight.quant_config() is not None


def test_what_differs_is_named() -> None:
    class Other(Mlp):
        pass

    ours = fingerprint.of(Mlp(nnx.Rngs(0)))
    lines = ours.differences(fingerprint.of(Other(nnx.Rngs(1), layers=5, width=9)))
    assert lines == [
        "architecture: Mlp then, Other now",
        "4 parameters new: layers/3/bias, layers/3/kernel, layers/4/bias, …",
        "7 parameters of another shape: layers/0/bias (8,) then, (9,) now, layers/0/kernel (8, 8) "
        "then, (9, 9) now, layers/1/bias (8,) then, (9,) now, …",
    ]
    lines = ours.differences(fingerprint.of(Mlp(nnx.Rngs(0), layers=2)))
    assert lines[0] == "2 parameters absent now: layers/2/bias, layers/2/kernel"
    model = Mlp(nnx.Rngs(0))
    model.lm_head.kernel.set_value(model.lm_head.kernel[...] * 1.01)
    assert ours.differences(fingerprint.of(model)) == ["other values in 1 of 8: lm_head/kernel"]


def save(path: Path, model: Any, config: jlora.LoraConfig = CONFIG) -> Path:
    jlora.save_adapter(path, model, config)
    return path


def export(path: Path, model: Any, config: jlora.LoraConfig = CONFIG) -> Path:
    jlora.export_peft(path, model, config)
    return path


FORMATS = pytest.mark.parametrize("write", [save, export])


@FORMATS
def test_another_base_is_refused_unless_forced(write: Callable, tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "a", injected())
    stored = adapters.read(path)
    assert stored.base == fingerprint.of(Mlp(nnx.Rngs(0)))
    for other in (Mlp(nnx.Rngs(1)), injected(seed=1)):
        before = nnx.graphdef(other)
        with pytest.raises(JloraError) as caught:
            jlora.load_adapter(path, other)
        message = str(caught.value)
        assert f"the adapter in {path} was trained on another base than this:" in message
        assert "other values in 4 of 8: layers/0/kernel, " in message
        assert "force=True (--force)" in message
        assert nnx.graphdef(other) == before
        caplog.clear()
        jlora.load_adapter(path, other, force=True)
        (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "other values in 4 of 8" in warning.getMessage()
        got, expected = other.layers[1].lora_b, injected().layers[1].lora_b
        np.testing.assert_array_equal(got[...], expected[...])
    # Shapes say it before names that don't fit do; forced, it is still no adapter for this model.
    wide = Mlp(nnx.Rngs(0), width=9)
    with pytest.raises(JloraError, match=r"another base(.|\n)*7 parameters of another shape"):
        jlora.load_adapter(path, wide)
    with pytest.raises(JloraError, match=r"shape: .*layers.0.lora_(a|A.weight) is \(2, 8\)"):
        jlora.load_adapter(path, wide, force=True)


def test_linen(tmp_path: Path) -> None:
    x = jnp.ones((2, 128))
    model = jlora.inject(Boxed(), CONFIG)
    params = model.init(jax.random.key(0), x)["params"]
    jlora.save_adapter(tmp_path / "a", model, CONFIG, params=params)
    other = model.init(jax.random.key(1), x)["params"]
    with pytest.raises(JloraError, match="other values in 1 of 2: dense/kernel"):
        jlora.load_adapter(tmp_path / "a", model, params=other)
    jlora.load_adapter(tmp_path / "a", model, params=other, force=True)
    factors, rest = jlora.partition(nn.unbox(params))
    changed = jlora.combine(jax.tree.map(jnp.zeros_like, factors), rest)
    jlora.save_adapter(tmp_path / "zero", model, CONFIG, params=changed)
    with pytest.raises(JloraError, match="changes nothing"):
        jlora.load_adapter(tmp_path / "zero", model, params=params)
    jlora.load_adapter(tmp_path / "zero", model, params=params, allow_zero=True)


def test_adapters_from_before_there_were_any(tmp_path: Path) -> None:
    """They load, on whatever they fit; so does what other programs wrote."""
    export(tmp_path / "p", injected())
    file = tmp_path / "p" / peft.WEIGHTS_FILE
    save_file(load_file(file), file, metadata={"format": "pt"})
    save(tmp_path / "o", injected())
    meta = next((tmp_path / "o" / "meta").glob("*"))
    values = json.loads(meta.read_text())
    del values["base"]
    meta.write_text(json.dumps(values))
    for path in (tmp_path / "p", tmp_path / "o"):
        assert adapters.read(path).base is None
        jlora.load_adapter(path, Mlp(nnx.Rngs(1)))


BASES: list[Any] = [
    [],
    {"base": 3},
    {"base": {"architecture": "Mlp"}},
    {"base": {"architecture": "Mlp", "shapes": {"a": "b"}, "hashes": {}}},
]


@pytest.mark.parametrize("known", [*map(json.dumps, BASES), "{", "[" * 100_000])
def test_a_damaged_fingerprint(known: str, tmp_path: Path) -> None:
    export(tmp_path / "p", injected())
    file = tmp_path / "p" / peft.WEIGHTS_FILE
    save_file(load_file(file), file, metadata={"format": "pt", "jlora": known})
    with pytest.raises(JloraError, match=r"adapter_model\.safetensors: its metadata"):
        jlora.load_adapter(tmp_path / "p", Mlp(nnx.Rngs(0)))


def test_an_exported_checkpoint_keeps_it(model_dir: Path, tmp_path: Path) -> None:
    model = jlora.inject(jlora.load(model_dir), CONFIG, rngs=nnx.Rngs(0))
    save(tmp_path / "o", model)
    stored = checkpoint.read_adapter(tmp_path / "o")
    peft.write_peft(tmp_path / "p", load.abstract(model_dir), stored)
    assert adapters.read(tmp_path / "p").base == stored.base == fingerprint.of(model)
    with safe_open(tmp_path / "p" / peft.WEIGHTS_FILE, framework="np") as file:
        assert file.metadata()["format"] == "pt"


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jlora import fingerprint
x = np.random.default_rng(0).normal(size=(4, 64, 32)).astype(np.float32)
small = x[0, 0, :1].reshape(())
whole = {"l/w": x, "h": x[0], "s": small}
expected = fingerprint.of_leaves("A", whole.items(), {"l": 4})
assert len(expected.hashes) == 6, expected
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    leaves = {"l/w": put(x, None, "a", "b"), "h": put(x[0], "a", "b"), "s": small}
    assert fingerprint.of_leaves("A", leaves.items(), {"l": 4}) == expected, kind
    sample = jax.jit(lambda x: fingerprint._sample(x, True))
    text = sample.lower(leaves["l/w"]).compile().as_text()
    assert "all-gather" not in text and "f32[4,64,32]" not in text
"""


def test_sharded_weights_are_not_gathered() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Norms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
def test_the_norm_of_an_adapter_is_reported(stacked: bool, tmp_path: Path, caplog) -> None:
    config = dataclasses.replace(EVERY, layers_to_transform=(0, 2), rank_pattern={"2": 3})
    model = trained(injected(config, stacked=stacked))
    save(tmp_path / "a", model, config)
    merged, base = (injection.base_leaves(m) for m in (jlora.merge(model), Mlp(nnx.Rngs(0))))
    merged = canonical.unstack(merged, {"layers": 3}) if stacked else merged
    expected = {path: float(jnp.linalg.norm(merged[path] - base[path])) for path in base}
    assert [path for path, norm in expected.items() if not norm] == ["layers/1/kernel"]
    stored, _ = adapters.fitted(adapters.read(tmp_path / "a"), Mlp(nnx.Rngs(0)))
    found = adapters.norms(stored, base)
    del expected["layers/1/kernel"]
    adapted = {f"layers/{i}/kernel": f"layers/{i}" for i in (0, 2)}  # the head is saved whole
    expected = {adapted.get(path, path): norm for path, norm in expected.items()}
    assert found == pytest.approx(expected, rel=1e-5)
    caplog.set_level(logging.INFO, "jlora")
    jlora.load_adapter(tmp_path / "a", Mlp(nnx.Rngs(0), stacked=stacked))
    total = f"7 weights, |ΔW| = {np.linalg.norm(list(expected.values())):.4g}"
    assert caplog.messages == [f"adapter {tmp_path / 'a'}: {total}"]


@FORMATS
def test_an_adapter_that_changes_nothing_is_refused(write: Callable, tmp_path: Path) -> None:
    config = jlora.LoraConfig(r=2)
    path = write(tmp_path / "a", injected(config), config)
    model = Mlp(nnx.Rngs(0))
    with pytest.raises(JloraError, match=r"changes nothing: its norm is 0 in all of 3 weights"):
        jlora.load_adapter(path, model)
    assert jlora.partition(model)[0] == {}
    jlora.load_adapter(path, model, allow_zero=True)
    if write is export:
        jlora.import_peft(path, Mlp(nnx.Rngs(0)), allow_zero=True)
