"""Hugging Face configurations and parameter names of the families that the decoder can be."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import JloraError
from jlora.models.transformer import ModelConfig
from jlora.quant.array import QuantArray

# architecture -> what differs from Llama without biases, read from its config.json
FAMILIES: dict[str, Callable[[Mapping[str, Any]], dict[str, bool]]] = {
    "LlamaForCausalLM": lambda c: {
        "qkv_bias": c.get("attention_bias", False),
        "o_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False),
    },
    "MistralForCausalLM": lambda c: {},
    "Qwen2ForCausalLM": lambda c: {"qkv_bias": True},
    "Qwen3ForCausalLM": lambda c: {
        "qkv_bias": c.get("attention_bias", False),
        "o_bias": c.get("attention_bias", False),
        "qk_norm": True,
    },
}

# our leaf's name -> (Hugging Face's, whether the matrix is transposed)
_LEAVES = {
    "kernel": ("weight", True),  # nnx.Linear keeps (in, out), torch (out, in)
    "embedding": ("weight", False),
    "weight": ("weight", False),
    "bias": ("bias", False),
}


def hf_name(path: str) -> tuple[str, bool]:
    """("model/layers/0/mlp/up_proj/kernel") -> ("model.layers.0.mlp.up_proj.weight", True)."""
    *parents, leaf = path.split("/")
    name, transposed = _LEAVES[leaf]
    return ".".join([*parents, name]), transposed


def read_config(path: Path) -> ModelConfig:
    """Read a config.json, or that of a model directory.

    Raises:
        JloraError: no such file, no JSON, missing keys (all named), an unsupported architecture,
            activation, sliding window or kind of rotary scaling.
    """
    file = path if path.is_file() or path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        expected = (
            "--model takes a Hugging Face model directory (config.json, *.safetensors, "
            "tokenizer.json): see jlora fetch and jlora convert"
        )
        if file == path:
            expected = "give a Hugging Face config.json"
        raise JloraError(f"{file} does not exist; {expected}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JloraError(f"{file} is not JSON: {error}; fetch the model again") from None
    if not isinstance(config, dict):
        raise JloraError(f"{file} holds no JSON object; fetch the model again")
    named = config.get("architectures") or [None]
    architecture = named if isinstance(named, str) else named[0]
    if architecture not in FAMILIES:
        raise JloraError(
            f"{file}: architecture {architecture!r} is not supported; these are: "
            f"{', '.join(FAMILIES)}"
        )
    _refuse(file, config)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "rms_norm_eps")  # fmt: skip
    if absent := [key for key in required if key not in config]:
        raise JloraError(f"{file}: missing {', '.join(absent)}; fetch the model again")
    counts = [key for key in _COUNTS if config.get(key) is not None]
    if wrong := [f"{key} = {config[key]!r}" for key in counts if not _is_count(config[key])]:
        raise JloraError(f"{file}: not a positive whole number: {', '.join(wrong)}")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return ModelConfig(
        **{key: config[key] for key in required},
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        inv_freq=_inv_freq(file, config, head_dim),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        **FAMILIES[architecture](config),
    )


_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse(file: Path, config: Mapping[str, Any]) -> None:
    """Say no to what the decoder would silently compute otherwise."""
    problems = []
    if (act := config.get("hidden_act", "silu")) != "silu":
        problems.append(f"hidden_act {act!r} (only 'silu')")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        problems.append(f"sliding_window {config['sliding_window']} (only null)")
    quantised = config.get("quantization_config") or {}
    if quantised and (method := quantised.get("quant_method")) != "bitsandbytes":
        problems.append(f"quantization_config of {method!r} (only 'bitsandbytes')")
    if problems:
        raise JloraError(f"{file}: not supported: {'; '.join(problems)}")


def quantization_config(
    packed: Mapping[str, QuantArray], *, skipped: Collection[str], dtype: str
) -> dict[str, Any]:
    """What config.json says of weights that are written as bitsandbytes writes them.

    Args:
        packed: name -> weight; all of one kind.
        skipped: names of the weights of linear layers that are not quantised.
        dtype: that transformers is to compute in.
    """
    q = next(iter(packed.values()))
    # Also of a tied head, which is no layer here.
    plain = [name.removesuffix(".weight") for name in {"lm_head.weight", *skipped} - set(packed)]
    four = q.kind != "int8"
    settings: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "llm_int8_skip_modules": sorted(plain),
    }
    if four:
        settings |= {
            "bnb_4bit_quant_type": q.kind,
            "bnb_4bit_use_double_quant": q.nested_codes is not None,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
    return settings


def _inv_freq(file: Path, config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Rotary frequencies; transformers 5 writes rope_parameters, older ones rope_theta/_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # In float32 as models were trained, each operation rounded to the nearest: NumPy's own float32
    # power is off by 2 ulp, which at a position in the thousands is an angle 1e-3 away.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(np.float32(theta)) ** exponents.astype(np.float64)
    freq = np.float32(1) / powers.astype(np.float32)
    try:
        if kind == "linear":
            freq = freq / np.float32(rope["factor"])
        elif kind == "llama3":
            freq = _llama3(freq, rope)
        elif kind != "default":
            raise JloraError(
                f"{file}: rotary scaling {kind!r} is not supported; these are: default, linear, "
                "llama3"
            )
    except KeyError as error:
        raise JloraError(f"{file}: rotary scaling {kind!r} lacks {error}") from None
    return tuple(float(f) for f in freq)


def _llama3(freq: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / freq
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return ((1 - smooth) * freq / factor + smooth * freq).astype(np.float32)
