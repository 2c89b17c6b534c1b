"""Models that are quantised as they are read, directories that hold them so, and runs on them."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, write_model
from safetensors.numpy import load_file, save_file

import jlora
from jlora import cli, injection
from jlora.errors import JloraError
from jlora.models import load
from jlora.quant import checks
from jlora.quant.array import QuantArray
from jlora.quant.quantize import unstack

TOKENS = jnp.asarray([[5, 9, 200, 7, 7, 31, 2], [8, 1, 4, 100, 23, 0, 1]], jnp.int32)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIGS = {
    "nf4": jlora.QuantConfig(),
    "fp4-128-double": jlora.QuantConfig(
        kind="fp4", block_size=32, double_quant=True, exclude_modules=("down_proj",)
    ),
    "int8": jlora.QuantConfig(kind="int8"),
}
UP = "model.layers.1.mlp.up_proj"


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("quantised") / "model", **SIZES)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> jlora.QuantConfig:
    return CONFIGS[request.param]


def weights(model: Any) -> dict[str, Any]:
    return injection.partition(model, everything=True)[0]


def test_quantised_as_it_is_read_or_afterwards(source: Path, config: jlora.QuantConfig) -> None:
    streamed = jlora.load(source, quant=config)
    after = jlora.quantize(jlora.load(source), config)
    assert_same(weights(streamed), weights(after))
    quantised = {path for path, leaf in weights(streamed).items() if isinstance(leaf, QuantArray)}
    excluded = ("down_proj",) if config.exclude_modules else ()
    assert quantised == {
        f"model/layers/{i}/{module}/kernel"
        for i in range(2)
        for module in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj",
                       "self_attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
        if not module.endswith(excluded or "-")
    }  # fmt: skip
    assert isinstance(streamed.model.embed_tokens.embedding.get_value(), jax.Array)


def test_an_output_head_that_is_asked_for(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", tie_word_embeddings=False, **SIZES)
    own = jlora.load(source, quant=jlora.QuantConfig())
    assert isinstance(own.lm_head.kernel.get_value(), jax.Array)
    asked = jlora.QuantConfig(target_modules=("lm_head",))
    model = jlora.load(source, quant=asked)
    kernel = model.lm_head.kernel.get_value()
    assert isinstance(kernel, QuantArray)
    np.testing.assert_array_equal(model.head_weight(), kernel.dequantize().T)
    hidden = model.hidden(TOKENS)
    np.testing.assert_allclose(model(TOKENS), hidden @ kernel.dequantize(), atol=1e-5)
    load.quantize(source, tmp_path / "small", asked)
    np.testing.assert_array_equal(jlora.load(tmp_path / "small")(TOKENS), model(TOKENS))


def test_stacked_layers_are_the_unrolled_ones(source: Path, config: jlora.QuantConfig) -> None:
    unrolled, stacked = (jlora.load(source, quant=config, scan_layers=s) for s in (False, True))
    whole = weights(stacked)["model/layers/self_attn/k_proj/kernel"]
    assert whole.shape == (2, 64, 32)
    for i, layer in enumerate(unstack(whole)):
        own = weights(unrolled)[f"model/layers/{i}/self_attn/k_proj/kernel"]
        assert_same({"": layer}, {"": own})
    np.testing.assert_allclose(stacked(TOKENS), unrolled(TOKENS), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_quantised_directory_loads_to_the_same_bits(
    source: Path, config: jlora.QuantConfig, dtype: Any, tmp_path: Path
) -> None:
    load.quantize(source, tmp_path / "small", config)
    for scan_layers in (False, True):
        options = {"dtype": dtype, "scan_layers": scan_layers}
        assert_same(
            weights(jlora.load(tmp_path / "small", **options)),
            weights(jlora.load(source, quant=config, **options)),
        )
    files = [
        sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (source, tmp_path / "small")
    ]
    assert files[1] < 0.7 * files[0]
    settings = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["load_in_8bit"] == (config.kind == "int8")
    skipped = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert settings["llm_int8_skip_modules"] == ["lm_head"] + (
        skipped if config.exclude_modules else []
    )
    # And once more: what was read is written to the same bits, stacked or not.
    for scan_layers in (False, True):
        model = jlora.load(tmp_path / "small", scan_layers=scan_layers)
        to = tmp_path / f"again-{scan_layers}"
        load.save(model, to, source=tmp_path / "small")
        assert_same(
            load_file(tmp_path / "small" / "model.safetensors"), load_file(to / "model.safetensors")
        )


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    to = tmp_path / "small"
    cli.main(["quantize", "--model", str(source), "--to", str(to), "--quant.double-quant"])
    assert f"wrote {to}: weights of " in capsys.readouterr().out
    kernel = jlora.load(to).model.layers[0].mlp.up_proj.kernel.get_value()
    assert kernel.nested_codes is not None
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--model", str(source), "--to", str(to)])
    assert "isn't empty" in capsys.readouterr().err


def broken(source: Path, to: Path, change: Any) -> Path:
    """A quantised directory with other tensors."""
    load.quantize(source, to, jlora.QuantConfig())
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    config = jlora.QuantConfig()
    load.quantize(source, tmp_path / "small", config)
    with pytest.raises(JloraError, match=r"14 weights are quantised already, model\.layers\.0"):
        jlora.load(tmp_path / "small", quant=config)
    with pytest.raises(JloraError, match=r"QuantConfig matches nothing:\s+.*: 'up_prj'"):
        jlora.load(source, quant=jlora.QuantConfig(target_modules=("up_prj",)))
    with pytest.raises(JloraError, match=r"embed_tokens is no linear layer"):
        jlora.load(source, quant=jlora.QuantConfig(target_modules=("embed_tokens",)))
    mixed = broken(source, tmp_path / "mixed", lambda t: dequantised(t, UP))
    jlora.load(mixed)
    with pytest.raises(JloraError, match=r"some layers of the checkpoint are quantised and some"):
        jlora.load(mixed, scan_layers=True)


def dequantised(tensors: dict[str, np.ndarray], module: str) -> None:
    for name in [name for name in tensors if name.startswith(module)]:
        del tensors[name]
    tensors[f"{module}.weight"] = np.ones((128, 64), np.float32)


CHANGES = {
    "no scales": (
        lambda t: t.pop(f"{UP}.weight.absmax"),
        rf"{UP}\.weight: not a weight as bitsandbytes writes it: weight\.absmax is missing",
    ),
    "cut short": (
        lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-1].copy()}),
        r"weight is uint8 \(4095, 1\), and 4096 bytes are expected",
    ),
    "no state": (
        lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4"),
        rf"does not fit:\s+(.*\n)*.*{UP}\.weight",
    ),
    "a scale that is no number": (
        lambda t: t[f"{UP}.weight.absmax"].__setitem__(3, np.nan),
        r"weight\.absmax has values that are infinite or not numbers",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_damaged_directories(case: str, source: Path, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    with pytest.raises(JloraError, match=message):
        jlora.load(broken(source, tmp_path / "small", change))


def test_weights_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{UP}.weight"][3, 5] = np.inf
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(JloraError, match=rf"{UP}\.weight: of 8192 weights, 1 are infinite or"):
        load.quantize(tmp_path / "model", tmp_path / "small", jlora.QuantConfig())
    assert not (tmp_path / "small").exists()


def test_a_block_that_is_not_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checks._told().clear()  # it is said once
    sizes = SIZES | {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = write_model(tmp_path / "model", **sizes)
    model = jlora.load(source, quant=jlora.QuantConfig())
    assert "96 inputs are not a multiple of block_size 64" in caplog.text
    float32 = jlora.load(source).model.layers[0].mlp.up_proj.kernel[...]
    kernel = model.model.layers[0].mlp.up_proj.kernel.get_value()
    assert np.abs(kernel.dequantize() - float32).max() < 0.3 * np.abs(float32).max()
    with pytest.raises(JloraError, match=r"its 96 inputs are not a multiple of block_size 64"):
        load.quantize(source, tmp_path / "small", jlora.QuantConfig())


def test_a_weight_that_is_no_layers(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = np.full(64, 7, np.int8)
        tensors["model.norm.SCB"] = np.ones(64, np.float32)

    with pytest.raises(JloraError, match=r"model\.norm\.weight: quantised, but no linear layer's"):
        jlora.load(broken(source, tmp_path / "small", change))


def test_before_any_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load", lambda *args, **options: pytest.fail("weights were read"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(JloraError, match="isn't empty"):
        load.quantize(source, tmp_path / "there", jlora.QuantConfig())


def test_a_merged_model_is_saved_as_a_plain_one(source: Path, tmp_path: Path) -> None:
    load.quantize(source, tmp_path / "small", jlora.QuantConfig())
    model = jlora.load(tmp_path / "small")
    jlora.inject(model, jlora.LoraConfig(r=2), rngs=jax.random.key(0))
    load.save(jlora.merge(model), tmp_path / "merged", source=tmp_path / "small")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    np.testing.assert_allclose(jlora.load(tmp_path / "merged")(TOKENS), model(TOKENS), atol=1e-5)
