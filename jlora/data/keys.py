"""Accounts for every key of a file's records: used, known to change nothing, left out, or unknown.

A key that is passed over in silence may be the one that says what is to be trained, so nothing is:
what is not known here is an error by name, once for a file, with the way to leave it out.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jlora.errors import nearest
from jlora.paths import SHOWN

HARMLESS = frozenset({
    # which record it is
    "id", "_id", "ids", "uid", "uuid", "guid", "idx", "index", "row", "row_id", "record_id",
    "example_id", "sample_id", "task_id", "prompt_id", "question_id", "conversation_id",
    "conv_id", "chat_id", "dialog_id", "dialogue_id", "thread_id", "message_id", "msg_id",
    "parent_id", "session_id", "user_id", "hash", "conversation_hash", "md5", "sha256",
    "__index_level_0__",
    # where it is from
    "source", "sources", "dataset", "dataset_name", "data_source", "origin", "url", "urls",
    "link", "links", "license", "licence", "author", "authors", "created_by", "annotator",
    "generator", "model", "model_name", "subset", "split", "version",
    # how good it was found
    "score", "scores", "rating", "ratings", "quality", "quality_score", "reward", "rewards",
    "difficulty", "perplexity", "toxicity", "toxic", "redacted", "likes", "upvotes", "views",
    # what it is about
    "title", "category", "categories", "subcategory", "topic", "topics", "tag", "tags",
    "keywords", "domain", "subject", "genre", "language", "lang", "locale", "country",
    # how long and how old it is
    "length", "num_tokens", "n_tokens", "token_count", "num_turns", "turn_count", "timestamp",
    "time", "date", "datetime", "created", "created_at", "updated_at", "create_time",
    "update_time",
    # what people note beside it, and OpenAI's setting for its own service
    "metadata", "meta", "comment", "comments", "note", "notes", "parallel_tool_calls",
})  # fmt: skip
"""Keys that say nothing of what is to be trained, of a record, a turn or a file."""


class Taken(dict[str, Any]):
    """The entries of a row that its shape knows, and the names of those beside them.

    Attributes:
        harmless: keys that change nothing.
        left_out: keys that were to be left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.harmless: list[str] = []
        self.left_out: list[str] = []


class Keys:
    """Looks at the keys of one file's records, and remembers those that nobody knows."""

    def __init__(self, ignore: Iterable[str] = ()) -> None:
        self.ignore = frozenset(ignore)
        # (key, level) -> the first place that has it, the number of places, the nearest known key
        self._unknown: dict[tuple[str, str], tuple[str, int, str]] = {}

    def take(
        self, row: Mapping[Any, Any], known: Collection[str], where: str, level: str = ""
    ) -> Taken:
        """Return the entries of `row` under `known` keys.

        A key that holds null counts as absent, and an unknown one that holds nothing ("", [] or
        {}) too.

        Args:
            row: a record, a turn, a part of its content, or what is around the records of a file.
            known: the keys that its shape may have.
            where: the record's place.
            level: what `row` is, in the words of a message; empty for a record.
        """
        taken = Taken()
        for key, value in row.items():
            name = f"{key} {level}".strip()
            if key in self.ignore:
                taken.left_out.append(name)
            elif value is None:
                continue
            elif key in known:
                taken[key] = value
            elif key in HARMLESS:
                taken.harmless.append(name)
            elif not (isinstance(value, str | list | dict) and not value):
                first, count, near = self._unknown.get(
                    (str(key), level), (where, 0, nearest(str(key), known, n=1))
                )
                self._unknown[str(key), level] = first, count + 1, near
        return taken

    def unknown(self) -> list[str]:
        """Return a line for each unknown key, the first ten, and how to leave all of them out."""
        if not self._unknown:
            return []
        lines = [
            f"  {f'{key!r} {level}'.strip()}: {count} times, first in {where}{near}"
            for (key, level), (where, count, near) in list(self._unknown.items())[:SHOWN]
        ]
        if (more := len(self._unknown) - SHOWN) > 0:
            lines.append(f"  … and {more} more")
        names = " ".join(dict.fromkeys(key for key, _ in self._unknown))
        return [
            "keys that jlora does not know, and which may change what is to be trained:",
            *lines,
            f"Name them as the shapes do, or train without them: --loader.ignore {names} (of "
            "jlora eval: --ignore)",
        ]
