"""Convert a GGUF file (llama.cpp's format) into a standard Hugging Face model directory.

Everything that depends on the architecture or on the tokenizer is a row of a table: what has no
row is refused by name, because a guess would give a model that runs and answers wrongly.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import JloraError, nearest
from jlora.files import new_directory, save_tensors


@dataclass(frozen=True)
class _Architecture:
    """How one `general.architecture` maps to Hugging Face's names.

    tensors: GGUF name -> (Hugging Face name, shape in the sizes of `_sizes`). `{i}` is the layer.
    interleaved: GGUF name -> config key of its number of heads, for the weights whose rows
      llama.cpp reorders (see `_undo_interleaving`).
    config: the keys of config.json that are the same for every model of the architecture.
    """

    tensors: Mapping[str, tuple[str, tuple[str, ...]]]
    interleaved: Mapping[str, str]
    config: Mapping[str, Any]


_LAYER = "model.layers.{i}."
_ARCHITECTURES = {
    "llama": _Architecture(
        tensors={
            "token_embd.weight": ("model.embed_tokens.weight", ("vocab", "hidden")),
            "output_norm.weight": ("model.norm.weight", ("hidden",)),
            "output.weight": ("lm_head.weight", ("vocab", "hidden")),
            "blk.{i}.attn_norm.weight": (_LAYER + "input_layernorm.weight", ("hidden",)),
            "blk.{i}.attn_q.weight": (_LAYER + "self_attn.q_proj.weight", ("query", "hidden")),
            "blk.{i}.attn_k.weight": (_LAYER + "self_attn.k_proj.weight", ("key", "hidden")),
            "blk.{i}.attn_v.weight": (_LAYER + "self_attn.v_proj.weight", ("key", "hidden")),
            "blk.{i}.attn_output.weight": (_LAYER + "self_attn.o_proj.weight", ("hidden", "query")),
            "blk.{i}.ffn_norm.weight": (_LAYER + "post_attention_layernorm.weight", ("hidden",)),
            "blk.{i}.ffn_gate.weight": (_LAYER + "mlp.gate_proj.weight", ("inner", "hidden")),
            "blk.{i}.ffn_up.weight": (_LAYER + "mlp.up_proj.weight", ("inner", "hidden")),
            "blk.{i}.ffn_down.weight": (_LAYER + "mlp.down_proj.weight", ("hidden", "inner")),
        },
        interleaved={
            "blk.{i}.attn_q.weight": "num_attention_heads",
            "blk.{i}.attn_k.weight": "num_key_value_heads",
        },
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
}
# A model without this tensor uses its embedding as its output layer (tied).
_UNTIED_OUTPUT = "output.weight"
# Known GGUF tensors that have no place in a Hugging Face directory.
_REFUSED_TENSORS = {
    "rope_freqs.weight": "the scaled rotary frequencies of Llama 3.1 and later, whose settings"
    " (factor, low and high frequency factors) a GGUF doesn't keep",
}
# GGUF key, after the architecture's prefix -> config.json key. Their types are what is accepted.
_CONFIG_KEYS: dict[str, tuple[str, type[int] | type[float]]] = {
    "block_count": ("num_hidden_layers", int),
    "context_length": ("max_position_embeddings", int),
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "rope.freq_base": ("rope_theta", float),
}


@dataclass(frozen=True)
class _Splitter:
    """How one `tokenizer.ggml.pre` splits the text before the merges.

    digits: every digit stands alone.
    split: the regular expression; None is GPT-2's.
    ignore_merges: a piece that is in the vocabulary is taken whole.
    """

    digits: bool = False
    split: str | None = None
    ignore_merges: bool = False


_SPLITTERS = {
    "gpt-2": _Splitter(),
    "smollm": _Splitter(digits=True),
    "llama-bpe": _Splitter(
        split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ignore_merges=True,
    ),
}
# tokenizer.ggml.token_type: ordinary and unused entries are vocabulary only, the two others are
# also matched in the text before anything is split.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Role -> its name in tokenizer.ggml.*_token_id.
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}


def convert(gguf_file: Path, to: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory that transformers can load.

    The directory holds config.json, generation_config.json, model.safetensors, tokenizer.json and
    tokenizer_config.json. The weights are float32, exactly as `gguf.dequantize` gives them, except
    that the rows which llama.cpp reorders are put back in Hugging Face's order. The directory
    appears complete or not at all.

    Args:
      gguf_file: the file; its architecture must be "llama" and its tokenizer byte-level BPE.
      to: the directory to write; it must not exist, or be empty.

    Raises:
      JloraError: the gguf package is missing; the file is missing, truncated or no GGUF; its
        architecture, rotary embedding, tokenizer or tensors are not among those known here, or
        don't agree with one another; `to` holds something already.
    """
    with new_directory(to) as stage:
        metadata, tensors = _read(gguf_file)
        architecture = _architecture(gguf_file, metadata)
        names = [tensor.name for tensor in tensors]
        tokenizer, tokenizer_config, ids = _tokenizer(gguf_file, metadata)
        config = _config(gguf_file, metadata, architecture, tied=_UNTIED_OUTPUT not in names) | ids
        config["vocab_size"] = tokenizer.get_vocab_size()
        tokenizer_config["model_max_length"] = config["max_position_embeddings"]

        _write_weights(gguf_file, tensors, architecture, config, stage / "model.safetensors")
        tokenizer.save(str(stage / "tokenizer.json"))
        _write_json(stage / "tokenizer_config.json", tokenizer_config)
        _write_json(stage / "config.json", config)
        _write_json(stage / "generation_config.json", ids)


def _read(file: Path) -> tuple[dict[str, Any], Sequence[Any]]:
    """Return the metadata by key and the tensors (gguf.ReaderTensor, still quantised)."""
    try:
        import gguf
    except ImportError as error:
        raise JloraError(f"reading {file} needs the gguf package: pip install gguf") from error
    if not file.is_file():
        raise JloraError(f"{file}: no such file; give the path of a .gguf file")
    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    # The library has no error type of its own: this is what slicing past the end gives.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise JloraError(
            f"{file} ({file.stat().st_size} bytes) is not a complete GGUF file: {error};"
            " download it again and compare its size and checksum with the publisher's"
        ) from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise JloraError(f"{file} is a big-endian GGUF file; only little-endian ones can be read")
    return metadata, reader.tensors


def _architecture(file: Path, metadata: Mapping[str, Any]) -> _Architecture:
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise JloraError(
            f"{file}: general.architecture is {name!r}, which can't be converted;"
            f" supported: {', '.join(_ARCHITECTURES)}{nearest(str(name), _ARCHITECTURES)}"
        )
    return _ARCHITECTURES[name]


def _config(
    file: Path, metadata: Mapping[str, Any], architecture: _Architecture, *, tied: bool
) -> dict[str, Any]:
    """Return config.json without the vocabulary's size and the special tokens' ids."""
    prefix = f"{metadata['general.architecture']}."
    defaults: dict[str, Any] = {"rope.freq_base": 10000.0}  # llama.cpp's
    if isinstance(heads := metadata.get(prefix + "attention.head_count"), int) and heads > 0:
        defaults["attention.head_count_kv"] = heads
        if isinstance(hidden := metadata.get(prefix + "embedding_length"), int):
            defaults["attention.key_length"] = hidden // heads

    problems = []
    config: dict[str, Any] = dict(architecture.config)
    for key, (name, kind) in _CONFIG_KEYS.items():
        value = metadata.get(prefix + key, defaults.get(key))
        if type(value) is kind and value > 0:
            # A GGUF holds float32: 1e-05 rather than 9.999999747378752e-06.
            config[name] = value if kind is int else float(str(np.float32(value)))
        else:
            problems.append(f"{prefix}{key}: expected a positive {kind.__name__}, found {value!r}")
    if not problems:
        # What would change the model without changing its tensors. Absent keys are harmless.
        fixed = {
            "rope.dimension_count": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "rope.scaling.type": "none",
            "expert_count": 0,
        }
        problems = [
            f"{prefix}{key}: only {wanted!r} can be converted, found {metadata[prefix + key]!r}"
            for key, wanted in fixed.items()
            if metadata.get(prefix + key, wanted) != wanted
        ]
        if config["num_attention_heads"] % config["num_key_value_heads"] or config["head_dim"] % 2:
            problems.append(
                f"{prefix}attention: {config['num_attention_heads']} heads must be a multiple of"
                f" {config['num_key_value_heads']} key heads, and the head size"
                f" {config['head_dim']} even"
            )
    if problems:
        raise JloraError(
            f"{file}: the metadata don't describe a model that can be converted:\n  "
            + "\n  ".join(problems)
            + "\nStart from the original Hugging Face directory instead."
        )
    # transformers 5 reads rope_parameters, earlier ones rope_theta; likewise dtype, torch_dtype.
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return config | {"tie_word_embeddings": tied, "dtype": "float32", "torch_dtype": "float32"}


def _write_weights(
    file: Path,
    tensors: Sequence[Any],
    architecture: _Architecture,
    config: Mapping[str, Any],
    to: Path,
) -> None:
    """Write every tensor as float32 under its Hugging Face name."""
    import gguf

    sizes = {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "query": config["num_attention_heads"] * config["head_dim"],
        "key": config["num_key_value_heads"] * config["head_dim"],
    }
    expected = {
        template.format(i=i): template
        for template in architecture.tensors
        if not (template == _UNTIED_OUTPUT and config["tie_word_embeddings"])
        for i in (range(config["num_hidden_layers"]) if "{i}" in template else [0])
    }
    problems = []
    weights = {}
    for tensor in tensors:
        if tensor.name not in expected:
            reason = _REFUSED_TENSORS.get(tensor.name, "not known for this architecture")
            problems.append(f"{tensor.name}: {reason}")
            continue
        template = expected.pop(tensor.name)
        name, axes = architecture.tensors[template]
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF's fastest axis is first
        if shape != (wanted := tuple(sizes[axis] for axis in axes)):
            problems.append(f"{tensor.name}: shape {shape}, the metadata say {wanted}")
            continue
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError:
            problems.append(f"{tensor.name}: type {tensor.tensor_type.name} can't be dequantised")
            continue
        if template in architecture.interleaved:
            weight = _undo_interleaving(weight, config[architecture.interleaved[template]])
        weights[name.format(i=tensor.name.split(".")[1])] = weight
    problems += [f"{name}: missing" for name in expected]
    if problems:
        hint = " If the GGUF is one part of several, merge them first." if expected else ""
        raise JloraError(
            f"{file}: {len(problems)} tensors can't be converted:\n  "
            + "\n  ".join(problems)
            + f"\nStart from the original Hugging Face directory instead.{hint}"
        )
    save_tensors(weights, to)


def _undo_interleaving(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a query or key weight, (heads * d, hidden), with its rows in Hugging Face's order.

    Rotary embedding turns d/2 pairs of rows of each head. llama.cpp stores the two rows of a pair
    side by side, Hugging Face stores all first rows and then all second ones.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _tokenizer(
    file: Path, metadata: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the tokenizers.Tokenizer, tokenizer_config.json, and the special tokens' ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens, merges = get("tokens", []), get("merges", [])
    types = get("token_type", [_NORMAL] * len(tokens))
    model, pre = get("model"), get("pre")
    ids = {role: get(f"{key}_token_id") for role, key in _SPECIAL_TOKENS.items()}
    problems = []
    if model != "gpt2":
        problems.append(f"model is {model!r}; supported: 'gpt2' (byte-level BPE)")
    elif pre not in _SPLITTERS:
        problems.append(f"pre is {pre!r}; supported: {', '.join(map(repr, _SPLITTERS))}")
    if len(types) != len(tokens):
        problems.append(f"token_type has {len(types)} entries for {len(tokens)} tokens")
    if odd := sorted(set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}):
        problems.append(f"token_type has {odd}, which byte-level BPE doesn't use")
    if not tokens or len(set(tokens)) != len(tokens):
        problems.append(f"tokens has {len(tokens)} entries, {len(set(tokens))} of them different")
    problems += [
        f"{_SPECIAL_TOKENS[role]}_token_id is {i}, outside the {len(tokens)} tokens"
        for role, i in ids.items()
        if i is not None and not 0 <= i < len(tokens)
    ]
    for role in ("bos", "eos"):
        if get(f"add_{role}_token") and ids[role] is None:
            problems.append(f"add_{role}_token is true without {role}_token_id")
    if problems:
        raise JloraError(
            f"{file}: the tokenizer can't be converted:\n  "
            + "\n  ".join(f"tokenizer.ggml.{problem}" for problem in problems)
            + "\nStart from the original Hugging Face directory instead."
        )

    try:
        bpe = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=_SPLITTERS[pre].ignore_merges,
        )
    except Exception as error:  # what tokenizers raises has no narrower type
        raise JloraError(f"{file}: tokenizer.ggml.merges don't fit the tokens: {error}") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(_SPLITTERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    # They are in the vocabulary already, so that each keeps its id.
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    add = {role: bool(get(f"add_{role}_token", False)) for role in ("bos", "eos")}
    named = {role: tokens[i] for role, i in ids.items() if i is not None}
    if any(add.values()):
        before = [named["bos"]] if add["bos"] else []
        after = [named["eos"]] if add["eos"] else []
        single = [*before, "$A", *after]
        second = [*(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + second,
            special_tokens=[(named[role], ids[role]) for role in add if add[role]],
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": named[role] for role in ("bos", "eos", "unk", "pad") if role in named},
        **{f"add_{role}_token": add[role] for role in add},
        "clean_up_tokenization_spaces": False,
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    # Some chat models name the end of a turn apart from the end of a text: both end an answer.
    ends = sorted({ids[role] for role in ("eos", "eot") if ids[role] is not None})
    id_config = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["pad"],
    }
    return tokenizer, config, id_config


def _pre_tokenizer(splitter: _Splitter) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    if splitter.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitter.split is not None:
        steps.append(pre_tokenizers.Split(Regex(splitter.split), behavior="isolated"))
    gpt2 = splitter.split is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    return pre_tokenizers.Sequence(steps)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
