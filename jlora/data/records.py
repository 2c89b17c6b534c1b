"""What a training record is, whatever shape it came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A turn as transformers' chat templates take it: `role` ("system", "user", "assistant" or "tool")
# and `content`, both text; and where it has them `reasoning_content`, `tool_calls` (arguments as
# objects), `tool_call_id` and `name`.
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation, checked: it has an assistant turn, and something before the first trained.

    Attributes:
        messages: the turns.
        where: which line of which file it is ("train.jsonl:17", lines counted from 1), or which row
            of a Parquet file or hub data set ("train.parquet row 16", rows counted from 0 as
            `datasets` does).
        context: indices of assistant turns that are not to be trained.
        tools: JSON schemas of functions, or None.
        options: further variables for the chat template (`chat_template_kwargs`).
        harmless: keys of the record that were passed over, as they change nothing.
        left_out: keys that were left out because they were to be.
    """

    messages: list[Message]
    where: str
    context: frozenset[int] = frozenset()
    tools: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def trained(self) -> list[int]:
        """Indices of the turns to be trained, in order."""
        return [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and i not in self.context
        ]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for a record that could not be parsed, so that all are reported together."""

    problem: str
    line: int = 0
    """Of a text file, from 1."""
