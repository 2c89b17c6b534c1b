"""Chat templates that behave as those of the model families."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A chat template, and what is known of it.

    Attributes:
        template: Jinja source.
        tokens: special tokens; the last ends an answer.
        bos: begins a text.
        eos: ends one.
        refuses: traits of conversations (see `chat_rows.traits`) that the template cannot render.
        taken: how many of `chat_rows.CONVERSATIONS` it renders.
        opens: the generation prompt opens the thought, which the template leaves out of answers.
        behind: where earlier turns are rendered otherwise in a prompt than in the whole, what ends
            the turn before an answer.
        text_arguments: the arguments of a call are joined to text.
    """

    template: str
    tokens: tuple[str, ...]
    refuses: frozenset[str]
    taken: int
    bos: str | None = None
    eos: str | None = None
    opens: bool = False
    behind: tuple[str, ...] = ()
    text_arguments: bool = False


# The date in the system's turn, which is always there; tools in the user's first; one call a turn.
LLAMA = r"""
{{- bos_token -}}
{%- macro turn(role, text) -%}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ text ~ '<|eot_id|>' -}}
{%- endmacro -%}
{%- set has_rule = messages[0].role == 'system' -%}
{%- set day = DAY -%}
{{- turn('system', ('Environment: ipython\n' if tools else '') ~ 'Day: ' ~ day ~ '\n\n'
    ~ (messages[0].content | trim if has_rule else '')) -}}
{%- for m in (messages[1:] if has_rule else messages) -%}
{%- if loop.first and tools -%}
{{- turn('user', 'Call one of these where it helps:\n' ~ tools | tojson(indent=4) ~ '\n\n'
    ~ m.content | trim) -}}
{%- elif m.tool_calls -%}
{%- if m.tool_calls | length > 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- turn('assistant', '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson
    ~ '}') -}}
{%- elif m.role == 'tool' -%}
{{- turn('ipython', m.content | tojson) -}}
{%- else -%}
{{- turn(m.role, m.content | trim) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

# Results of tools are the user's; each answer of Qwen 3's last question begins with its reasoning.
QWEN = r"""
{%- set has_rule = messages[0].role == 'system' -%}
{%- if tools or has_rule or DEFAULT -%}
{{- '<|im_start|>system\n' ~ (messages[0].content if has_rule else DEFAULT) -}}
{%- if tools -%}
{{- '\n\nTools:\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' ~ tool | tojson -}}{%- endfor -%}
{{- '\n</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in (messages[1:] if has_rule else messages) -%}
{%- set i = loop.index0 + (1 if has_rule else 0) -%}
{%- if m.role == 'user' -%}
{{- '<|im_start|>user\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
{%- if messages[i - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' -}}
{%- if i + 1 == messages | length or messages[i + 1].role != 'tool' -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- else -%}
{{- '<|im_start|>assistant\n' -}}
{%- set said = namespace(thought='', text=m.content) -%}
{%- if THINKS -%}
{%- if m.reasoning_content is string -%}
{%- set said.thought = m.reasoning_content -%}
{%- elif '</think>' in m.content -%}
{%- set said.thought = m.content.split('</think>')[0].split('<think>')[-1] -%}
{%- set said.text = m.content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if i > last.question and (loop.last or said.thought) -%}
{{- '<think>\n' ~ said.thought.strip('\n') ~ '\n</think>\n\n' -}}
{%- set said.text = said.text.lstrip('\n') -%}
{%- endif -%}
{%- endif -%}
{{- said.text -}}
{%- for call in m.tool_calls or [] -%}
{{- '\n' if said.text or not loop.first else '' -}}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
{{- call.function.arguments | tojson ~ '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# The system's message stands in the user's turn that is last of all, the tools before the last of
# the user's turns; arguments and results are in lists and objects of JSON.
MISTRAL = r"""
{%- set has_rule = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if has_rule else messages -%}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- set spoken = turns | rejectattr('role', 'equalto', 'tool')
    | rejectattr('tool_calls', 'defined') | list -%}
{%- for m in spoken -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant must take turns') -}}
{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in turns -%}
{%- if m.role == 'user' -%}
{%- if tools and m == asked[-1] -%}
{{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST] ' ~ (messages[0].content ~ '\n\n' if has_rule and loop.last else '') -}}
{{- m.content ~ '[/INST]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{- raise_exception('ids have 9 characters') -}}{%- endif -%}
{{- (', ' if not loop.first else '') ~ '{"name": "' ~ call.function.name ~ '", "arguments": '
    ~ call.function.arguments | tojson ~ ', "id": "' ~ call.id ~ '"}' -}}
{%- endfor -%}
{{- ']' ~ eos_token -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' ~ m.content | tojson ~ ', "call_id": "' ~ m.tool_call_id
    ~ '"}[/TOOL_RESULTS]' -}}
{%- else -%}
{{- ' ' ~ m.content | trim ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

# The generation prompt opens the thought, and answers are rendered without theirs.
R1 = r"""
{{- bos_token ~ (messages[0].content if messages[0].role == 'system' else '') -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '<｜User｜>' ~ m.content -}}
{%- elif m.role == 'assistant' -%}
{{- '<｜Assistant｜>' ~ m.content.split('</think>')[-1] ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}
"""

SMOLLM2 = r"""
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{- '<|im_start|>system\nYou are small and helpful.<|im_end|>\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

GEMMA = r"""
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('no system turn') -}}{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant must take turns') -}}
{%- endif -%}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n'
    ~ m.content | trim ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

_LLAMA = {
    "tokens": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
    "refuses": frozenset({"reasoning", "two calls", "words and a call"}),
    "taken": 18,
}
_QWEN = {"tokens": ("<|im_start|>", "<|im_end|>"), "eos": "<|im_end|>"}
FAMILIES = {
    "llama 3.1": Family(LLAMA.replace("DAY", "'1 May 2024'"), **_LLAMA),
    "llama 3.2": Family(LLAMA.replace("DAY", "strftime_now('%d %b %Y')"), **_LLAMA),
    "qwen 2.5": Family(
        QWEN.replace("DEFAULT", "'You are helpful.'").replace("THINKS", "false"),
        **_QWEN,
        refuses=frozenset({"reasoning"}),
        taken=20,
    ),
    "qwen 3": Family(
        QWEN.replace("DEFAULT", "''").replace("THINKS", "true"),
        ("<think>", "</think>", *_QWEN["tokens"]),
        eos="<|im_end|>",
        refuses=frozenset(),
        taken=30,
    ),
    "mistral 0.3": Family(
        MISTRAL,
        (
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
        ),
        bos="<s>",
        eos="</s>",
        refuses=frozenset({"reasoning", "words and a call"}),
        taken=19,
        behind=("[/INST]", "[/TOOL_RESULTS]"),
    ),
    "deepseek r1 distill": Family(
        R1,
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        refuses=frozenset({"tools"}),
        taken=20,
        opens=True,
    ),
    "smollm2": Family(
        SMOLLM2, **_QWEN, bos="<|im_start|>", refuses=frozenset({"reasoning", "tools"}), taken=15
    ),
    "gemma": Family(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        refuses=frozenset({"system", "reasoning", "tools"}),
        taken=8,
    ),
}
