"""Renders conversations with a model's chat template and finds the tokens to be trained.

The whole conversation is rendered as text and tokenised once. Which tokens are trained is decided
on the text, by character offsets, so it does not depend on how a tokeniser splits.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlora.data.records import Message, Record
from jlora.errors import JloraError

# transformers' fast tokenizer; its class cannot be named here without importing transformers.
Tokenizer = Any

_TEXTS_AT_A_TIME = 1024  # bounds the memory that the offsets of a large data set take


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised conversation of T tokens.

    `tokens` is int32 (T,). `trained` is bool (T,): True where the token is a target of the loss,
    that is, where the model learns to predict it from the tokens before it. `where` is the
    record's place in its file (see `Record`), for error messages.
    """

    tokens: np.ndarray
    trained: np.ndarray
    where: str = ""


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What became of the records; `tokens` and `trained` count those of the kept rows, once cut."""

    rows: int
    truncated: int  # longer than max_length, and cut
    dropped: int  # of the truncated, those with no trained token left
    tokens: int
    trained: int
    longest: int  # in tokens, before cutting

    def __str__(self) -> str:
        """Say it in one line."""
        line = (
            f"{self.rows - self.dropped} rows, {self.tokens:,} tokens, {self.trained:,} of them "
            f"trained, longest row {self.longest}"
        )
        if self.truncated:
            line += (
                f"; {self.truncated} rows cut, {self.dropped} of them dropped as no answer was left"
            )
        return line


def load_tokenizer(model_dir: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer and chat template of a model directory, without network or torch.

    Args:
        model_dir: holds tokenizer.json and tokenizer_config.json.
        vocab_size: rows of the model's embedding, where it is known.

    Raises:
        JloraError: the tokenizer's files or its chat template are missing, or cannot be read; or it
            has more tokens than `vocab_size`.
    """
    model_dir = Path(model_dir)
    if not (model_dir / "tokenizer.json").is_file():
        raise JloraError(
            f"{model_dir} has no tokenizer.json. Copy tokenizer.json, tokenizer_config.json and, "
            "where the model has one, chat_template.jinja from the model's page."
        )
    try:
        tokenizer = _auto_tokenizer().from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise JloraError(
            f"{model_dir}: the tokenizer cannot be read: {error}. Fetch its files again."
        ) from error
    if not tokenizer.is_fast:
        raise JloraError(
            f"{model_dir}: {type(tokenizer).__name__} gives no character offsets, which the loss "
            "mask needs. Use a model whose tokenizer.json is a fast tokenizer."
        )
    if not tokenizer.chat_template:
        raise JloraError(
            f"{model_dir} has no chat template, in chat_template.jinja or as 'chat_template' in "
            "tokenizer_config.json. Base models often lack one: copy that of the model's "
            "instruction-tuned sibling."
        )
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise JloraError(
            f"{model_dir}: tokenizer.json has {len(tokenizer)} tokens, but config.json says "
            f"vocab_size {vocab_size}; use the tokenizer that belongs to the model"
        )
    return tokenizer


def encode(record: Record, tokenizer: Tokenizer, max_length: int) -> Example:
    """Tokenise one conversation, keep its first `max_length` tokens, and mark the trained ones.

    Trained are, for each assistant turn, all that the model has to write itself: what follows the
    generation prompt, up to and including the end-of-turn token, but not the line break that many
    templates put after it. A token that straddles the edge of this text is trained, so that no
    character of an answer goes untrained. Where the template writes no end-of-turn token, the
    tokenizer's end-of-sequence token is added, trained, behind an assistant turn that ends the
    conversation, as the model would not learn to stop otherwise.

    The result may have no trained token, if the answers lie past `max_length`.

    Raises:
        JloraError: the template refuses the conversation, or renders a turn differently once
            later turns follow it; or `max_length` is below 2.
    """
    return next(_encode_batch([record], tokenizer, max_length))[0]


def encode_all(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], EncodeReport]:
    """`encode` every record, in order, and leave out those with no trained token.

    Raises:
        JloraError: as `encode`; or no row is left.
    """
    examples = []
    lengths = []
    for start in range(0, len(records), _TEXTS_AT_A_TIME):
        chunk = records[start : start + _TEXTS_AT_A_TIME]
        for example, length in _encode_batch(chunk, tokenizer, max_length):
            lengths.append(length)
            if example.trained.any():
                examples.append(example)
    if not examples:
        raise JloraError(_nothing_left(records, tokenizer, max_length))
    return examples, EncodeReport(
        rows=len(records),
        truncated=sum(length > max_length for length in lengths),
        dropped=len(records) - len(examples),
        tokens=sum(len(example.tokens) for example in examples),
        trained=sum(int(example.trained.sum()) for example in examples),
        longest=max(lengths),
    )


def prompt_tokens(record: Record, tokenizer: Tokenizer) -> np.ndarray:
    """Return int32 (T,): all before the last assistant turn, with the generation prompt."""
    messages = record.messages[: last_answer(record)]
    return _tokenise([_render(messages, tokenizer, record.where, prompt=True)], tokenizer)[0][0]


def answer_text(record: Record) -> str:
    """Return the content of the last assistant turn."""
    return record.messages[last_answer(record)]["content"]


def encode_prompt(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
    """Return int32 (T,): a user's prompt, or a conversation so far, with the generation prompt.

    Raises:
        JloraError: the chat template refuses the conversation.
    """
    messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    return _tokenise([_render(messages, tokenizer, "the prompt", prompt=True)], tokenizer)[0][0]


def show_mask(example: Example, tokenizer: Tokenizer) -> str:
    """Return the text of `example`, with the trained stretches in [[...]], for people to check."""
    edges = np.flatnonzero(np.diff(example.trained)) + 1
    pieces = []
    for tokens, trained in zip(
        np.split(example.tokens, edges), np.split(example.trained, edges), strict=True
    ):
        text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
        pieces.append(f"[[{text}]]" if trained.any() else text)
    return "".join(pieces)


def _auto_tokenizer() -> Any:
    """Import transformers' AutoTokenizer without the advice it prints where torch is missing."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return AutoTokenizer


def last_answer(record: Record) -> int:
    """Return the index of the last assistant turn."""
    roles = [message["role"] for message in record.messages]
    return len(roles) - 1 - roles[::-1].index("assistant")


def _render(messages: list[Message], tokenizer: Tokenizer, where: str, *, prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise JloraError(
            f"{where}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses "
            f"the turns {roles}: {error}. Change the record to what the template allows."
        ) from error


def _rendered(
    record: Record, tokenizer: Tokenizer, marker: re.Pattern[str]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation's text and the half-open [start, end) spans to be trained in it."""
    messages, where = record.messages, record.where
    last = len(messages) - 1
    text = _render(messages, tokenizer, where, prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, where, prompt=True)
        until = text if i == last else _render(messages[: i + 1], tokenizer, where, prompt=False)
        end, marked = _turn_end(until, len(before), message["content"].strip(), marker)
        if not until.startswith(before) or not text.startswith(until[:end]):
            raise JloraError(_rewritten(i, record, tokenizer))
        if i == last and not marked and tokenizer.eos_token:
            text = text[:end] + tokenizer.eos_token
            end = len(text)
        spans.append((len(before), end))
    return text, spans


def _markers(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern for the tokens that may end a turn: any that is not ordinary text."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens.update(tokenizer.all_special_tokens)
    # "(?!)" matches nowhere. Longest first, as one token may begin with another.
    any_token = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
    return re.compile(rf"\s*(?:{any_token})+")


def _turn_end(text: str, start: int, content: str, marker: re.Pattern[str]) -> tuple[int, bool]:
    """Return where the turn that starts at `start` ends, and whether a marker ends it.

    It ends behind the markers that directly follow the content. Where there are none, or the
    template altered the content, it is taken to end with the text, white space aside.
    """
    at = text.find(content, start)
    while content and at >= 0:
        if found := marker.match(text, at + len(content)):
            return found.end(), True
        at = text.find(content, at + 1)
    end = max(start, len(text.rstrip()))
    return end, any(found.end() == end for found in marker.finditer(text, start, end))


def _rewritten(turn: int, record: Record, tokenizer: Tokenizer) -> str:
    return (
        f"{record.where}: the chat template of {tokenizer.name_or_path or 'the tokenizer'} does "
        f"not render turn {turn} (from 0, the assistant's) of the whole conversation as it stood "
        "when the model wrote it: the turns before, the generation prompt, then the answer. "
        "Templates that strip the reasoning from earlier turns, or open it in the generation "
        "prompt, do this. Cut the conversation into one record for each assistant turn, or use a "
        "template that only appends."
    )


def _encode_batch(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[Example, int]]:
    """Yield each record's example and its length in tokens before cutting."""
    if max_length < 2:
        raise JloraError(
            f"max_length is {max_length}; it must be at least 2, to predict one token from another."
        )
    marker = _markers(tokenizer)
    rendered = [_rendered(record, tokenizer, marker) for record in records]
    encoded = _tokenise([text for text, _ in rendered], tokenizer)
    for record, (_, spans), (tokens, offsets) in zip(records, rendered, encoded, strict=True):
        trained = _trained(offsets, spans)
        cut = slice(0, max_length)
        yield Example(tokens[cut].copy(), trained[cut].copy(), record.where), len(tokens)


def _tokenise(texts: list[str], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each text, tokens int32 (T,) and character offsets int64 (T, 2)."""
    # The template has written the special tokens already. verbose=False: no warning about texts
    # longer than the model's context, which are cut afterwards.
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (np.array(tokens, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
        for tokens, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _trained(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return bool (T,): which tokens hold at least one character of a span."""
    # Byte-level tokenizers may leave white space out at a token's start, so that a token of white
    # space alone begins where it ends. It counts all the same, as no span ends in white space.
    trained = np.zeros(len(offsets), bool)
    for start, end in spans:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    trained[:1] = False  # there is nothing to predict the first token from
    return trained


def _nothing_left(records: Sequence[Record], tokenizer: Tokenizer, max_length: int) -> str:
    if not records:
        return "there is no record to encode. Give a data set with at least one."
    needed = sorted(
        (len(prompt_tokens(record, tokenizer)), record.where) for record in records[:1000]
    )
    (shortest, _), (longest, where) = needed[0], needed[-1]
    return (
        f"none of the {len(records)} rows has a trained token within max_length = {max_length}: "
        f"before the last answer stand {shortest} to {longest} tokens (the most in {where}). "
        f"Raise max_length above {longest}, and by the length of the answers."
    )
