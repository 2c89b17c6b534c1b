"""Hugging Face configurations and parameter names of the families that the decoder can be."""

import json
import logging
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.errors import JloraError
from jlora.models import rope
from jlora.models.transformer import ModelConfig
from jlora.quant.array import QuantArray

_log = logging.getLogger("jlora")
Config = Mapping[str, Any]


class Family(NamedTuple):
    """What sets one family of models apart; the values are those of transformers 5."""

    architecture: str
    defaults: dict[str, Any]
    """What a key is where config.json leaves it out; None: what the sizes say."""
    nulls: tuple[str, ...]
    """Keys that may be null, for what the sizes say."""
    flags: Mapping[str, bool | str] = types.MappingProxyType({})
    """Field of ModelConfig -> its value, or the key of config.json that says it."""
    windows: Callable[[Config], list[Any] | None] = lambda config: None
    """What each layer's attention is limited to, None for nothing; None where none is."""


def _mistral_windows(config: Config) -> list[Any]:
    return [config.get("sliding_window", 4096)] * config["num_hidden_layers"]


def _qwen_windows(config: Config) -> list[Any] | None:
    """Return the windows of layers by their kinds, or by the index from which on they have one."""
    used = config.get("use_sliding_window", False)
    window = config.get("sliding_window", 4096) if used else None
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    if kinds is None:
        return [window if i >= first else None for i in range(config["num_hidden_layers"])]
    return [(window or _UNKNOWN) if kind == _SLIDING else None for kind in kinds]


_SLIDING, _KINDS = "sliding_attention", ("full_attention", "sliding_attention")
_UNKNOWN = "none, though layer_types names sliding_attention"
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
# model_type -> its family
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None},
        ("num_key_value_heads", "head_dim"),
        {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": None},
        ("head_dim",),
        windows=_mistral_windows,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_QWEN, "head_dim": None},
        ("num_key_value_heads", "head_dim"),
        {"qkv_bias": True},
        _qwen_windows,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        ("num_key_value_heads",),
        {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True},
        _qwen_windows,
    ),
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
        JloraError: no such file, no JSON, missing sizes (all named), an unsupported architecture;
            fields with values that mean nothing or that the decoder lacks, all named.
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
    except (ValueError, RecursionError) as error:
        raise JloraError(f"{file} is not JSON: {error}; fetch the model again") from None
    if not isinstance(config, dict):
        raise JloraError(f"{file} holds no JSON object; fetch the model again")
    family = _family(file, config)
    if absent := [key for key in _REQUIRED if key not in config]:
        raise JloraError(f"{file}: missing {', '.join(absent)}; fetch the model again")
    problems = _problems(config, family)
    if not problems:
        values = family.defaults | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | config
        heads = values["num_attention_heads"]
        kv_heads = values["num_key_value_heads"] or heads
        head_dim = values["head_dim"] or values["hidden_size"] // heads
        if heads % kv_heads:
            problems.append(f"num_key_value_heads {kv_heads} (no divisor of {heads} heads)")
        if head_dim % 2 or not head_dim:
            problems.append(f"head_dim {head_dim} (only an even number, for rotary positions)")
    if not problems:
        longest = values["max_position_embeddings"]
        inv_freq, problems = rope.inverse_frequencies(config, head_dim, longest)
    if problems:
        raise JloraError(f"{file}: not supported: {'; '.join(problems)}")
    windows = family.windows(config) or []
    return ModelConfig(
        **{key: values[key] for key in _REQUIRED},
        rms_norm_eps=float(values["rms_norm_eps"]),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        inv_freq=inv_freq,
        max_position_embeddings=longest,
        windows=tuple(windows) if any(windows) else (),
        tie_word_embeddings=values["tie_word_embeddings"],
        **{name: config.get(key, False) if isinstance(key, str) else key
           for name, key in family.flags.items()},
    )  # fmt: skip


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")  # fmt: skip
_COUNTS = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")


def _family(file: Path, config: Config) -> Family:
    """Return the family of a configuration: by its model_type, as transformers; else by its class.

    Raises:
        JloraError: neither is known, or they are of two families.
    """
    named = config.get("architectures") or []
    architectures = [str(name) for name in (named if isinstance(named, list) else [named])]
    by_class = {family.architecture: kind for kind, family in FAMILIES.items()}
    said = next((by_class[name] for name in architectures if name in by_class), None)
    kind = config.get("model_type") or said
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = f"these are: {', '.join(f'{n} ({f.architecture})' for n, f in FAMILIES.items())}"
        what = f"model_type {config.get('model_type')!r}, architectures {named!r}"
        raise JloraError(f"{file}: {what}: this architecture is not supported; {known}")
    if said is not None and said != kind:
        raise JloraError(
            f"{file}: model_type {kind!r} and architectures {named!r} are of two families; "
            "transformers goes by model_type: make both say what the weights are"
        )
    # "LlamaModel" and "LLaMAForCausalLM" are llama's own too.
    if architectures and not any(n.lower().startswith(kind) for n in architectures):
        raise JloraError(
            f"{file}: architecture {architectures[0]!r} is not supported, though model_type is "
            f"{kind!r}: where the weights are of that family, say {FAMILIES[kind].architecture!r}"
        )
    return FAMILIES[kind]


def _problems(config: Config, family: Family) -> list[str]:
    """Return a line for each field that has no meaning, or one that the decoder lacks."""
    problems = []
    for key in _COUNTS:
        value = config.get(key, 1)
        if not _is_count(value) and not (value is None and key in family.nulls):
            problems.append(f"{key} {value!r} (only a positive whole number)")
    eps = config.get("rms_norm_eps", 0)
    if not rope.is_number(eps) or eps < 0:
        problems.append(f"rms_norm_eps {eps!r} (only a number from 0 on)")
    said = {key for key in family.flags.values() if isinstance(key, str)}
    said |= {"use_sliding_window"} if family.windows is _qwen_windows else set()
    for key in ("tie_word_embeddings", *sorted(said)):
        if not isinstance(config.get(key, False), bool):
            problems.append(f"{key} {config[key]!r} (only true or false)")
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        problems.append(f"hidden_act {act!r} (only 'silu', which is 'swish')")
    for key in ("transformers_weights", "per_layer_config"):
        if config.get(key):
            problems.append(f"{key} {config[key]!r} (only null)")
    quantised = config.get("quantization_config") or {}
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
    if quantised and method != "bitsandbytes":
        problems.append(f"quantization_config of {method!r} (only 'bitsandbytes')")
    return problems or _window_problems(config, family)


def _window_problems(config: Config, family: Family) -> list[str]:
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    said = config.get("sliding_window")
    if family.windows in (_mistral_windows, _qwen_windows) and type(said) not in (int, type(None)):
        return [f"sliding_window {said!r} (only a whole number, or null)"]
    if family.windows is _qwen_windows:
        first = config.get("max_window_layers", 28)
        if not (_is_count(first) or (first == 0 and not isinstance(first, bool))):
            return [f"max_window_layers {first!r} (only a whole number)"]
        if kinds is not None:
            if not isinstance(kinds, list) or len(kinds) != layers:
                return [f"layer_types {kinds!r} (only one for each of {layers} layers)"]
            if strange := sorted({str(kind) for kind in kinds if kind not in _KINDS}):
                return [f"layer_types {', '.join(strange)} (only {', '.join(_KINDS)})"]
    windows = [window for window in family.windows(config) or () if window is not None]
    bad = [repr(window) for window in windows if not _is_count(window)]
    return [f"sliding_window {window} (only a positive whole number)" for window in bad[:1]]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_warned: set[tuple[ModelConfig, str]] = set()


def warn_of_length(config: ModelConfig, longest: int, what: str) -> None:
    """Warn of positions that a model was not made for, once for each model and `what`.

    Args:
        config: the model's.
        longest: tokens of the longest row.
        what: the rows, for the message: "training rows".
    """
    limit = config.max_position_embeddings
    if longest <= limit or (config, what) in _warned:
        return
    _warned.add((config, what))
    _log.warning(
        "%s of up to %d tokens: the model was made for %d (max_position_embeddings in config.json) "
        "and may write nonsense beyond; cut them, or take a model for longer ones",
        what,
        longest,
        limit,
    )


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
