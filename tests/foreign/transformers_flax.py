"""Transformers' own Linen models, of its last version that has them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from models import (
    HEADS,
    HIDDEN,
    IMAGES,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    TOKENS,
    VOCAB,
    WIDTH,
    Model,
    one_by_one,
    positions,
)  # fmt: skip

SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
LABELS = 5
FEATURES = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 16)), jnp.float32)


def _of(wrapper):
    return wrapper.module, {"params": wrapper.params}


def llama():
    """nn.Dense, with a wrapper that is no module."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB,
        **SIZES,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    return _of(FlaxLlamaForCausalLM(config, seed=0))


def gpt2():
    """A layer type of its own, with a transposed kernel; the head is the embedding."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    return _of(FlaxGPT2LMHeadModel(config, seed=0))


def bert():
    """A masked-language model, whose head is the embedding that it reads from another module."""
    from transformers import BertConfig, FlaxBertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        **SIZES,
        max_position_embeddings=POSITIONS,
    )
    return _of(FlaxBertForMaskedLM(config, seed=0))


def vit():
    """A convolution of patches, and names that torch's model has no longer."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        **SIZES,
        image_size=IMAGES.shape[1],
        patch_size=4,
        num_labels=LABELS,
    )
    return _of(FlaxViTForImageClassification(config, seed=0))


def whisper():
    """An encoder of convolutions, cross-attention, and the embedding as the head's kernel."""
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_mel_bins=FEATURES.shape[1],
        encoder_layers=1,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        max_source_positions=FEATURES.shape[2] // 2,
        max_target_positions=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return _of(FlaxWhisperForConditionalGeneration(config, seed=0))


def bloom():
    """Queries, keys and values in one kernel; no positions, and a head that is the embedding."""
    from transformers import BloomConfig, FlaxBloomForCausalLM

    config = BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS)
    return _of(FlaxBloomForCausalLM(config, seed=0))


def clip():
    """Two towers, and a scale that is a parameter of the module itself."""
    from transformers import CLIPConfig, FlaxCLIPModel

    both = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    config = CLIPConfig(
        text_config={
            **both,
            "vocab_size": VOCAB,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**both, "image_size": IMAGES.shape[1], "patch_size": 4},
        projection_dim=16,
    )
    return _of(FlaxCLIPModel(config, seed=0))


def _decode(module, variables):
    """Decode as their `generate` does: a cache made by init, and a mask over all of it."""
    base = module if not hasattr(module, "lora_base") else None
    mask = jnp.ones_like(TOKENS)
    cache = _cache(base or _plain(module), TOKENS, mask, positions(TOKENS), init_cache=True)

    def step(token, i):
        nonlocal cache
        out, changed = module.apply(
            {**variables, "cache": cache}, token, mask, jnp.full_like(token, i), mutable=["cache"]
        )
        cache = unfreeze(changed["cache"])
        return out.logits

    return one_by_one(step)


def _plain(module):
    import jlora

    return jlora.eject(module)


def _cache(module, *args, **kwargs):
    def init():
        return module.init(jax.random.key(0), *args, **kwargs)["cache"]

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unfreeze(jax.eval_shape(init)))


def _decoder(module, tokens, mask, at, encoded, **kwargs):
    decoder = module._get_decoder_module()
    out = decoder(tokens, mask, at, encoded, **kwargs)
    return out.last_hidden_state @ decoder.embed_tokens.embedding.T


def _decode_whisper(module, variables):
    """Methods given as functions: the encoder alone, then the decoder step by step."""
    mask = jnp.ones_like(TOKENS)
    encode = lambda m, x: m._get_encoder_module()(x).last_hidden_state  # noqa: E731
    encoded = module.apply(variables, FEATURES, method=encode)
    args = TOKENS, mask, positions(TOKENS), encoded
    cache = _cache(_plain(module), *args, init_cache=True, method=_decoder)

    def step(token, i):
        nonlocal cache
        out, changed = module.apply(
            {**variables, "cache": cache}, token, mask, jnp.full_like(token, i), encoded,
            mutable=["cache"], method=_decoder,
        )  # fmt: skip
        cache = unfreeze(changed["cache"])
        return out

    return one_by_one(step)


def _text():
    # Positional as in FlaxPreTrainedModel.__call__: ids, mask, positions; the rest has defaults.
    return TOKENS, jnp.ones_like(TOKENS), positions(TOKENS)


def _logits(out):
    return out.logits


def _row(name, build, inputs, sites, parameters, decode=None):
    return Model(name, "transformers", build, inputs, sites, parameters, _logits, decode)


ROWS = [
    _row("flax_llama", llama, _text, 14, 3_712, _decode),
    _row("flax_gpt2", gpt2, _text, 8, 4_096, _decode),
    _row("flax_bert", bert, lambda: (
        TOKENS, jnp.ones_like(TOKENS), jnp.zeros_like(TOKENS), positions(TOKENS), None
    ), 13, 3_584),
    _row("flax_vit", vit, lambda: (IMAGES,), 13, 3_476),
    _row("flax_bloom", bloom, lambda: (TOKENS, jnp.ones_like(TOKENS)), 8, 4_096),
    Model("flax_clip", "transformers", clip, lambda: (
        TOKENS, IMAGES, jnp.ones_like(TOKENS), positions(TOKENS)
    ), 26, 7_040, lambda out: out.logits_per_text),
    _row("flax_whisper", whisper, lambda: (
        FEATURES, TOKENS, jnp.ones_like(TOKENS), positions(TOKENS)
    ), 26, 7_040, _decode_whisper),
]  # fmt: skip
