"""LoRA fine-tuning of Flax models, in pure JAX."""

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
