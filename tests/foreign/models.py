"""Tiny random models of two other libraries: transformers 4.57 (Linen) and tunix 0.1 (NNX).

Each function returns (model, params or None, call); call(model, params, tokens) gives logits as a
user of that library gets them. All weights are random (tunix's own initialiser leaves the MLP 0).
"""

import zlib

import jax
import jax.numpy as jnp

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN, POSITIONS = 96, 32, 2, 4, 2, 48, 32


def flax_llama(tied=False):
    """Transformers' Llama in Linen: nn.Dense."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,  # FlaxLlama's module ignores it
    )
    model = FlaxLlamaForCausalLM(config, seed=0)
    return model.module, model.params, _apply_linen


def flax_gpt2(tied=True):
    """Transformers' GPT-2 in Linen: a layer type of its own, with a transposed kernel."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        tie_word_embeddings=tied,  # True is GPT2Config's default
    )
    model = FlaxGPT2LMHeadModel(config, seed=0)
    return model.module, model.params, _apply_linen


def tunix_llama3(tied=False, remat=None):
    """Tunix's Llama 3 in NNX: einsum on plain parameters."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=tied,
        remat_config=llama3.RematConfig[remat or "NONE"],
    )
    return _random_mlp(llama3.Llama3(config, rngs=nnx.Rngs(0))), None, _call_nnx


def tunix_qwen3(tied=True, remat=None, experts=None):
    """Tunix's Qwen 3 in NNX."""
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3

    config = qwen3.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=12,  # heads * head_dim need not be the width
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=tied,
        num_experts=experts,
        num_experts_per_tok=2 if experts else None,
        remat_config=qwen3.RematConfig[remat or "NONE"],
    )
    return _random_mlp(qwen3.Qwen3(config, rngs=nnx.Rngs(0))), None, _call_nnx


MODELS = {
    "flax_llama": flax_llama,
    "flax_gpt2": flax_gpt2,
    "tunix_llama3": tunix_llama3,
    "tunix_qwen3": tunix_qwen3,
}


def _apply_linen(module, params, tokens):
    # Positional as in FlaxPreTrainedModel.__call__: ids, mask, positions; the rest has defaults
    # (deterministic=True). Both families take these three first; GPT2 needs all three.
    mask = jnp.ones_like(tokens)
    return module.apply({"params": params}, tokens, mask, positions(tokens)).logits


def _call_nnx(model, params, tokens):
    del params
    logits, _ = model(*inputs(tokens))
    return logits


def inputs(tokens):
    """Arguments of tunix's models: tokens, positions, cache, mask."""
    length = tokens.shape[-1]
    causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (tokens.shape[0], length, length))
    return tokens, positions(tokens), None, causal


def positions(tokens):
    """0, 1, 2... for each row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


def _random_mlp(model):
    """Tunix initialises the MLP's kernels with zeros, where adapters would have no gradient."""
    from flax import nnx

    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel" and path[-3] == "mlp":
            key = jax.random.fold_in(
                jax.random.key(1), zlib.crc32("/".join(map(str, path)).encode())
            )
            param.set_value(0.1 * jax.random.normal(key, param.shape, param.dtype))
    return model
