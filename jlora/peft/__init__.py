"""The PEFT format: adapter_config.json and adapter_model.safetensors, in both directions.

Our paths are Hugging Face's names with "/" for ".", so that names need no table. What differs is
the order of axes, and that PEFT keeps replacements of rows and weights where we may keep what is
added to them; `tensors` has both in one table, which `read` and `write` go through.
"""

from jlora.peft.config import CONFIG_FILE as CONFIG_FILE
from jlora.peft.read import WEIGHTS_FILE as WEIGHTS_FILE
from jlora.peft.read import fit as fit
from jlora.peft.read import locate as locate
from jlora.peft.read import read_peft as read_peft
from jlora.peft.tensors import Weights as Weights
from jlora.peft.tensors import check_exportable as check_exportable
from jlora.peft.tensors import is_copy as is_copy
from jlora.peft.tensors import is_factor as is_factor
from jlora.peft.write import export_peft as export_peft
from jlora.peft.write import write_peft as write_peft
