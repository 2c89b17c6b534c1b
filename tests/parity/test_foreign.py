"""What `make foreign` exported of transformers' Linen Llama, in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

EXPORTED = Path(__file__).parents[2] / "build" / "foreign"


@pytest.fixture(scope="module")
def logits() -> dict[str, np.ndarray]:
    file = EXPORTED / "logits.npz"
    assert file.exists(), f"{file} is absent: `make foreign` writes it"
    with np.load(file) as arrays:
        return dict(arrays)


def test_the_exported_adapter_gives_the_same_logits_in_peft(logits):
    base = LlamaForCausalLM.from_pretrained(EXPORTED).eval()
    tokens = torch.tensor(logits["tokens"])
    with torch.no_grad():
        plain = base(tokens).logits.numpy()
        model = PeftModel.from_pretrained(base, EXPORTED / "adapter").eval()
        adapted = model(tokens).logits.numpy()
    keys = {k for k in model.state_dict() if "lora_" in k}
    assert len(keys) == 28
    np.testing.assert_allclose(plain, logits["plain"], atol=1e-5)
    np.testing.assert_allclose(adapted, logits["adapted"], atol=1e-5)
    assert np.abs(adapted - plain).max() > 1e-3 * np.abs(plain).max()
