"""A model's tokenizer and its chat template: what is rendered, and what ends an answer."""

import copy
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jlora.data.records import Message, Record
from jlora.data.shapes import REASONING
from jlora.errors import JloraError
from jlora.files import TEMPLATE_FILE

# Before a template that asks for the date: a macro of the name that it calls, for transformers lets
# nothing that can be called into a template, and its own function tells the time of each call. The
# line break is the block's, which Jinja drops; the template begins a line, as it does by itself.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}"
    "{%- for directive, value in jlora_now.items() -%}"
    "{%- set told.text = told.text | replace(directive, value) -%}"
    "{%- endfor -%}{{- told.text -}}{%- endmacro %}\n"
)
_DIRECTIVES = [
    f"%{flag}{letter}" for flag in ("", "-") for letter in "aAwdbBmyYHIMpSfzZjUWcxXGeuVDFRT"
]

_TRIAL = "an answer for trial"  # what a template is asked to render, to see what follows it


class _NoJinjaError(JloraError):
    """The chat template cannot be parsed, whatever it is to render."""


class ChatTokenizer:
    """A fast tokenizer of transformers, and how it writes a chat.

    What is not here is the tokenizer's own: `decode`, `eos_token_id` and the like.

    Attributes:
        base: the tokenizer.
        template: Jinja source that is used in place of the tokenizer's own template, or None.
        now: what a template is told that asks for the date or time (`strftime_now`). It stays as it
            is, so that the same record is the same text as long as a run lasts.
        name: says in messages whose template it is.
    """

    def __init__(
        self,
        base: Any,
        *,
        template: str | None = None,
        now: datetime | None = None,
        name: str | None = None,
    ) -> None:
        self.base = base
        self.template = template
        self.now = now or datetime.now()
        self.name = name or f"of {base.name_or_path or 'the tokenizer'}"

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not set yet, when this is copied
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def spell(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return, for each text, tokens int32 (T,) and character offsets int64 (T, 2)."""
        # The template has written the special tokens already. verbose=False: no warning about
        # texts longer than the model's context, which are cut afterwards.
        batch = self.base(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            (np.array(tokens, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
            for tokens, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def render(self, record: Record, turns: int, *, prompt: bool) -> str:
        """Return the first `turns` turns as the template writes them.

        Args:
            record: the conversation, with its tools.
            turns: how many of its messages are rendered.
            prompt: add the generation prompt, which the next answer follows.

        Raises:
            JloraError: the template refuses them, or fails.
        """
        messages = [self._spoken(message) for message in record.messages[:turns]]
        text, refused = None, None
        try:
            text = self._apply(messages, record, prompt)
        except JloraError as error:
            refused = error
        # Templates of most families take the arguments of a call as an object. Others join them to
        # text, as JSON: these fail, or write Python's own form.
        objects = [call["function"]["arguments"] for call in _calls(messages)]
        if objects and (text is None or any(o and repr(o) in text for o in objects)):
            for call in _calls(messages):
                call["function"]["arguments"] = json.dumps(
                    call["function"]["arguments"], ensure_ascii=False
                )
            with suppress(JloraError):  # what it said of objects, the usual form, is shown
                text = self._apply(messages, record, prompt)
        if text is None:
            assert refused is not None
            raise refused
        return text

    @cached_property
    def turn_end(self) -> str | None:
        """The token, or tokens in a row, that the template writes behind an answer; or None."""
        asked: list[Message] = [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": _TRIAL},
        ]
        for turns in (asked, [{"role": "system", "content": "a rule"}, *asked]):
            try:
                text = self.render(Record(turns, "a trial"), len(turns), prompt=False)
            except _NoJinjaError:
                raise
            except JloraError:
                continue
            if _TRIAL in text and (
                found := re.search(f"(?:{self._added})+", text.rpartition(_TRIAL)[2])
            ):
                return found.group()
        return None

    @property
    def turn_end_id(self) -> int | None:
        """The number of the first token of `turn_end`, at which generation stops."""
        if self.turn_end is None:
            return None
        first = re.match(self._added, self.turn_end)
        return first and self.base.convert_tokens_to_ids(first.group())

    @cached_property
    def _added(self) -> str:
        """A pattern for any one token that is not ordinary text."""
        tokens = {str(token) for token in self.base.added_tokens_decoder.values()}
        tokens.update(self.base.all_special_tokens)
        # "(?!)" matches nowhere. Longest first, as one token may begin with another.
        return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"

    @cached_property
    def source(self) -> str:
        """The template's Jinja source; of several named ones, all."""
        own = self.template or self.base.chat_template
        return "\n".join(own.values()) if isinstance(own, dict) else own or ""

    def _spoken(self, message: Message) -> Message:
        """Return a copy of a message, its reasoning under the key that the template reads."""
        message = copy.deepcopy(message) if "tool_calls" in message else dict(message)
        if "reasoning_content" in message:
            key = next((k for k in REASONING if re.search(rf"[.'\"]{k}\b", self.source)), None)
            message[key or "reasoning_content"] = message.pop("reasoning_content")
        return message

    def _apply(self, messages: list[Message], record: Record, prompt: bool) -> str:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        clock: dict[str, Any] = {}
        try:
            template = self.base.get_chat_template(self.template, record.tools)
            if "strftime_now" in template:
                template = _CLOCK + template
                clock = {"jlora_now": {d: self.now.strftime(d) for d in _DIRECTIVES}}
            return self.base.apply_chat_template(
                messages,
                chat_template=template,
                tools=record.tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **clock,
                **record.options,
            )
        except TemplateSyntaxError as error:
            raise _NoJinjaError(
                f"the chat template {self.name} is no Jinja: {error.message} in line "
                f"{error.lineno - bool(clock)}. Mend it, or give another with --chat-template FILE."
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            said = str(error) if isinstance(error, TemplateError | ValueError) else repr(error)
            roles = ", ".join(message["role"] for message in messages)
            verb = "refuses" if isinstance(error, TemplateError) else "fails on"
            raise JloraError(
                f"{record.where}: the chat template {self.name} {verb} the turns {roles}: {said}. "
                "Change the record to what the template allows, or give another template with "
                "--chat-template FILE."
            ) from error


def load_tokenizer(
    model_dir: str | Path,
    vocab_size: int | None = None,
    *,
    template: str | None = None,
    template_name: str = "that was given",
    now: datetime | None = None,
) -> ChatTokenizer:
    """Load the tokenizer and chat template of a model directory, without network or torch.

    Args:
        model_dir: holds tokenizer.json and tokenizer_config.json.
        vocab_size: rows of the model's embedding, where it is known.
        template: Jinja source that is used in place of the model's own chat template.
        template_name: names it in messages: "of NAME", or its file.
        now: see `ChatTokenizer`.

    Raises:
        JloraError: the tokenizer's files or its chat template are missing, or cannot be read; or it
            has more tokens than `vocab_size`.
    """
    model_dir = Path(model_dir)
    if not (model_dir / "tokenizer.json").is_file():
        raise JloraError(
            f"{model_dir} has no tokenizer.json. Copy tokenizer.json, tokenizer_config.json and, "
            f"where the model has one, {TEMPLATE_FILE} from the model's page."
        )
    try:
        base = _auto_tokenizer().from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise JloraError(
            f"{model_dir}: the tokenizer cannot be read: {error}. Fetch its files again."
        ) from error
    if not base.is_fast:
        raise JloraError(
            f"{model_dir}: {type(base).__name__} gives no character offsets, which the loss "
            "mask needs. Use a model whose tokenizer.json is a fast tokenizer."
        )
    if not base.chat_template and template is None:
        raise JloraError(
            f"{model_dir} has no chat template, in {TEMPLATE_FILE} or as 'chat_template' in "
            "tokenizer_config.json. Base models often lack one: copy that of the model's "
            "instruction-tuned sibling, or give one with --chat-template FILE."
        )
    if vocab_size is not None and len(base) > vocab_size:
        raise JloraError(
            f"{model_dir}: tokenizer.json has {len(base)} tokens, but config.json says "
            f"vocab_size {vocab_size}; use the tokenizer that belongs to the model"
        )
    name = None if template is None else template_name
    tokenizer = ChatTokenizer(base, template=template, now=now, name=name)
    tokenizer.turn_end  # noqa: B018  # says now if the template is no Jinja
    return tokenizer


def _calls(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the tool calls of all messages."""
    return [call for message in messages for call in message.get("tool_calls", ())]


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
