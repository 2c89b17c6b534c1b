"""Twenty optimiser steps from the same factors on the same batches: our losses are PEFT's.

torch's float32 cross-entropy over 49,152 words is off by 2e-6 of the loss at first, and by 1e-4
once the answers are nearly certain: on CPU its softmax sums to one only within 2e-5. So where only
answers are trained, PEFT computes this one function in float64.
"""

from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from counterpart import torch_model

import jlora
from jlora import adapters, injection, optim
from jlora.adapter import LORA_A, LORA_B
from jlora.config import OptimConfig
from jlora.data import chat, source
from jlora.data.batching import Batch, Batches
from jlora.train.step import init_state, make_train_step

STEPS = 20
OPTIM = OptimConfig(lr=2e-4, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5)


def write_adapter(smollm2: Any, to: Any) -> None:
    """PEFT's own initial adapter, with B drawn too in every other module."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(torch_model(smollm2), config)
    second = [p for name, p in model.named_parameters() if "lora_B" in name]
    for parameter in second[::2]:
        parameter.data.normal_(std=0.02)
    assert len(second) == 210
    model.save_pretrained(to)


def chat_batches(smollm2: Any, sentiment: Any, trained: str) -> list[Batch]:
    """Real chats of several lengths, padded, in batches of more than one shape."""
    tokenizer = chat.load_tokenizer(smollm2)
    records = source.load_records(str(sentiment), "train")[:400]
    examples, _ = chat.encode_all(records, tokenizer, 128)
    made = Batches(examples, 4, max_shapes=3, seed=1)
    batches = [made.batch_at(step) for step in range(STEPS)]
    assert len({batch.tokens.shape for batch in batches}) > 1
    assert not all(batch.mask.all() for batch in batches)
    if trained == "all tokens":
        return [batch._replace(targets=batch.mask) for batch in batches]
    return batches


def double_loss(logits: Any, labels: Any, vocab_size: int, **_: Any) -> Any:
    """The loss of transformers' causal models, in float64."""
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    rows = logits.double().reshape(-1, vocab_size)
    return torch.nn.functional.cross_entropy(rows, targets.reshape(-1), ignore_index=-100)


def train_theirs(base: Any, adapter: Any, batches: list[Batch]) -> tuple[np.ndarray, Any]:
    """(loss, gradient norm before clipping) of each step, (STEPS, 2), and the trained factors."""
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    model.train()
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(
        trained, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    rate = optim.schedule(OPTIM, STEPS)
    curve = []
    for step, batch in enumerate(batches):
        tx.param_groups[0]["lr"] = float(rate(step))
        loss = model(
            input_ids=torch.tensor(batch.tokens, dtype=torch.long),
            attention_mask=torch.tensor(batch.mask, dtype=torch.long),
            labels=torch.tensor(np.where(batch.targets, batch.tokens, -100), dtype=torch.long),
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, OPTIM.max_grad_norm)
        tx.step()
        tx.zero_grad()
        curve.append((loss.item(), norm.item()))
    factors = {name: p.detach().numpy() for name, p in model.named_parameters() if "lora" in name}
    return np.array(curve), factors


def train_ours(smollm2: Any, adapter: Any, batches: list[Batch]) -> tuple[np.ndarray, Any]:
    """The same with our step."""
    model = jlora.import_peft(adapter, jlora.load(smollm2))
    trained, base = injection.partition(model)
    tx = optim.adamw(OPTIM, STEPS)
    state = init_state(trained, tx, jax.random.key(0))
    step = make_train_step(tx)
    curve = []
    for batch in batches:
        state, metrics = step(state, base, batch)
        curve.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(curve), state.trained


@pytest.mark.xdist_group("training")  # one after the other: each takes 7 GB
@pytest.mark.parametrize("trained", ["all tokens", "answers"])
def test_loss_curve(smollm2, sentiment, tmp_path, trained):
    write_adapter(smollm2, tmp_path)
    batches = chat_batches(smollm2, sentiment, trained)
    base = torch_model(smollm2)
    if trained == "answers":
        base.loss_function = double_loss
    theirs, their_factors = train_theirs(base, tmp_path, batches)
    ours, our_factors = train_ours(smollm2, tmp_path, batches)
    loss, norm = (np.abs(ours - theirs) / np.abs(theirs)).max(axis=0)
    print(f"{trained}: largest relative difference {loss:.1e} of the loss, {norm:.1e} of the norm")
    assert loss < 1e-4
    assert norm < 1e-4
    # The settings did something: gradients were clipped, and the loss fell.
    assert (theirs[:, 1] > OPTIM.max_grad_norm).sum() > STEPS / 2
    assert theirs[-5:, 0].mean() < 0.9 * theirs[:3, 0].mean()

    # The factors moved, and to the same place.
    first = adapters.read(tmp_path).factors
    assert len(first) == len(our_factors) == 420
    for name, before in first.items():
        module, _, factor = name.rpartition("/")
        suffix = {LORA_A: "lora_A", LORA_B: "lora_B"}[factor]
        key = f"base_model.model.{module.replace('/', '.')}.{suffix}.default.weight"
        after = their_factors[key].T if factor == LORA_B else their_factors[key]
        moved = np.linalg.norm(after - np.asarray(before))
        apart = np.linalg.norm(np.asarray(our_factors[name]) - after)
        # AdamW moves each element by its sign at first, also where a gradient is mere rounding.
        assert apart < 0.02 * moved, name
