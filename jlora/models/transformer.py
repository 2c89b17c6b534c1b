"""One pre-norm decoder in Flax NNX for the Llama family; attribute names are Hugging Face's.

Layers are a list (unrolled) or one module whose parameters have a leading layer axis (stacked, and
run by a scan). Linear layers are stock `nnx.Linear`, so that adapters know how to enter them.
"""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jlora.errors import JloraError
from jlora.models.attention import causal_attention, rotary_tables, rotate, windowed
from jlora.quant.array import QuantArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder. Field names are those of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]
    """Rotary frequencies, radians a position, (head_dim / 2,)."""
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norms on each head's queries and keys (Qwen3)."""
    max_position_embeddings: int = 2**31 - 1
    """Positions that the model was made for; what is beyond is computed all the same."""
    windows: tuple[int | None, ...] = ()
    """How many slots each layer's queries see, up to their own; None for all; () for all in all."""

    def beside_shapes(self) -> dict[str, Any]:
        """Return what outputs depend on that no parameter and no shape says, as JSON has it."""
        rotary = zlib.crc32(np.asarray(self.inv_freq, np.float32).tobytes())
        return {
            "num_attention_heads": self.num_attention_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rotary frequencies (rope_theta, rope_scaling), hash": f"{rotary:08x}",
            "windows": list(self.windows),
        }


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, param_dtype: Any):
        self.weight = nnx.Param(jnp.ones((size,), param_dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """(..., D) -> (..., D), in x's dtype."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        return self.weight[...].astype(x.dtype) * (x32 * jax.lax.rsqrt(variance + self.eps)).astype(
            x.dtype
        )


class KVCache(NamedTuple):
    """Keys and values so far: (B, S, K, H) a layer, stacked as the layers are, else in a tuple."""

    keys: Array | tuple[Array, ...]
    values: Array | tuple[Array, ...]
    length: Array
    """int32 (): slots in use."""


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Array
    sin: Array
    valid: Array
    """bool (B, S), True for keys of real tokens."""
    slots: Array | None
    """With a cache: int32 (T,), each token's own key, and the last that it sees."""


Windows = tuple[int | None, ...]
"""The window of a layer, or those that occur among stacked ones."""


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, windows: Windows):
        c = config
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = linear(c.hidden_size, queries, use_bias=c.qkv_bias)
        self.k_proj = linear(c.hidden_size, keys, use_bias=c.qkv_bias)
        self.v_proj = linear(c.hidden_size, keys, use_bias=c.qkv_bias)
        self.o_proj = linear(queries, c.hidden_size, use_bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)
        self.config, self.windows = config, windows

    def __call__(
        self, x: Array, ctx: Context, cache: tuple[Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """(B, T, D) -> (B, T, D), and this layer's keys and values if there is a cache."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q = self.q_proj(x).reshape(heads)
        k = self.k_proj(x).reshape(heads)
        v = self.v_proj(x).reshape(heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        if cache is not None:
            assert ctx.slots is not None
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, ctx.slots[0], axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        out = causal_attention(q, k, v, self._visible(ctx, k.shape[1]), ctx.slots)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _visible(self, ctx: Context, keys: int) -> Array:
        """Return `ctx.valid`, or, (B, T, S), with the window's limit where it is within S = keys.

        Raises:
            JloraError: stacked layers with windows that differ.
        """
        within = {w for w in self.windows if w is not None and w < keys}
        if not within:
            return ctx.valid
        if len(self.windows) > 1:
            raise JloraError(
                f"rows of {keys} slots, and stacked layers of which some see all and others "
                f"{min(within)} (sliding_window): load the model with scan_layers=False "
                "(--no-scan-layers), or keep rows within the window"
            )
        return windowed(ctx.valid, ctx.slots, within.pop())


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up; its backward pass keeps these two alone, and computes the sigmoid again."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear, use_bias=config.mlp_bias, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        """(..., D) -> (..., D)."""
        # One after the other, backwards too: XLA would dequantise both weights in one go.
        gate, x = jax.lax.optimization_barrier((self.gate_proj(x), x))
        return self.down_proj(swiglu(gate, self.up_proj(x)))


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, windows: Windows):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs, windows)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self, x: Array, ctx: Context, cache: tuple[Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """(B, T, D) -> (B, T, D), and the layer's cache."""
        attended, cache = self.self_attn(self.input_layernorm(x), ctx, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


def _run(
    layer: Block, x: Array, ctx: Context, cache: tuple[Array, Array] | None
) -> tuple[Array, tuple[Array, Array] | None]:
    return layer(x, ctx, cache)


# Traced once for all layers, which halves the time to trace; XLA inlines what jit makes of it.
_run_jit, _run_remat = nnx.jit(_run), nnx.remat(_run)

# A scan's forward and backward passes are loops of their own, in which nothing is common. Telling
# XLA so all the same would have it cut out all of a layer's weights before it used the first.
_run_scanned = nnx.remat(_run, prevent_cse=False)


class Transformer(nnx.Module):
    """Embedding, layers and final norm."""

    stacked_layers = ("layers",)  # where scan_layers makes them one module

    def __init__(
        self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs, *, scan_layers: bool, remat: bool
    ):
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        if scan_layers:
            windows = tuple(dict.fromkeys(config.windows))
            stacked = nnx.vmap(lambda rngs: Block(config, dtype, rngs, windows), in_axes=0)
            keys = jax.random.split(rngs.params(), config.num_hidden_layers)
            self.layers: Any = stacked(nnx.Rngs(params=keys))
        else:
            each = config.windows or (None,) * config.num_hidden_layers
            self.layers = nnx.List([Block(config, dtype, rngs, (window,)) for window in each])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.config, self.scan_layers, self.remat = config, scan_layers, remat

    def __call__(
        self, tokens: Array, positions: Array, valid: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        """int32 (B, T) tokens and positions -> (B, T, D), and the cache.

        `valid` is that of `causal_attention`: bool (B, S) or (B, T, S).
        """
        x = self.embed_tokens(tokens)
        cos, sin = rotary_tables(positions, jnp.asarray(self.config.inv_freq, jnp.float32), x.dtype)
        slots = None
        if cache is not None:
            slots = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        ctx = Context(cos, sin, valid, slots)
        run: Any = _run_jit
        if self.remat and cache is None:
            run = _run_scanned if self.scan_layers else _run_remat
        layer_caches: Any = None if cache is None else (cache.keys, cache.values)
        if self.scan_layers:
            scan = nnx.scan(
                lambda x, layer, ctx, layer_cache: run(layer, x, ctx, layer_cache),
                in_axes=(nnx.Carry, 0, None, 0),
                out_axes=(nnx.Carry, 0),
            )
            x, layer_caches = scan(x, self.layers, ctx, layer_caches)
        else:
            caches: list[Any] = []
            for i, layer in enumerate(self.layers):
                one = None if layer_caches is None else (layer_caches[0][i], layer_caches[1][i])
                x, one = run(layer, x, ctx, one)
                caches.append(one)
            if cache is not None:
                layer_caches = tuple(zip(*caches, strict=True))
        if cache is not None:
            keys, values = layer_caches
            cache = KVCache(keys, values, cache.length + tokens.shape[1])
        return self.norm(x), cache


class CausalLM(nnx.Module):
    """A decoder with its output projection, tied to the embedding or not."""

    output_head = "lm_head"  # what target_modules="all-linear" leaves out

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        scan_layers: bool = False,
        remat: bool = False,
    ):
        self.model = Transformer(config, dtype, rngs, scan_layers=scan_layers, remat=remat)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )
        self.config, self.dtype = config, dtype

    @property
    def tied_weights(self) -> dict[str, str]:
        """Path of a layer -> where else its weight is used."""
        return {"model/embed_tokens": "the output head"} if self.config.tie_word_embeddings else {}

    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        """Next-token logits.

        Args:
            tokens: int32 (B, T).
            mask: bool (B, T), False for padding, on either side; None means no padding.

        Returns:
            float32 (B, T, V); at padding the values mean nothing.
        """
        return self.logits(self.hidden(tokens, mask))

    def hidden(self, tokens: Array, mask: Array | None = None) -> Array:
        """The last layer's normalised states, (B, T, D); arguments as for `__call__`."""
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        return self.model(tokens, _positions(mask), mask, None)[0]

    def extend(
        self, tokens: Array, positions: Array, valid: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        """States of the tokens that follow those in the cache.

        Args:
            tokens: int32 (B, T).
            positions: int32 (B, T).
            valid: bool (B, S), True for cache slots that hold a real token, the new ones included.
            cache: its slots from `length` on are written.

        Returns:
            (B, T, D), and the longer cache.
        """
        hidden, longer = self.model(tokens, positions, valid, cache)
        assert longer is not None
        return hidden, longer

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `slots` tokens a row."""
        c = self.config
        shape, layers = (batch, slots, c.num_key_value_heads, c.head_dim), c.num_hidden_layers

        def zeros() -> Array | tuple[Array, ...]:
            if self.model.scan_layers:
                return jnp.zeros((layers, *shape), self.dtype)
            return tuple(jnp.zeros(shape, self.dtype) for _ in range(layers))

        return KVCache(zeros(), zeros(), jnp.zeros((), jnp.int32))

    def head_weight(self) -> Array:
        """The output projection, (V, D)."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.embedding[...]
        kernel = self.lm_head.kernel.get_value()
        return (kernel.dequantize() if isinstance(kernel, QuantArray) else kernel).T

    def logits(self, hidden: Array) -> Array:
        """(..., D) -> float32 (..., V)."""
        if self.config.tie_word_embeddings:
            return jnp.einsum(
                "...d,vd->...v", hidden, self.head_weight(), preferred_element_type=jnp.float32
            )
        return self.lm_head(hidden).astype(jnp.float32)


def _positions(mask: Array) -> Array:
    """Count real tokens only, so that padding on the left shifts nothing."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
