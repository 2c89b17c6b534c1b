"""LoRA fine-tuning of Flax models, in pure JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.adapters import import_peft as import_peft
    from jlora.adapters import load_adapter as load_adapter
    from jlora.bank import Bank as Bank
    from jlora.checkpoint import save_adapter as save_adapter
    from jlora.combination import combine_adapters as combine_adapters
    from jlora.config import LoraConfig as LoraConfig
    from jlora.config import QuantConfig as QuantConfig
    from jlora.errors import JloraError as JloraError
    from jlora.generation import generate as generate
    from jlora.injection import combine as combine
    from jlora.injection import eject as eject
    from jlora.injection import inject as inject
    from jlora.injection import merge as merge
    from jlora.injection import optimizer as optimizer
    from jlora.injection import partition as partition
    from jlora.injection import plan_targets as plan_targets
    from jlora.injection import quantize as quantize
    from jlora.injection import register as register
    from jlora.injection import summary as summary
    from jlora.models.load import load as load
    from jlora.peft import export_peft as export_peft

__version__ = "0.1.0"

# Public name -> module that it is from. Each is imported when it is first asked for (PEP 562): JAX
# and Flax take seconds to import, and the command line answers --help without them.
_HOMES = {
    "import_peft": "jlora.adapters",
    "load_adapter": "jlora.adapters",
    "Bank": "jlora.bank",
    "save_adapter": "jlora.checkpoint",
    "combine_adapters": "jlora.combination",
    "LoraConfig": "jlora.config",
    "QuantConfig": "jlora.config",
    "JloraError": "jlora.errors",
    "generate": "jlora.generation",
    "combine": "jlora.injection",
    "eject": "jlora.injection",
    "inject": "jlora.injection",
    "merge": "jlora.injection",
    "optimizer": "jlora.injection",
    "partition": "jlora.injection",
    "plan_targets": "jlora.injection",
    "quantize": "jlora.injection",
    "register": "jlora.injection",
    "summary": "jlora.injection",
    "load": "jlora.models.load",
    "export_peft": "jlora.peft",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # which would take any name to be here

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
