"""Whether a merged model still says what the adapted one did: their logits, side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import adapters, injection
from jlora.checkpoint import StoredAdapter
from jlora.data import chat, rows, source
from jlora.errors import JloraError
from jlora.models import load

_POSITIONS = 8  # of a prompt, its last, which have seen the rest
_WIDTH = 32  # prompts are padded to a multiple of this, so that few shapes are compiled
_COMPUTED = 1e-4  # of the largest logit: what another order of float32 sums may do
_FINEST = float(jnp.finfo(jnp.float32).eps)
_ROUNDED = 4  # times eps of the largest logit: what rounding the weights may do


class Verified(NamedTuple):
    """How far the merged model is from the adapted one."""

    difference: float
    """The largest between two logits."""
    bound: float
    effect: float
    """The largest difference between logits with the adapter and without."""
    agreement: float
    """Share of positions with the same likeliest token."""
    prompts: int

    def __str__(self) -> str:
        return (
            f"verified on {self.prompts} prompts: logits differ by at most {self.difference:.3g} "
            f"(bound {self.bound:.3g}; the adapter moves them by {self.effect:.3g}), the likeliest "
            f"token is the same at {self.agreement:.1%} of positions"
        )


def read_prompts(file: Path, tokenizer: Any) -> list[np.ndarray]:
    """Tokens of each prompt, int32 (T,), of a file of chats (JSON, Parquet) or of lines of text.

    Raises:
        JloraError: there are none, or the file cannot be read.
    """
    if file.suffix in rows.SUFFIXES:
        return [chat.prompt_tokens(record, tokenizer) for record in source.load_records(file)]
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise JloraError(f"{file} cannot be read as text: {error}") from None
    if not lines:
        raise JloraError(f"{file} holds no prompt; write one a line")
    return [chat.encode_prompt(line, tokenizer) for line in lines]


def compare(
    load_base: Callable[[], Any],
    stored: StoredAdapter,
    merged: Path,
    prompts: Sequence[np.ndarray],
    *,
    eps: float,
    bound: float | None = None,
    force: bool = False,
) -> Verified:
    """Compare the logits of a merged directory with those of the adapted model, in float32.

    Args:
        load_base: gives the base, which gets the adapter.
        stored: the adapter.
        merged: the directory.
        prompts: int32 (T,) each; their last positions are compared.
        eps: of the dtype that the merged weights were rounded to.
        bound: on the largest difference. None means what rounding may do to the largest logit, but
            no more than half of what the adapter does.
        force: as for `load_adapter`.

    Raises:
        JloraError: the difference is above the bound.
    """
    model = load_base()
    base = logits(model, prompts)
    adapted = logits(adapters.apply(stored, model, force=force, allow_zero=force), prompts)
    del model  # two models need not fit in memory
    found = logits(load.load(merged), prompts)
    # np.max, unlike max, is NaN wherever one is, and that is within no bound.
    difference, effect = (
        float(np.max([np.abs(x - y).max() for x, y in zip(adapted, others, strict=True)]))
        for others in (found, base)
    )
    if bound is None:
        largest = float(np.max([np.abs(x).max() for x in adapted]))
        bound = min((_COMPUTED + _ROUNDED * eps) * largest, effect / 2)
    same = [x.argmax(-1) == y.argmax(-1) for x, y in zip(adapted, found, strict=True)]
    agreement = float(np.concatenate(same).mean())
    verified = Verified(difference, bound, effect, agreement, len(prompts))
    if not difference <= bound:
        raise JloraError(
            f"the merged model is not the adapted one, and was not kept. {verified}. "
            + (
                "Is the adapter's change lost in rounding (--dtype float32 keeps it), or is this a "
                "fault?"
                if eps > _FINEST
                else "Weights in float32 lose nothing that matters: is the bound too tight, or is "
                "this a fault?"
            )
        )
    return verified


def logits(model: Any, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those at the last positions of each prompt, float32 (min(T, 8), V)."""
    parts = injection.partition(model)
    found = []
    with jax.default_matmul_precision("highest"):
        for prompt in prompts:
            width = -(-len(prompt) // _WIDTH) * _WIDTH
            tokens = np.zeros((1, width), np.int32)
            tokens[0, width - len(prompt) :] = prompt
            mask = np.arange(width)[None] >= width - len(prompt)
            found.append(np.asarray(_logits(*parts, tokens, mask))[0, -len(prompt) :])
    return found


@jax.jit
def _logits(trained: Any, base: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    model = injection.combine(trained, base)
    return model.logits(model.hidden(tokens, mask)[:, -_POSITIONS:]).astype(jnp.float32)
