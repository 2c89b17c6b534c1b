"""A model of a user in NNX, Linen and torch, with like names: layers that no family here has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax import nnx

VOCAB, WIDTH, HEADS = 11, 8, (2, 4)


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(VOCAB, WIDTH)
        self.conv = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.query = torch.nn.Linear(WIDTH, 8)
        self.mix = torch.nn.Linear(8, 6, bias=False)
        self.proj = torch.nn.Linear(6, WIDTH)
        self.image = torch.nn.Conv2d(1, 2, (3, 5), padding=(1, 2))
        self.head = torch.nn.Linear(WIDTH, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        x = torch.tanh(self.conv(x.transpose(1, 2)).transpose(1, 2))
        x = self.proj(torch.tanh(self.mix(self.query(self.norm(x)))))
        return self.head(torch.tanh(self.image(x[:, None])).sum(1))


class Nnx(nnx.Module):
    """`query` and `mix` keep heads apart, (8, 2, 4) and (2, 4, 3, 2); `proj` sums over (3, 2)."""

    def __init__(self, rngs: nnx.Rngs):
        self.emb = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.query = nnx.LinearGeneral(WIDTH, HEADS, rngs=rngs)
        self.mix = nnx.Einsum("BTNH,NHKL->BTKL", (*HEADS, 3, 2), rngs=rngs)
        self.proj = nnx.LinearGeneral((3, 2), WIDTH, axis=(-2, -1), rngs=rngs)
        self.image = nnx.Conv(1, 2, (3, 5), rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(self.conv(self.emb(tokens)))
        x = self.proj(jnp.tanh(self.mix(self.query(self.norm(x)))))
        return self.head(jnp.tanh(self.image(x[..., None])).sum(-1))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Conv(WIDTH, (3,), name="conv")(nn.Embed(VOCAB, WIDTH, name="emb")(tokens)))
        x = nn.DenseGeneral(HEADS, name="query")(nn.LayerNorm(name="norm")(x))
        x = nn.Einsum((*HEADS, 3, 2), "BTNH,NHKL->BTKL", use_bias=False, name="mix")(x)
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="proj")(jnp.tanh(x))
        x = jnp.tanh(nn.Conv(2, (3, 5), name="image")(x[..., None])).sum(-1)
        return nn.Dense(5, name="head")(x)


def torch_counterpart(leaves: dict[str, Any]) -> Torch:
    """The torch model with the weights of ours, written out by hand."""
    w = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    state = {
        "emb.weight": w["emb/embedding"],
        "conv.weight": np.einsum("kio->oik", w["conv/kernel"]),
        "norm.weight": w["norm/scale"],
        "query.weight": w["query/kernel"].reshape(WIDTH, 8).T,
        "query.bias": w["query/bias"].reshape(8),
        "mix.weight": w["mix/kernel"].reshape(8, 6).T,
        "proj.weight": w["proj/kernel"].reshape(6, WIDTH).T,
        "image.weight": np.einsum("hwio->oihw", w["image/kernel"]),
        "head.weight": w["head/kernel"].T,
    }
    state |= {f"{n}.bias": w[f"{n}/bias"] for n in ("conv", "norm", "proj", "image", "head")}
    model = Torch()
    model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in state.items()})
    return model.eval()
