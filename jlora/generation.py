"""Writes answers: batches of prompts, one pass over each, then a token a step from its KV cache.

Prompts are padded on the left, to few widths, so that few shapes are compiled. What may change
between calls (temperature, stop tokens, seed) is an argument of the compiled program, not part of
it.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora import injection
from jlora.bank import Bank
from jlora.errors import JloraError
from jlora.models.families import warn_of_length
from jlora.models.transformer import CausalLM, KVCache
from jlora.selection import gathered

_WIDTH = 32  # prompts are padded to a multiple of this
_STOPS = 8  # and stop tokens to a multiple of this
_NONE = -1  # where there is no token


class Prefilled(NamedTuple):
    """What a model knows of B prompts once it has read them: enough to go on from there."""

    logits: Array
    """float32 (B, V): of the first new token."""
    cache: KVCache
    valid: Array
    """bool (B, S): False for the slots of padding."""
    lengths: Array
    """int32 (B,): tokens of each prompt, which is the position of the first new token."""


class Sampling(NamedTuple):
    """How a token is drawn."""

    key: Array
    """A typed key, ()."""
    temperature: Array
    """float32 (): 0 takes the likeliest token."""
    top_p: Array
    """float32 ()."""


def generate(
    model: CausalLM | Bank,
    prompts: Sequence[np.ndarray],
    *,
    adapters: Sequence[str | None] | None = None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """Continue each prompt until a stop token, or until there are `max_new_tokens` new ones.

    Compiled once in a process for each model structure, `batch_size`, `max_new_tokens` and prompt
    length rounded up to a multiple of 32.

    Args:
        model: is run without dropout; its own mode stays as it is. Or a bank over one.
        prompts: int32 (T,) each, of any lengths.
        adapters: of a bank: the name of each prompt's adapter, None for the base alone; those of
            different adapters are run together. If left out, the active one is used for all.
        max_new_tokens: also sizes the cache, so a generous value costs memory.
        stop_ids: see the function of that name; may be empty.
        temperature: 0 takes the likeliest token at every step; otherwise logits are divided by it.
        top_p: draw only from the fewest likeliest tokens whose probabilities reach this sum.
        seed: a prompt's draws depend on it and on the prompt's place among `prompts`. They do not
            depend on `batch_size`, but for the rounding of logits in another shape.
        batch_size: prompts that are run together; a smaller number of them is filled up.

    Returns:
        The new tokens of each prompt, int32 (t,), in the order of `prompts`, less the stop token.

    Raises:
        JloraError: an argument out of range, an empty prompt, an unknown adapter.
    """
    _check(prompts, max_new_tokens, temperature, top_p, batch_size)
    bank = model if isinstance(model, Bank) else None
    _check_adapters(bank, adapters, len(prompts))
    config = model.config if isinstance(model, CausalLM) else model.model.config
    longest = max(map(len, prompts), default=0) + max_new_tokens
    warn_of_length(config, longest, f"prompts and {max_new_tokens} new tokens")
    frozen = injection.partition(model) if bank is None else bank.partition()
    sampling = Sampling(jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))
    stops = stop_array(stop_ids)
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for rows in batches([len(prompt) for prompt in prompts], batch_size):
        width = -(-max(len(prompts[row]) for row in rows) // _WIDTH) * _WIDTH
        tokens, mask = pad(prompts, rows, width, batch_size)
        if bank is not None and adapters is not None:
            filler = [None] * (batch_size - len(rows))
            frozen = bank.partition([*(adapters[row] for row in rows), *filler])
        prompt = prefill(*frozen, tokens, mask, slots=width + max_new_tokens)
        new = decode(
            *frozen, prompt, fill(rows, batch_size), stops, sampling, max_new_tokens=max_new_tokens
        )
        for row, line in zip(rows, np.asarray(new), strict=False):
            outputs[row] = line[line != _NONE]
    return outputs


def stop_ids(model_dir: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer, all that anything names, in ascending order.

    These are `eos_token_id` of generation_config.json and config.json, the tokenizer's, and the
    token that its chat template writes behind an answer, which is what training teaches.

    Raises:
        JloraError: a file is malformed, or none of them names a token.
    """
    found = [tokenizer.eos_token_id, tokenizer.turn_end_id]
    for name in ("generation_config.json", "config.json"):
        if (path := Path(model_dir) / name).is_file():
            found += _eos_tokens(path)
    ids = {token for token in found if token is not None}
    if not ids:
        raise JloraError(
            f"{model_dir}: nothing says which token ends an answer. Set eos_token_id in "
            "generation_config.json, or eos_token in tokenizer_config.json."
        )
    return tuple(sorted(ids))


def _eos_tokens(file: Path) -> list[int]:
    """Return what `eos_token_id` of a configuration names: a token, several, or none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        listed = config.get("eos_token_id")
        if listed is None:  # of a model of text and images
            listed = (config.get("text_config") or {}).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError):
        raise JloraError(f"{file} is not a JSON object; fetch the model again") from None
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if wrong := [i for i in ids if not isinstance(i, int) or isinstance(i, bool)]:
        raise JloraError(f"{file}: eos_token_id holds {wrong[0]!r}, which is not a token's number")
    return ids


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Rows in batches of similar length, shortest first; rows of one length keep their order."""
    order = np.argsort(np.asarray(lengths, np.int64), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(
    prompts: Sequence[np.ndarray], rows: np.ndarray, width: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask, (batch_size, width), padded on the left; filler rows empty."""
    tokens = np.zeros((batch_size, width), np.int32)
    mask = np.zeros((batch_size, width), bool)
    for i, row in enumerate(rows):
        start = width - len(prompts[row])
        tokens[i, start:] = prompts[row]
        mask[i, start:] = True
    return tokens, mask


def fill(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """int32 (batch_size,): the rows, then -1 for each filler row."""
    return np.pad(rows.astype(np.int32), (0, batch_size - len(rows)), constant_values=_NONE)


def stop_array(ids: Sequence[int]) -> np.ndarray:
    """int32, of a length that seldom changes: the stop tokens, then -1, which is no token."""
    length = max(1, -(-len(ids) // _STOPS)) * _STOPS
    return np.array([*ids, *[_NONE] * (length - len(ids))], np.int32)


@functools.partial(jax.jit, static_argnames="slots")
def prefill(
    adapters: Any,
    base: Any,
    tokens: Array,
    mask: Array,
    shared: KVCache | None = None,
    *,
    slots: int,
) -> Prefilled:
    """Read the prompts.

    Args:
        adapters: with `base`, the model as `injection.partition` or a bank splits it; run without
            dropout.
        base: see above.
        tokens: int32 (B, T), padded on the left.
        mask: bool (B, T), False for padding.
        shared: what stands before all the prompts: the cache of one row, without padding, of as
            many slots. Read once, it need not be computed for every row.
        slots: tokens a row that the cache can hold: those shared, T, and what is to follow.
    """
    model = evaluated(adapters, base)
    batch, width = tokens.shape
    before = model.init_cache(1, slots) if shared is None else shared
    keys, values = jax.tree.map(  # the axis of rows is the fourth from the end
        lambda x: jnp.broadcast_to(x, (*x.shape[:-4], batch, *x.shape[-3:])),
        (before.keys, before.values),
    )
    own = mask.sum(axis=1, dtype=jnp.int32)
    positions = before.length + jnp.maximum(jnp.arange(width) - (width - own)[:, None], 0)
    # Slots still to be written count as valid: causality hides them until they are.
    valid = jnp.ones((batch, slots), bool)
    valid = jax.lax.dynamic_update_slice_in_dim(valid, mask, before.length, axis=1)
    cache = KVCache(keys, values, before.length)
    hidden, cache = model.extend(tokens, positions, valid, cache)
    return Prefilled(model.logits(hidden[:, -1]), cache, valid, before.length + own)


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def decode(
    adapters: Any,
    base: Any,
    prompt: Prefilled,
    rows: Array,
    stops: Array,
    sampling: Sampling,
    *,
    max_new_tokens: int,
) -> Array:
    """Go on from `prompt`, a token a step, until every row has stopped.

    Args:
        adapters: with `base`, as for `prefill`.
        base: see above.
        prompt: its cache has room for `max_new_tokens` - 1 more.
        rows: int32 (B,): each row's number, from which its draws are derived; -1 for filler.
        stops: int32 (n,).
        sampling: how tokens are drawn.
        max_new_tokens: N.

    Returns:
        int32 (B, N), -1 from the stop token on.
    """
    keys = jax.vmap(lambda row: jax.random.fold_in(sampling.key, row))(rows)
    adapters = gathered(adapters)  # here, not at every step

    def put(step: Array, logits: Array, new: Array, done: Array) -> tuple[Array, Array, Array]:
        token = _draw(logits, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), sampling)
        done = done | (token[:, None] == stops).any(axis=1)
        return token, new.at[:, step].set(jnp.where(done, _NONE, token)), done

    def going(carry: tuple) -> Array:
        step, *_, done = carry
        return (step < max_new_tokens) & ~done.all()

    def advance(carry: tuple) -> tuple:
        step, token, cache, new, done = carry
        # New modules, in the loop: NNX lets them be used only in the trace that made them.
        model = evaluated(adapters, base)
        positions = prompt.lengths + step - 1
        hidden, cache = model.extend(token[:, None], positions[:, None], prompt.valid, cache)
        token, new, done = put(step, model.logits(hidden[:, -1]), new, done)
        return step + 1, token, cache, new, done

    new = jnp.full((len(rows), max_new_tokens), _NONE, jnp.int32)
    token, new, done = put(jnp.int32(0), prompt.logits, new, rows == _NONE)
    return jax.lax.while_loop(going, advance, (jnp.int32(1), token, prompt.cache, new, done))[3]


def evaluated(adapters: Any, base: Any) -> Any:
    """The model without dropout; a new one around the same arrays, as the caller's has its mode."""
    model = injection.combine(adapters, base)
    injection.eval_mode(model)
    return model


def _draw(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """float32 (B, V) logits and (B,) keys -> int32 (B,) tokens."""

    def likeliest(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits: Array) -> Array:
        logits = logits / sampling.temperature
        # The sort is worth sparing.
        logits = jax.lax.cond(
            sampling.top_p < 1, lambda x: _nucleus(x, sampling.top_p), lambda x: x, logits
        )
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature == 0, likeliest, drawn, logits)


def _nucleus(logits: Array, top_p: Array) -> Array:
    """Minus infinity for all but the likeliest tokens (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    likelier = jnp.cumsum(probs, axis=-1) - probs  # the sum before each, 0 for the first
    least = jnp.min(jnp.where(likelier < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def _check_adapters(bank: Bank | None, adapters: Sequence[str | None] | None, prompts: int) -> None:
    if adapters is None:
        return
    if bank is None:
        raise JloraError("adapters are of a bank: give generate a jlora.Bank for its model")
    if isinstance(adapters, str) or len(adapters) != prompts:
        raise JloraError(
            f"adapters is {adapters!r}: give a list of one name, or None, for each of the "
            f"{prompts} prompts"
        )
    bank.partition(adapters)  # all names are known


def _check(
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise JloraError(
            f"max_new_tokens = {max_new_tokens} and batch_size = {batch_size} must be at least 1"
        )
    # Written so that NaN fails too.
    if not 0 <= temperature < float("inf"):
        raise JloraError(
            f"temperature is {temperature}; it must be 0, for the likeliest token, or positive"
        )
    if not 0 < top_p <= 1:
        raise JloraError(
            f"top_p is {top_p}; it must be above 0 and at most 1, which leaves no token out"
        )
    if wrong := [i for i, prompt in enumerate(prompts) if not _is_tokens(prompt)]:
        raise JloraError(
            f"prompt {wrong[0]} (from 0) is {prompts[wrong[0]]!r:.60}, not a row of tokens: encode "
            "texts with the model's tokenizer, as tokenizer(text)['input_ids'] of transformers does"
        )
    if empty := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise JloraError(
            f"prompt {empty[0]} (from 0) has no token, so there is nothing to continue; give at "
            "least the token that begins a text"
        )


def _is_tokens(prompt: Any) -> bool:
    try:
        found = np.asarray(prompt)
    except ValueError:  # rows of several lengths
        return False
    return found.ndim == 1 and (found.dtype.kind in "iu" or not found.size)
