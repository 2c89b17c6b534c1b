"""The optimiser of a run: clipping, AdamW, and its learning rate."""

import optax

from jlora.config import OptimConfig
from jlora.errors import JloraError


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to `config.lr`, then half a cosine to zero at `steps`.

    The first step already moves: its rate is lr / (warm-up + 1).

    Raises:
        JloraError: the warm-up is not shorter than the run.
    """
    warmup = steps // 20 if config.warmup_steps is None else config.warmup_steps
    if warmup >= steps:
        raise JloraError(
            f"optim.warmup_steps is {warmup}, but the run has only {steps} steps; "
            "make the warm-up shorter or the run longer"
        )
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=config.lr / (warmup + 1),
        peak_value=config.lr,
        warmup_steps=warmup,
        decay_steps=steps,
    )


def adamw(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW on `schedule`; for the trained tree alone."""
    b1, b2 = config.betas
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule(config, steps), b1=b1, b2=b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )
