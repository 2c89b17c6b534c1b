"""The counterpart of step.py: one LoRA training step in PEFT and torch, on random weights.

    .venv-parity/bin/python benchmarks/peft_step.py --batch 4 --length 256 --rank 16

Prints the JSON that step_vs.py reads of both sides: SmolLM2-135M's shape in float32.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from record import peak_rss_bytes, versions
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=1e5,
    tie_word_embeddings=True,
    use_cache=False,  # no keys and values are kept while training
)


def main() -> None:
    """Parse flags, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(SMOLLM2_135M), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, SMOLLM2_135M.vocab_size, (args.batch, args.length))
    seconds = []
    for i in range(args.steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as our step does
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        seconds.append(time.perf_counter() - start)
        if i == 0:
            first_step_at = time.time()
    result = {
        "batch": args.batch,
        "length": args.length,
        "rank": args.rank,
        "trainable_params": sum(parameter.numel() for parameter in trained),
        "loss": value,
        "seconds_per_step": seconds[1:],
        "first_step_at": first_step_at,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": "cpu",
        "versions": versions(["torch", "peft", "transformers"]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
