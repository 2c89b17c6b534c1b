"""Give layers the names of Hugging Face's torch model, where these are others than Flax's.

A model says so in a class attribute, `peft_names = {"[.]attention[.]query$": ".attn.q_proj"}`:
regular expression -> what it is replaced by, in dotted names, one after the other; `{}` says that
all names are the same. For Flax models of transformers 4 this is known here; `make parity` compares
each with its torch model in transformers 5.
"""

import re
from collections.abc import Mapping
from typing import Any

from jlora.errors import JloraError

SAME = frozenset({
    "albert", "bart", "bert", "big_bird", "blenderbot", "blenderbot-small", "bloom", "clip",
    "distilbert", "electra", "gemma", "gpt2", "gpt_neo", "gptj", "llama", "marian", "mbart",
    "mistral", "opt", "pegasus", "roberta", "roberta-prelayernorm", "roformer", "whisper", "xglm",
    "xlm-roberta",
})  # fmt: skip
"""Types of transformers' models whose layers have one name in Flax and in torch."""

_ATTENTION = {
    r"\.attention\.attention\.query$": ".attention.q_proj",
    r"\.attention\.attention\.key$": ".attention.k_proj",
    r"\.attention\.attention\.value$": ".attention.v_proj",
    r"\.attention\.output\.dense$": ".attention.o_proj",
}
_BLOCKS = {
    r"\.intermediate\.dense$": ".mlp.fc1",
    r"\.output\.dense$": ".mlp.fc2",
    r"\bencoder\.layer\.(\d+)": r"layers.\1",
}
RENAMED: dict[str, dict[str, str]] = {
    "beit": _ATTENTION | _BLOCKS,
    "dinov2": _ATTENTION,
    "vit": _ATTENTION | _BLOCKS,
}
"""Types whose layers transformers 5 has renamed in torch -> `peft_names`."""


def torch_name(name: str, names: Mapping[str, str]) -> str:
    """Return what a module, by its dotted name, is called in torch."""
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def names_of_model(model: Any) -> Mapping[str, str] | None:
    """Return a model's `peft_names`; None where they are unknown.

    Raises:
        JloraError: `peft_names` that are no regular expressions and replacements.
    """
    declared = getattr(model, "peft_names", None)
    if declared is not None:
        try:
            torch_name("", declared)
        except (re.error, TypeError, AttributeError) as error:
            raise JloraError(
                f"peft_names of {_class(model)} must be a mapping of regular expressions to "
                f"replacements, got {declared!r} ({error})"
            ) from None
        return declared
    kind = _type(model)
    return {} if kind is None or kind in SAME else RENAMED.get(kind)


def demand_known(model: Any) -> None:
    """Demand that the names of a model's layers in torch are known.

    PEFT passes over tensors whose layer the model has not, without a word.

    Raises:
        JloraError: a model of transformers that has not been compared with its torch model.
    """
    if names_of_model(model) is None:
        name = _class(model)
        raise JloraError(
            f"{name} is a model of transformers of type {_type(model)!r}, and whether its layers "
            "have the same names in torch is not known here: PEFT would pass over those that have "
            "not, without a word. Compare the names with torch's named_modules(), and say what "
            f"differs: {name}.peft_names = {{'regular expression': 'replacement'}}, or {{}} where "
            "nothing does"
        )


def _type(model: Any) -> str | None:
    """Return the type that the configuration of a model of transformers names."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    ours = hasattr(config, "to_dict") and hasattr(config, "architectures")
    return kind if ours and isinstance(kind, str) else None


def _class(model: Any) -> str:
    base = next((b for n in ("lora_base", "plain_base") if (b := getattr(model, n, None))), None)
    return (base or type(model)).__name__
