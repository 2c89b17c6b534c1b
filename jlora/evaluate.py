"""Scores a model's answers: is the greedy answer right to the letter, and is the likeliest label?

Both questions are asked of one pass over the prompts. Labels are scored as a tree: those that begin
alike share their first tokens, and many branches are run as one sequence whose attention mask keeps
them apart, so the cache of the prompts serves all of them and is not copied for each.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora import injection
from jlora.data import chat
from jlora.data.batching import choose_lengths
from jlora.data.records import Record
from jlora.errors import JloraError
from jlora.generation import (
    Prefilled,
    Sampling,
    batches,
    decode,
    evaluated,
    fill,
    pad,
    prefill,
    stop_array,
)
from jlora.models.transformer import CausalLM

_SHAPES, _MULTIPLE = 3, 8  # widths that prompts are padded to: how many at most, and of what
_NODES = 16  # label tokens that are run at once; bounds the logits, (B, nodes, V)
_SHOWN = 10  # rows that an error lists

Done = Callable[[int], object]
"""Is told how many rows were measured since it was last called."""


@dataclasses.dataclass(frozen=True)
class AnswerReport:
    """How a model answered; both fractions are of `rows`."""

    rows: int
    exact: float
    """Answers that are the reference as the chat template writes it (some put an empty thought
    before it), to the letter, but for white space around them."""
    label: float | None
    """Rows whose reference is the likeliest of the labels; None where there were none."""
    outputs: list[str]
    """The answers, in the order of the records, cut one token above the longest reference."""


def answers(
    model: CausalLM,
    tokenizer: chat.ChatTokenizer,
    records: Sequence[Record],
    *,
    labels: Sequence[str] | None,
    stop_ids: Sequence[int],
    batch_size: int = 32,
    done: Done = lambda rows: None,
) -> AnswerReport:
    """Answer the last turn of each record, greedily and, with `labels`, by their likelihood too.

    The greedy answer has as many tokens as the longest reference or label, and one for the stop
    token. One that does not stop in that space is longer than any reference, so it is not exact.

    A label's score is the sum of the log-probabilities of its tokens. Where the tokens of one label
    begin those of another, the token that ends the turn is counted too, for all labels: otherwise
    the shorter one could never lose to the longer.

    Args:
        model: is run without dropout; its own mode stays as it is.
        tokenizer: with a chat template, see `chat.load_tokenizer`.
        records: conversations whose last assistant turn is the reference.
        labels: all the answers there can be, or None for free text.
        stop_ids: as for `generate`, and what the template ends a turn with is among them.
        batch_size: rows that are run together.
        done: is called with the number of rows of each batch that is answered.

    Raises:
        JloraError: no records; labels that repeat, or that lack some record's reference; or a
            template that ends a turn with none of `stop_ids`.
    """
    if not records or batch_size < 1:
        raise JloraError(
            f"{len(records)} records in batches of {batch_size}: both must be at least 1"
        )
    references = [chat.answer_text(record).strip() for record in records]
    prompts = [chat.prompt_tokens(record, tokenizer) for record in records]
    tree = None
    right = []
    for record, reference, prompt in zip(records, references, prompts, strict=True):
        turn = record.messages[chat.last_answer(record)] | {"content": reference}
        right.append(_spell(_answered(record, **turn), prompt, tokenizer, stop_ids))
    longest = max(map(len, right))
    if labels is not None:
        labels = [label.strip() for label in labels]
        _check_labels(labels, references, records)
        spelled = [
            _spell(_answered(records[0], content=label), prompts[0], tokenizer, stop_ids)
            for label in labels
        ]
        longest = max(longest, *map(len, spelled))
        tree = _tree(spelled, labels)

    outputs = [""] * len(records)
    exact = np.zeros(len(records), bool)
    chosen = np.zeros(len(records), np.int64)
    for rows, tokens, likeliest in _run(model, prompts, tree, longest, stop_ids, batch_size):
        for row, line in zip(rows, tokens, strict=True):
            new = line[line >= 0]
            outputs[row] = _said(new, tokenizer)
            exact[row] = len(new) < longest and outputs[row] == _said(right[row][:-1], tokenizer)
        chosen[rows] = likeliest
        done(len(rows))
    label = None
    if labels is not None:
        label = float(np.mean([labels[c] == r for c, r in zip(chosen, references, strict=True)]))
    return AnswerReport(len(records), float(exact.mean()), label, outputs)


class _Tree(NamedTuple):
    """Labels as paths of tokens, in G groups that share beginnings, run one after another.

    A node is a label's token that another follows; the last ones need not be run.
    """

    first: np.ndarray  # int32 (K,): each label's first token, which the prompt predicts
    tokens: np.ndarray  # int32 (G, N): each node's token
    depths: np.ndarray  # int32 (G, N): tokens of the label before it
    above: np.ndarray  # bool (G, N, N): [i, j] is True where j is i, or before i in its label
    edges: np.ndarray  # int32 (G, E, 3): a node, a token that follows it, in which label (K: none)


def _run(
    model: CausalLM,
    prompts: Sequence[np.ndarray],
    tree: _Tree | None,
    new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | int]]:
    """(rows, their greedy tokens with -1 from the stop on, the index of the likeliest label)."""
    shared = _common(prompts)
    rest = [prompt[len(shared) :] for prompt in prompts]
    lengths = np.array([len(prompt) for prompt in rest])
    widths = choose_lengths(lengths, _SHAPES, _MULTIPLE)
    # One size of cache for all widths, so that what follows the prompt is compiled once.
    following = max(new_tokens, 0 if tree is None else tree.tokens.shape[1])
    slots = len(shared) + max(widths) + following
    frozen = injection.partition(model)
    stops = stop_array(stop_ids)
    greedy = Sampling(jax.random.key(0), jnp.float32(0), jnp.float32(1))
    before = None
    if len(shared):
        all_real = np.ones((1, len(shared)), bool)
        before = prefill(*frozen, shared[None], all_real, slots=slots).cache
    for rows in batches(lengths.tolist(), batch_size):
        width = min(width for width in widths if width >= lengths[rows].max())
        tokens, mask = pad(rest, rows, width, batch_size)
        prompt = prefill(*frozen, tokens, mask, before, slots=slots)
        likeliest = 0
        if tree is not None:
            likeliest = np.asarray(_score(*frozen, prompt, tree))[: len(rows)].argmax(axis=1)
        filled = fill(rows, batch_size)
        new = decode(*frozen, prompt, filled, stops, greedy, max_new_tokens=new_tokens)
        yield rows, np.asarray(new)[: len(rows)], likeliest


def _common(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """What all prompts begin with, such as a system message, leaving each a token of its own.

    Empty where it would save less than it takes to compile another shape.
    """
    shortest = min(map(len, prompts))
    same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    length = min(int(np.argmin([*same, False])), shortest - 1)
    return prompts[0][: length if length >= _MULTIPLE else 0]


@jax.jit
def _score(adapters: Any, base: Any, prompt: Prefilled, tree: _Tree) -> Array:
    """Log-probability of each label after each prompt, float32 (B, K)."""
    scores = jax.nn.log_softmax(prompt.logits, axis=-1)[:, tree.first]
    if not len(tree.tokens):
        return scores
    batch, slots = prompt.valid.shape
    start = prompt.cache.length
    in_prompt = prompt.valid & (jnp.arange(slots) < start)

    def run_group(carry: tuple, group: tuple) -> tuple[tuple, None]:
        cache, scores = carry
        tokens, depths, above, edges = group
        nodes = len(tokens)
        mask = jnp.broadcast_to(in_prompt[:, None], (batch, nodes, slots))
        mask = jax.lax.dynamic_update_slice_in_dim(
            mask, jnp.broadcast_to(above, (batch, nodes, nodes)), start, axis=2
        )
        model = evaluated(adapters, base)  # new modules, as in `decode`
        hidden, cache = model.model(
            jnp.broadcast_to(tokens, (batch, nodes)), prompt.lengths[:, None] + depths, mask, cache
        )
        node, token, label = edges.T
        gained = jax.nn.log_softmax(model.logits(hidden), axis=-1)[:, node, token]
        scores = scores.at[:, label].add(gained, mode="drop")
        # The next group takes the same slots. The cache is carried so that it is written in place.
        return (cache._replace(length=start), scores), None

    return jax.lax.scan(run_group, (prompt.cache, scores), tree[1:])[0][1]


def _tree(spelled: Sequence[tuple[int, ...]], labels: Sequence[str]) -> _Tree:
    """Build the tree of labels, each given by its tokens and the one that ends the turn."""
    bare = [tokens[:-1] for tokens in spelled]
    alike = {tokens: label for tokens, label in zip(bare, labels, strict=True)}
    if len(alike) < len(labels):
        pair = next((a, b) for a, t in zip(labels, bare, strict=True) if (b := alike[t]) != a)
        raise JloraError(f"labels {pair[0]!r} and {pair[1]!r} are the same tokens; rename one")
    ambiguous = any(tokens[:n] in alike for tokens in bare for n in range(1, len(tokens)))
    paths = list(spelled) if ambiguous else bare

    limit = max(_NODES, max(map(len, paths)) - 1)
    groups: list[tuple[dict, list]] = []  # of each: prefix -> node, and edges
    for label in sorted(range(len(paths)), key=lambda label: paths[label]):
        path = paths[label]
        prefixes = [path[:n] for n in range(1, len(path))]
        if not prefixes:
            continue
        if not groups or len(groups[-1][0].keys() | set(prefixes)) > limit:
            groups.append(({}, []))
        nodes, edges = groups[-1]
        for prefix in prefixes:
            node = nodes.setdefault(prefix, len(nodes))
            edges.append((node, path[len(prefix)], label))

    count = max((len(nodes) for nodes, _ in groups), default=0)
    width = max((len(edges) for _, edges in groups), default=0)
    tree = _Tree(
        first=np.array([path[0] for path in paths], np.int32),
        tokens=np.zeros((len(groups), count), np.int32),
        depths=np.zeros((len(groups), count), np.int32),
        above=np.tile(np.eye(count, dtype=bool), (len(groups), 1, 1)),
        edges=np.tile(np.array([0, 0, len(paths)], np.int32), (len(groups), width, 1)),
    )
    for g, (nodes, edges) in enumerate(groups):
        tree.edges[g, : len(edges)] = edges
        for prefix, node in nodes.items():
            tree.tokens[g, node], tree.depths[g, node] = prefix[-1], len(prefix) - 1
            for n in range(1, len(prefix)):
                tree.above[g, node, nodes[prefix[:n]]] = True
    return tree


def _answered(record: Record, **turn: Any) -> Record:
    """Return the conversation up to its last answer, of which the keys of `turn` are others."""
    last = chat.last_answer(record)
    messages = [*record.messages[:last], {"role": "assistant", **turn}]
    return dataclasses.replace(record, messages=messages, context=record.context - {last})


def _spell(
    record: Record,
    prompt: np.ndarray,
    tokenizer: chat.ChatTokenizer,
    stop_ids: Sequence[int],
) -> tuple[int, ...]:
    """Return the tokens of the last answer, up to and with the one that ends the turn.

    They are those that training has: some tokenizers spell a text differently at its start, and
    templates may put something before an answer.
    """
    tokens = chat.encode(record, tokenizer, max_length=sys.maxsize)[-1].tokens
    after = tokens[len(prompt) :].tolist()
    end = next((i for i, token in enumerate(after) if token in stop_ids), None)
    if end is None:
        raise JloraError(
            f"{record.where}: the chat template ends the answer {chat.answer_text(record)!r} with "
            f"{tokenizer.convert_ids_to_tokens(after[-3:])}, and none of stop_ids = "
            f"{list(stop_ids)} is there. Add the token that ends a turn to them, or to "
            "eos_token_id in generation_config.json."
        )
    return tuple(after[: end + 1])


def _said(tokens: Sequence[int] | np.ndarray, tokenizer: chat.ChatTokenizer) -> str:
    """Return the text of an answer, without special tokens and the white space around it."""
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True).strip()


def _check_labels(
    labels: Sequence[str], references: Sequence[str], records: Sequence[Record]
) -> None:
    if not labels:
        raise JloraError("there are no labels. Give at least one, or None for free text.")
    if len(set(labels)) < len(labels):
        repeated = next(label for label in labels if labels.count(label) > 1)
        raise JloraError(f"label {repeated!r} is there twice; give each label once")
    unknown = [
        f"  {record.where}: {reference!r}"
        for record, reference in zip(records, references, strict=True)
        if reference not in labels
    ]
    if unknown:
        more = len(unknown) - _SHOWN
        raise JloraError(
            f"{len(unknown)} of {len(records)} answers are not among the {len(labels)} labels:\n"
            + "\n".join(unknown[:_SHOWN])
            + (f"\n  ... and {more} more" if more > 0 else "")
            + f"\nMend the rows, or add to the labels: {', '.join(map(repr, labels))}"
        )
