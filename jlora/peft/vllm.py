"""What vLLM, which serves PEFT directories, takes of them.

The rules are those of its PEFTHelper and LoRAConfig (vllm/lora/peft_helper.py, vllm/config/lora.py;
versions 0.8 to 0.20): it reads r, lora_alpha, use_rslora and target_modules, knows no patterns, and
holds every adapter in slots of one rank.
"""

from jlora import adapter
from jlora.config import LoraConfig
from jlora.errors import JloraError
from jlora.targets import Plan

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank can be
DEFAULT_RANK = 16


def max_lora_rank(lora: LoraConfig, plan: Plan) -> int:
    """The least --max-lora-rank that a server needs for an adapter.

    Args:
        lora: its configuration.
        plan: what that adapts.

    Raises:
        JloraError: vLLM would refuse the adapter, or compute something else in silence; every
            reason, and how to avoid it.
    """
    problems = []
    if lora.bias != "none":
        problems.append(f"bias = {lora.bias!r}: no biases are served; train with bias = 'none'")
    if lora.modules_to_save:
        problems.append(
            f"modules_to_save = {list(lora.modules_to_save)}: only factors are served; put the "
            "modules in target_modules, or merge the adapter and serve the model"
        )
    if plan.tokens:
        problems.append(
            "trainable_token_indices: most versions serve no token rows; merge the adapter and "
            "serve the model"
        )
    convolutions = [t.site.path for t in plan.targets if t.site.kind == "convolution"]
    if convolutions:
        problems.append(
            f"{', '.join(convolutions[:5])}: convolutions have no factors there; leave them out "
            "(exclude_modules)"
        )
    own = [(name, t) for name, t in adapter.iter_names(plan.targets)]
    common = lora.scaling(lora.r, lora.lora_alpha)
    other = [f"{name} ({t.alpha:g}, {t.r})" for name, t in own if t.scaling != common]
    if other:
        problems.append(
            f"patterns that change the scaling, which would be {common:g} everywhere, at "
            f"{len(other)} layers (alpha, rank), {', '.join(other[:3])} among them: give each "
            "pattern of ranks one of alphas that keeps it, or use neither"
        )
    largest = max((t.r for _, t in own), default=lora.r)
    if max(largest, lora.r) > RANKS[-1]:
        problems.append(f"rank {max(largest, lora.r)}: {RANKS[-1]} is the largest; use less")
    if problems:
        raise JloraError("vLLM would not serve this adapter:\n  " + "\n  ".join(problems))
    return next(rank for rank in RANKS if rank >= max(largest, lora.r))
