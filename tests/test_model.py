"""The decoder, and Hugging Face directories read and written whole or refused by name."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jlora
from jlora import canonical, injection
from jlora.errors import JloraError
from jlora.models import families
from jlora.models.load import load, save
from jlora.models.transformer import Block

pytestmark = pytest.mark.usefixtures("strict_promotion")

ROOT = Path(__file__).parent.parent
SMOLLM2 = Path(os.environ.get("JLORA_SMOLLM2", ROOT / "models" / "smollm2"))
TOKENS = jnp.asarray([[5, 9, 200, 7, 7, 31, 2], [8, 1, 4, 100, 23, 0, 1]], jnp.int32)
UP = "model.layers.{}.mlp.up_proj.weight"


def forward(model: Any, *args: Any, method: str = "__call__") -> Any:
    """A method under jit, weights as arguments."""
    return _run(*injection.partition(model, everything=True), args, method)


# Unoptimised programs compile in half the time.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(fast_jit, static_argnums=3)
def _run(leaves: dict, base: Any, args: tuple, method: str) -> Any:
    return getattr(injection.combine(leaves, base), method)(*args)


def weights(model: Any) -> dict[str, np.ndarray]:
    """In the canonical form."""
    leaves, _ = injection.partition(model, everything=True)
    flat = canonical.unstack(leaves, injection.stacks(model))
    return {path: np.array(leaf) for path, leaf in sorted(flat.items())}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def shard(model_dir: Path) -> Path:
    """Split the weights over two files, as large models come."""
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, model_dir / file)
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return model_dir


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory of the test's own."""
    return shutil.copytree(model_dir, tmp_path / "copied")


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load(model_dir)


@pytest.fixture(scope="module")
def logits(model: Any) -> jax.Array:
    return forward(model, TOKENS)


class TestReading:
    def test_every_weight_is_where_it_belongs(self, model_dir: Path, model: Any) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        read = weights(model)
        assert len(read) == len(tensors) == 2 + 9 * 2
        for path, leaf in read.items():
            name, transposed = families.hf_name(path)
            np.testing.assert_array_equal(leaf, tensors[name].T if transposed else tensors[name])
        name = "model.layers.1.self_attn.k_proj.weight"
        assert tensors[name].shape == (16, 32)  # torch keeps (out, in)
        np.testing.assert_array_equal(
            read["model/layers/1/self_attn/k_proj/kernel"], tensors[name].T
        )

    def test_stacked_and_sharded(self, copied: Path, model: Any, logits: jax.Array) -> None:
        stacked = load(shard(copied), scan_layers=True)
        assert_same(weights(stacked), weights(model))
        np.testing.assert_allclose(forward(stacked, TOKENS), logits, atol=1e-5)
        assert injection.stacks(stacked) == {"model/layers": 2}

    def test_bfloat16(self, model_dir: Path, model: Any, logits: jax.Array) -> None:
        half = load(model_dir, dtype=jnp.bfloat16)
        expected = {path: leaf.astype(jnp.bfloat16) for path, leaf in weights(model).items()}
        assert_same(weights(half), expected)
        out = forward(half, TOKENS)
        assert out.dtype == jnp.float32
        hidden = nnx.eval_shape(lambda model: model.hidden(TOKENS), half)
        assert hidden.dtype == jnp.bfloat16
        difference = np.linalg.norm(np.asarray(out - logits)) / np.linalg.norm(np.asarray(logits))
        assert 0 < difference < 2e-2

    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_what_is_written_is_read(self, scan_layers: bool, model_dir: Path, tmp_path: Path):
        model = load(model_dir, dtype=jnp.bfloat16, scan_layers=scan_layers)
        save(model, tmp_path / "to", source=model_dir)
        assert {file.name for file in (tmp_path / "to").iterdir()} == {
            file.name for file in model_dir.iterdir()
        }
        assert_same(weights(load(tmp_path / "to", dtype=jnp.bfloat16)), weights(model))
        with pytest.raises(JloraError, match="isn't empty"):
            save(model, tmp_path / "to", source=model_dir)

    def test_tied_heads(self, copied: Path, logits: jax.Array, model: Any) -> None:
        head = model.head_weight()
        np.testing.assert_array_equal(head, model.model.embed_tokens.embedding[...])
        hidden = forward(model, TOKENS, method="hidden")
        np.testing.assert_allclose(hidden @ head.T, logits, rtol=1e-4, atol=1e-5)
        tensors = load_file(copied / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # some files repeat it
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        save_file(tensors, copied / "model.safetensors")
        assert_same(weights(load(copied)), weights(model))

    def test_untied_heads(self, copied: Path, logits: jax.Array) -> None:
        edit_config(tie_word_embeddings=False)(copied)
        tensors = load_file(copied / "model.safetensors")
        tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
        save_file(tensors, copied / "model.safetensors")
        untied = load(copied)
        np.testing.assert_allclose(forward(untied, TOKENS), 2 * logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(untied.head_weight(), tensors["lm_head.weight"])
        assert "lm_head" not in {
            t.site.path for t in injection.plan(untied, jlora.LoraConfig()).targets
        }

    @pytest.mark.parametrize(
        ("changes", "extra"),
        [
            ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, set()),
            (
                {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
                {f"self_attn.{n}_proj.bias" for n in "qkvo"}
                | {f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
            ),
            (
                {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9,
                 "use_sliding_window": False},
                {f"self_attn.{n}_proj.bias" for n in "qkv"},
            ),
            (
                {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
                {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
            ),
        ],
        ids=["mistral", "llama with biases", "qwen2", "qwen3"],
    )  # fmt: skip
    def test_families(self, changes: dict, extra: set[str], tmp_path: Path) -> None:
        one_layer = {"num_hidden_layers": 1, "vocab_size": 16}
        model_dir = helpers.write_model(tmp_path / "m", **one_layer, **changes)
        names = set(load_file(model_dir / "model.safetensors"))
        plain = {families.hf_name(path)[0] for path in LLAMA}
        assert names == plain | {f"model.layers.0.{name}" for name in extra}
        tensors = load_file(model_dir / "model.safetensors")
        model = load(model_dir)
        before = forward(model, TOKENS[:1, :3] % 16)
        assert jnp.isfinite(before).all()
        for name in extra:  # each of them counts
            tensor = tensors[f"model.layers.0.{name}"]
            ramp = np.linspace(0, 1, tensor.size, dtype=np.float32)
            changed = {**tensors, f"model.layers.0.{name}": tensor + ramp}
            save_file(changed, model_dir / "model.safetensors")
            after = forward(load(model_dir), TOKENS[:1, :3] % 16)
            assert not np.allclose(after, before, atol=1e-6), name

    def test_rotary_frequencies(self, copied: Path) -> None:
        def inv_freq(**changes: Any) -> np.ndarray:
            edit_config(**changes)(copied)
            return np.asarray(families.read_config(copied).inv_freq)

        plain = 10000.0 ** -(np.arange(4) / 4)
        np.testing.assert_allclose(inv_freq(), plain, rtol=1e-6)
        np.testing.assert_allclose(
            inv_freq(rope_scaling={"type": "linear", "factor": 4.0}), plain / 4, rtol=1e-6
        )
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
        # Wavelengths 6.3, 63, 630, 6300 against 64 / 4 and 64 / 1: kept, blended, divided twice.
        smooth = (64 / (2 * np.pi * 10) - 1) / 3
        blend = np.asarray([1, (1 - smooth) / 8 + smooth, 1 / 8, 1 / 8])
        np.testing.assert_allclose(inv_freq(rope_scaling=scaling), plain * blend, rtol=1e-5)
        newer = inv_freq(rope_scaling=None, rope_parameters={"rope_theta": 16.0})
        np.testing.assert_allclose(newer, 16.0 ** -(np.arange(4) / 4), rtol=1e-6)


LLAMA = [
    "model/embed_tokens/embedding",
    "model/norm/weight",
    *(f"model/layers/0/{n}/weight" for n in ("input_layernorm", "post_attention_layernorm")),
    *(f"model/layers/0/self_attn/{n}_proj/kernel" for n in "qkvo"),
    *(f"model/layers/0/mlp/{n}_proj/kernel" for n in ("gate", "up", "down")),
]


class TestForward:
    def test_padding_on_either_side_changes_nothing(self, model: Any, logits: jax.Array) -> None:
        for before, after in ((0, 3), (3, 0), (1, 2)):
            tokens = jnp.pad(TOKENS, ((0, 0), (before, after)), constant_values=9)
            mask = jnp.pad(jnp.ones(TOKENS.shape, bool), ((0, 0), (before, after)))
            got = forward(model, tokens, mask)[:, before : before + TOKENS.shape[1]]
            np.testing.assert_allclose(got, logits, atol=1e-5)

    def test_no_token_sees_a_later_one(self, model: Any, logits: jax.Array) -> None:
        changed = forward(model, TOKENS.at[:, 4].set(77))
        np.testing.assert_allclose(changed[:, :4], logits[:, :4], atol=1e-5)
        assert not np.allclose(changed[:, 4:], logits[:, 4:], atol=1e-2)

    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_a_cache_gives_what_the_whole_gives(self, scan_layers, model_dir, logits) -> None:
        model = load(model_dir, scan_layers=scan_layers)
        cache = model.init_cache(2, 9)
        for start, stop in ((0, 4), (4, 7)):
            positions = jnp.broadcast_to(
                jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start)
            )
            valid = jnp.tile(jnp.arange(9) < stop, (2, 1))
            new = TOKENS[:, start:stop], positions, valid
            hidden, cache = forward(model, *new, cache, method="extend")
            got = model.logits(hidden)
            np.testing.assert_allclose(got, logits[:, start:stop], atol=1e-5)
            assert cache.length == stop

    def test_remat_changes_no_gradient(self, model_dir: Path) -> None:
        def gradients(scan_layers: bool, remat: bool) -> dict[str, np.ndarray]:
            model = load(model_dir, scan_layers=scan_layers, remat=remat)
            leaves, base = injection.partition(model, everything=True)

            def loss(leaves: dict) -> jax.Array:
                return jnp.sin(injection.combine(leaves, base)(TOKENS)).mean()

            assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(leaves))) == remat
            grads = canonical.unstack(fast_jit(jax.grad(loss))(leaves), injection.stacks(model))
            return {path: np.asarray(leaf) for path, leaf in grads.items()}

        expected = gradients(scan_layers=False, remat=False)
        for scan_layers in (False, True):
            got = gradients(scan_layers, remat=True)
            assert got.keys() == expected.keys()
            for path, leaf in expected.items():
                np.testing.assert_allclose(got[path], leaf, atol=1e-5 * np.abs(leaf).max())


def edit_config(drop: tuple[str, ...] = (), **changes: Any) -> Callable[[Path], None]:
    def change(model_dir: Path) -> None:
        file = model_dir / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))

    return change


def edit_tensors(**changes: tuple[int, ...] | None) -> Callable[[Path], None]:
    """Tensors of other shapes, or (None) absent."""

    def change(model_dir: Path) -> None:
        file = model_dir / "model.safetensors"
        tensors = load_file(file)
        for name, shape in changes.items():
            tensors.pop(name, None)
            if shape is not None:
                tensors[name] = np.zeros(shape, np.float32)
        save_file(tensors, file)

    return change


def in_shards(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda model_dir: change(shard(model_dir))


def truncate(name: str) -> Callable[[Path], None]:
    return lambda at: (at / name).write_bytes((at / name).read_bytes()[:-9]) and None


SECOND = "model-00002-of-00002.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no directory": (
        shutil.rmtree,
        ["config.json does not exist; --model takes a Hugging Face model directory", "jlora fetch"],
    ),
    "no JSON": (truncate("config.json"), ["config.json is not JSON: ", "fetch the model again"]),
    "a JSON list": (
        lambda at: (at / "config.json").write_text("[]"), ["config.json holds no JSON object"]
    ),
    "missing keys": (
        edit_config(drop=("hidden_size", "vocab_size", "rms_norm_eps")),
        ["config.json: missing vocab_size, hidden_size; fetch the model again"],
    ),
    "truncated": (
        truncate("model.safetensors"),
        ["model.safetensors is truncated or no safetensors file", "fetch it again"],
    ),
    "truncated shard": (in_shards(truncate(SECOND)), [f"{SECOND} is truncated"]),
    "missing shard": (in_shards(lambda at: (at / SECOND).unlink()), [f"lacks {SECOND};"]),
    "no index": (
        in_shards(lambda at: (at / "model.safetensors.index.json").write_text("[1]")),
        ["model.safetensors.index.json is not a safetensors index; fetch it again"],
    ),
    "keys and shapes": (
        edit_tensors(**{
            UP.format(0): None, UP.format(1): (32, 48), UP.format(2): (48, 32),
            "model.norm.weight": None, "model.embed_tokens.weight": (272, 31),
        }),
        ["does not fit:", f"missing: {UP.format(0)} (48, 32)", "missing: model.norm.weight (32,)",
         f"unexpected: {UP.format(2)} (48, 32)",
         f"shape: {UP.format(1)} is (32, 48), expected (48, 32)",
         "shape: model.embed_tokens.weight is (272, 31), expected (272, 32)", "fetch or convert"],
    ),
    "a head that nothing ties": (
        edit_config(tie_word_embeddings=False), ["missing: lm_head.weight (272, 32)"]
    ),
    "another size": (
        edit_config(num_hidden_layers=30),
        [f"missing: {UP.format(3).replace('mlp.up_proj', 'input_layernorm')}",
         "  … and 242 more of this kind"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(change: Callable, parts: list[str], copied: Path) -> None:
    change(copied)
    with pytest.raises(JloraError) as caught:
        load(copied)
    for part in [str(copied), *parts]:
        assert part in str(caught.value)


def test_smollm2_knows_its_capital() -> None:
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip(f"no SmolLM2 in {SMOLLM2}: fetch it there, or set JLORA_SMOLLM2")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
    tokens = jnp.asarray([tokenizer.encode("The capital of France is").ids], jnp.int32)
    model = load(SMOLLM2)
    assert injection.count(model) == (0, 134_515_008)
    logits = forward(model, tokens)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.mark.parametrize("remat", [False, True])
def test_unrolled_layers_are_traced_once(model_dir, monkeypatch, remat):
    calls = []
    forward = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda *args: calls.append(0) or forward(*args))
    model = load(model_dir, remat=remat)
    leaves, rest = injection.partition(model, everything=True)
    tokens = jnp.arange(11, dtype=jnp.int32)[None]  # of a length that no other test has
    jax.make_jaxpr(lambda leaves: injection.combine(leaves, rest)(tokens))(leaves)
    assert model.config.num_hidden_layers == 2
    assert len(calls) == 1
