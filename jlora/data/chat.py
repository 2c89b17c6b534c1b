"""Turns conversations into tokens, and says which of them are trained.

The tokens of a row are those that generation would see and write: those of the prompt, and then
those of the answer. What is trained is decided on the text, by character offsets, so it does not
depend on how a tokeniser splits.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jlora.data.records import Message, Record
from jlora.data.template import ChatTokenizer
from jlora.data.template import load_tokenizer as load_tokenizer
from jlora.data.turns import Turn, rows
from jlora.errors import JloraError

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

    records: int
    rows: int  # of these records, before any was dropped
    several: int  # records that are more than one row
    nothing: int  # records whose answers are all context
    truncated: int  # rows longer than max_length, and cut
    dropped: int  # of the truncated, those with no trained token left
    tokens: int
    trained: int
    longest: int  # in tokens, before cutting
    harmless: dict[str, int] = field(default_factory=dict)  # key -> how often
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [
            f"{self.rows - self.dropped} rows, {self.tokens:,} tokens, {self.trained:,} of them "
            f"trained, longest row {self.longest}"
        ]
        if self.several:
            parts.append(
                f"{self.several} of {self.records} records are a row for each answer, as the chat "
                "template writes earlier turns otherwise once later ones follow"
            )
        if self.nothing:
            parts.append(f"{self.nothing} records have no answer to be trained")
        if self.truncated:
            parts.append(
                f"{self.truncated} rows cut, {self.dropped} of them dropped as no answer was left"
            )
        for counts, what in (
            (self.harmless, "keys that change nothing"),
            (self.left_out, "keys left out as you said"),
        ):
            if counts:
                listed = ", ".join(f"{key} ({count})" for key, count in counts.items())
                parts.append(f"{what}: {listed}")
        return "; ".join(parts)


def encode(record: Record, tokenizer: ChatTokenizer, max_length: int) -> list[Example]:
    """Tokenise one conversation, keep the first `max_length` tokens of a row, mark the trained.

    A row begins with exactly the tokens that generation is given, and each answer in it with those
    that it was given for that one. Where one row cannot be that for all answers, there is one for
    each, which trains that answer alone: see `jlora.data.turns`. What follows the last trained
    answer is no part of any row.

    Trained is, of each answer, all that the model has to write itself: what follows the generation
    prompt, up to and including the token that ends the turn, but not the line break that many
    templates put after it. Where the template ends no turn, the tokenizer's end-of-sequence token
    is added, trained, as the model would not learn to stop otherwise.

    A row may have no trained token, if its answers lie past `max_length`. A record of which no
    answer is to be trained has no row.

    Raises:
        JloraError: the template refuses the conversation, leaves out a part of it, or writes an
            answer that is not the record's; or `max_length` is below 2.
    """
    return [example for example, _ in next(_encode_batch([record], tokenizer, max_length))]


def encode_all(
    records: Sequence[Record], tokenizer: ChatTokenizer, max_length: int
) -> tuple[list[Example], EncodeReport]:
    """`encode` every record, in order, and leave out rows with no trained token.

    Raises:
        JloraError: as `encode`; or no row is left.
    """
    examples: list[Example] = []
    lengths: list[int] = []
    several = nothing = 0
    for start in range(0, len(records), _TEXTS_AT_A_TIME):
        for encoded in _encode_batch(
            records[start : start + _TEXTS_AT_A_TIME], tokenizer, max_length
        ):
            several += len(encoded) > 1
            nothing += not encoded
            lengths += [length for _, length in encoded]
            examples += [example for example, _ in encoded if example.trained.any()]
    if not examples:
        raise JloraError(_nothing_left(records, tokenizer, max_length))
    return examples, EncodeReport(
        records=len(records),
        rows=len(lengths),
        several=several,
        nothing=nothing,
        truncated=sum(length > max_length for length in lengths),
        dropped=len(lengths) - len(examples),
        tokens=sum(len(example.tokens) for example in examples),
        trained=sum(int(example.trained.sum()) for example in examples),
        longest=max(lengths),
        harmless=Counter(key for record in records for key in record.harmless),
        left_out=Counter(key for record in records for key in record.left_out),
    )


def prompt_tokens(record: Record, tokenizer: ChatTokenizer) -> np.ndarray:
    """Return int32 (T,): all before the last answer, with the generation prompt."""
    text = tokenizer.render(record, last_answer(record), prompt=True)
    return tokenizer.spell([text])[0][0]


def answer_text(record: Record) -> str:
    """Return the content of the last answer."""
    return record.messages[last_answer(record)]["content"]


def last_answer(record: Record) -> int:
    """Return the index of the last answer that is to be trained, or where none is, of the last."""
    roles = [message["role"] for message in record.messages]
    return (record.trained or [len(roles) - 1 - roles[::-1].index("assistant")])[-1]


def encode_prompt(prompt: str | Sequence[Message], tokenizer: ChatTokenizer) -> np.ndarray:
    """Return int32 (T,): a user's prompt, or a conversation so far, with the generation prompt.

    Raises:
        JloraError: the chat template refuses the conversation.
    """
    messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.render(Record(messages, "the prompt"), len(messages), prompt=True)
    return tokenizer.spell([text])[0][0]


def show_mask(example: Example, tokenizer: ChatTokenizer) -> str:
    """Return the text of `example`, with the trained stretches in [[...]], for people to check."""
    edges = np.flatnonzero(np.diff(example.trained)) + 1
    pieces = []
    for tokens, trained in zip(
        np.split(example.tokens, edges), np.split(example.trained, edges), strict=True
    ):
        text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
        pieces.append(f"[[{text}]]" if trained.any() else text)
    return "".join(pieces)


def _encode_batch(
    records: Sequence[Record], tokenizer: ChatTokenizer, max_length: int
) -> Iterator[list[tuple[Example, int]]]:
    """Yield, of each record, its rows, each with its length in tokens before cutting."""
    if max_length < 2:
        raise JloraError(
            f"max_length is {max_length}; it must be at least 2, to predict one token from another."
        )
    found = [rows(record, tokenizer) for record in records]
    texts = [turns[-1].text for each in found for turns in each]
    prompts = [turn.prompt for each in found for turns in each for turn in turns]
    spelled = iter(tokenizer.spell(texts)) if texts else iter(())
    asked = iter(tokenizer.spell(prompts)) if prompts else iter(())
    for record, each in zip(records, found, strict=True):
        encoded: list[tuple[Turn, np.ndarray, np.ndarray]] = []
        for turns in each:
            tokens, offsets = next(spelled)
            given = [next(asked)[0] for _ in turns]
            if all(np.array_equal(tokens[: len(prompt)], prompt) for prompt in given):
                spans = [(turn.start, turn.end) for turn in turns]
                encoded.append((turns[-1], tokens, _trained(offsets, spans)))
            else:
                encoded += [
                    (turn, *_apart(turn, prompt, tokenizer, record.where))
                    for turn, prompt in zip(turns, given, strict=True)
                ]
        result = []
        for turn, tokens, trained in encoded:
            trained[:1] = False  # there is nothing to predict the first token from
            where = record.where + (f", turn {turn.index}" if len(encoded) > 1 else "")
            cut = slice(0, max_length)
            result.append((Example(tokens[cut].copy(), trained[cut].copy(), where), len(tokens)))
        yield result


def _apart(
    turn: Turn, prompt: np.ndarray, tokenizer: ChatTokenizer, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of one answer's row, and which are trained: int32 and bool (T,).

    Where a token of the whole text would span the end of the prompt, the answer is spelled for
    itself: generation begins behind the tokens of the prompt.

    Raises:
        JloraError: the tokenizer spells the answer otherwise for itself, as one that puts a space
            before each text.
    """
    tokens, offsets = tokenizer.spell([turn.text])[0]
    if np.array_equal(tokens[: len(prompt)], prompt):
        return tokens, _trained(offsets, [(turn.start, turn.end)])
    answer, offsets = tokenizer.spell([turn.text[turn.start :]])[0]
    joined = np.concatenate([prompt, answer])
    if (said := tokenizer.decode(joined.tolist())) != (meant := tokenizer.decode(tokens.tolist())):
        at = len(prompt)
        raise JloraError(
            f"{where}: the tokens of the prompt do not begin those of turn {turn.index}, and the "
            f"answer cannot be spelled apart:\n  {tokenizer.decode(joined[at - 5 :].tolist())!r}\n"
            f"where the whole is\n  {meant[-len(said) + len(turn.prompt) :]!r}\nLet the chat "
            "template end the generation prompt with a special token (--chat-template FILE)."
        )
    trained = _trained(offsets, [(0, turn.end - turn.start)])
    return joined, np.concatenate([np.zeros(len(prompt), bool), trained])


def _trained(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return bool (T,): which tokens hold at least one character of a span."""
    # Byte-level tokenizers may leave white space out at a token's start, so that a token of white
    # space alone begins where it ends. It counts all the same, as no span ends in white space.
    trained = np.zeros(len(offsets), bool)
    for start, end in spans:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return trained


def _nothing_left(records: Sequence[Record], tokenizer: ChatTokenizer, max_length: int) -> str:
    if not records:
        return "there is no record to encode. Give a data set with at least one."
    to_train = [record for record in records if record.trained]
    if not to_train:
        return (
            f"none of the {len(records)} records has an answer to be trained: each turn says that "
            "it is context (weight 0, train false)"
        )
    needed = sorted(
        (len(prompt_tokens(record, tokenizer)), record.where) for record in to_train[:1000]
    )
    (shortest, _), (longest, where) = needed[0], needed[-1]
    return (
        f"none of the {len(to_train)} rows has a trained token within max_length = {max_length}: "
        f"before the last answer stand {shortest} to {longest} tokens (the most in {where}). "
        f"Raise max_length above {longest}, and by the length of the answers."
    )
