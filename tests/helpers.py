"""Tiny models and data that the tests build themselves."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache as cache
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jlora import canonical, injection
from jlora.models import families
from jlora.models.transformer import CausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def write_model(to: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model of 3 layers with a byte-level tokenizer, as a Hugging Face directory."""
    to.mkdir(parents=True, exist_ok=True)
    about = HF_CONFIG | changes
    if "model_type" not in changes:  # that of the class
        kinds = {family.architecture: kind for kind, family in families.FAMILIES.items()}
        about["model_type"] = kinds[about["architectures"][0]]
    (to / "config.json").write_text(json.dumps(about))
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    config = families.read_config(to)
    model = CausalLM(config, rngs=nnx.Rngs(seed))
    leaves, _ = injection.partition(model, everything=True)
    tensors = {}
    for path, leaf in canonical.unstack(leaves, {}).items():
        name, transposed = families.hf_name(path)
        array = np.asarray(leaf)
        if name.endswith("norm.weight"):  # ones would hide a norm that is skipped
            array = array + 0.1 * np.random.default_rng(len(name)).normal(size=array.shape)
        array = array.astype(np.float32)
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    save_file(tensors, to / "model.safetensors")
    write_tokenizer(to)
    return to


def write_tokenizer(to: Path) -> None:
    """Bytes, and three special tokens; vocabulary of 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(to / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (to / "tokenizer_config.json").write_text(json.dumps(settings))


def write_chats(
    to: Path, rows: int = 24, splits: tuple[str, ...] = ("train", "valid", "test")
) -> Path:
    """Chats whose answer is the word for the prompt's first letter; labels.txt beside them."""
    to.mkdir(parents=True, exist_ok=True)
    words = {"a": "yes", "b": "no"}
    for s, split in enumerate(splits):
        lines = []
        for i in range(rows):
            letter = "ab"[(i + s) % 2]
            messages = [
                {"role": "user", "content": letter * (1 + (7 * i + s) % 9)},
                {"role": "assistant", "content": words[letter]},
            ]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (to / f"{split}.jsonl").write_text("".join(lines))
    (to / "labels.txt").write_text("yes\nno\n")
    return to


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Trees by path whose leaves are the same bits; a leaf may be a quantised weight."""
    assert a.keys() == b.keys()
    for path in a:
        leaves, others = jax.tree.flatten(a[path]), jax.tree.flatten(b[path])
        assert leaves[1] == others[1], path
        for x, y in zip(leaves[0], others[0], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


class Mlp(nnx.Module):
    """A user's own NNX model: a stack of layers, unrolled or stacked, and a head."""

    def __init__(self, rngs: nnx.Rngs, *, stacked: bool = False, layers: int = 3, width: int = 8):
        def block(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(width, width, rngs=rngs)

        keys = jax.random.split(rngs.params(), layers)  # the same weights in both layouts
        if stacked:
            self.layers = nnx.vmap(block, in_axes=0)(nnx.Rngs(params=keys))
        else:
            self.layers = nnx.List([block(nnx.Rngs(params=key)) for key in keys])
        self.lm_head = nnx.Linear(width, 5, rngs=rngs)
        self.stacked = stacked

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, width) -> (B, 5)."""
        if self.stacked:
            scan = nnx.scan(
                lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            x = scan(x, self.layers)
        else:
            for layer in self.layers:
                x = jnp.tanh(layer(x))
        return self.lm_head(x)


@contextmanager
def compilation_cache(directory: Path) -> Iterator[None]:
    """Compile quickly, and keep programs in `directory` for tests that run the same ones."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    cache.reset_cache()  # JAX looks at the settings once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under `directory`, by relative path."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}
