"""Examples of Flax itself, from its source distribution, which `make foreign` unpacks."""

import importlib
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from models import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    TOKENS,
    VOCAB,
    WIDTH,
    Model,
    one_by_one,
)  # fmt: skip
from tunix_nnx import decode, inputs

SOURCE = Path(__file__).parents[2] / "build" / "flax-examples"


def _lm1b():
    """Load the example's `models`, a name that this directory has a module of too."""
    spec = importlib.util.spec_from_file_location("lm1b_models", SOURCE / "lm1b" / "models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("lm1b_models", module)
    spec.loader.exec_module(module)
    return module


def _lm(decode):
    module = _lm1b()
    config = module.TransformerConfig(
        vocab_size=VOCAB,
        output_vocab_size=VOCAB,
        emb_dim=WIDTH,
        num_heads=HEADS,
        num_layers=LAYERS,
        qkv_dim=WIDTH,
        mlp_dim=HIDDEN,
        max_len=POSITIONS,
        deterministic=True,
        decode=decode,
    )
    return module.TransformerLM(config)


def lm1b():
    """Kernels in boxes that name fewer axes than they have (nn.with_logical_partitioning)."""
    model = _lm(decode=False)
    return model, model.init(jax.random.key(0), TOKENS)


def _decode_lm1b(model, variables):
    """The module with decode=True on the same parameters, injected where `model` is.

    It does not shift its inputs, as training does: what it is given first is the start, 0.
    """
    import jlora

    twin = _lm(decode=True)
    cache = twin.init(jax.random.key(0), jnp.zeros_like(TOKENS))["cache"]
    if hasattr(model, "lora_base"):
        twin = jlora.inject(twin, model.lora.config, training=False)
    shifted = jnp.pad(TOKENS, ((0, 0), (1, 0)))[:, :-1]

    def step(_, i):
        nonlocal cache
        given = {**variables, "cache": cache}
        out, changed = twin.apply(given, shifted[:, i : i + 1], mutable=["cache"])
        cache = changed["cache"]
        return out

    return one_by_one(step)


def gemma():
    """NNX: einsum layers with several outputs, a subclass of nnx.Embed that is also the head."""
    if (path := str(SOURCE / "gemma")) not in sys.path:
        sys.path.append(path)
    cfg, transformer = map(importlib.import_module, ("transformer_cfg", "transformer"))
    config = cfg.TransformerConfig(
        num_layers=LAYERS,
        num_embed=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=8,
        num_kv_heads=KV_HEADS,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(cfg.AttentionType.LOCAL_SLIDING, cfg.AttentionType.GLOBAL),
        sliding_window_size=POSITIONS,
    )
    return transformer.Transformer(config, rngs=nnx.Rngs(0)), None


def unboxed(variables):
    """The arrays in boxes."""
    return meta.unbox(variables)


ROWS = [
    Model("lm1b", "flax", lm1b, lambda: (TOKENS,), 13, 3_840, decode=_decode_lm1b),
    Model("gemma", "flax", gemma, inputs, 12, 3_456, lambda out: out[0], decode(KV_HEADS, 8)),
]
