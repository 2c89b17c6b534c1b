"""The same models in torch, and both sides' logits as NumPy arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from flax import nnx

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# Name: the model type, what its config says beside the sizes, and the dtype on disk.
FAMILIES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("Llama", {}, torch.float32),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, torch.float32),
    "llama3-rope-biases": (
        "Llama",
        {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
        torch.float32,
    ),
    "llama-linear-rope": ("Llama", {"rope_parameters": _LINEAR_ROPE}, torch.float32),
    "mistral": ("Mistral", {"sliding_window": None}, torch.float32),
    "qwen2-bf16": ("Qwen2", {"tie_word_embeddings": True}, torch.bfloat16),
    "qwen3": ("Qwen3", {"head_dim": 16}, torch.float32),
}
VOCAB = 97


def write_tiny(family: str, to: Path) -> Path:
    """A random model of three layers, saved by transformers in several shards."""
    kind, settings, dtype = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():  # norms of one and biases of zero would hide a mistake
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(to, max_shard_size="20KB")
    return to


def torch_model(directory: Path) -> Any:
    """The model in float32, without dropout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def torch_logits(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """float32 (B, T, V) of int (B, T) tokens; bool (B, T) mask, False for padding."""
    attention_mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        return model(input_ids=ids, attention_mask=attention_mask).logits.float().numpy()


@nnx.jit
def _logits(model: Any, tokens: Any, mask: Any) -> Any:
    return model(tokens, mask)


def our_logits(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The same of our model."""
    return np.asarray(_logits(model, np.asarray(tokens, np.int32), mask))


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """int32, of the tiny models' vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)
