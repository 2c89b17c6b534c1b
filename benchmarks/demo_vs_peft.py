"""A finished run of `jlora train` against PEFT on the same rows, order, steps and learning rate.

    make bench-demo                 # or: make bench-demo METHOD=qlora

A run of --method qlora is compared with PEFT on a base that bitsandbytes quantises. PEFT draws its
own initial factors. Both adapters are then judged alike, by transformers: its greedy answers on the
test rows, and its loss on the valid rows.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import record
import torch
import transformers
from tqdm import tqdm

from jlora import conversion, optim
from jlora.config import QuantConfig, TrainConfig
from jlora.data import chat, source
from jlora.data.batching import Batch, Batches
from jlora.generation import stop_ids
from jlora.train.measure import evaluation_batches

OURS = ("jax", "flax", "optax")
THEIRS = ("torch", "peft", "transformers", "bitsandbytes")


def main() -> None:
    """Train PEFT as the run was trained, judge both, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--seed", type=int, default=0, help="of PEFT's initial factors")
    args = parser.parse_args()
    file = args.run / "config.toml"
    settings = conversion.from_dict(TrainConfig, conversion.read_toml(file), where=str(file))
    if settings.method == "full" or settings.lora.init_lora_weights is not True:
        raise SystemExit(f"{file}: only (Q)LoRA with the usual initial factors is compared")
    plain = dataclasses.replace(settings.quant, double_quant=False)
    if settings.method == "qlora" and plain not in (QuantConfig(), QuantConfig(kind="fp4")):
        raise SystemExit(f"{file}: of QLoRA, NF4 and FP4 of all linear layers are compared")
    report = json.loads((args.run / "report.json").read_text(encoding="utf-8"))

    theirs = train(settings, report["steps"], args.seed)
    ours = peft.PeftModel.from_pretrained(base_model(settings), args.run / "adapter")
    result = {
        "run": {"steps": report["steps"], "trainable_params": report["trainable_params"],
                "config": conversion.to_dict(settings)},
        "jlora": judge(ours, settings),
        "jlora_by_itself": {"exact_match": report["accuracy_after"],
                            "eval_loss": report["eval_loss_after"]},
        "peft": judge(theirs, settings),
        "peft_trainable_params": theirs.get_nb_trainable_parameters()[0],
        "peft_seed": args.seed,
        "versions": record.versions([*OURS, *THEIRS]),
    }  # fmt: skip
    points = 100 * (result["jlora"]["exact_match"] - result["peft"]["exact_match"])
    result["exact_match_points_above_peft"] = points
    result["eval_loss_ratio"] = result["jlora"]["eval_loss"] / result["peft"]["eval_loss"]
    command = f"python benchmarks/demo_vs_peft.py --run {args.run} --seed {args.seed}"
    name = "demo_vs_peft" if settings.method == "lora" else "demo_vs_peft_qlora"
    written = record.write(name, command, result)
    print(json.dumps(result, indent=2))
    print(f"written to {written}")


def base_model(settings: TrainConfig) -> Any:
    """The run's base model, float32 or of 4 bits that are dequantised to that."""
    quant = None
    if settings.method == "qlora":
        quant = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quant.kind,
            bnb_4bit_use_double_quant=settings.quant.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, quantization_config=quant
    )


def train(settings: TrainConfig, steps: int, seed: int) -> Any:
    """What PEFT makes of the run's settings."""
    lora, wanted = settings.lora, settings.optim
    torch.manual_seed(seed)
    same = {name: value for name, value in conversion.to_dict(lora).items() if value != []}
    model = peft.get_peft_model(base_model(settings), peft.LoraConfig(**same))
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, betas=wanted.betas, eps=wanted.eps, weight_decay=wanted.weight_decay
    )
    rate = optim.schedule(wanted, steps)
    tokenizer = chat.load_tokenizer(settings.model)
    records = source.load_records(settings.data, "train")
    examples, _ = chat.encode_all(records, tokenizer, settings.loader.max_length)
    batches = Batches(
        examples,
        settings.loader.batch_size,
        max_shapes=settings.loader.max_shapes,
        seed=settings.seed,
    )
    model.train()
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = float(rate(step))
        loss = model(**torch_batch(batches.batch_at(step))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, wanted.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return model


def torch_batch(batch: Batch) -> dict[str, Any]:
    """What a causal model of transformers takes."""
    return {
        "input_ids": torch.tensor(batch.tokens, dtype=torch.long),
        "attention_mask": torch.tensor(batch.mask, dtype=torch.long),
        "labels": torch.tensor(np.where(batch.targets, batch.tokens, -100), dtype=torch.long),
    }


@torch.no_grad()
def judge(model: Any, settings: TrainConfig) -> dict[str, float]:
    """Fraction of test rows answered to the letter, and mean loss of the valid rows."""
    model.eval()
    tokenizer = chat.load_tokenizer(settings.model)
    valid = source.load_records(settings.data, "valid")[: settings.eval.loss_rows]
    examples, _ = chat.encode_all(valid, tokenizer, settings.loader.max_length)
    batches = evaluation_batches(examples, settings.loader.batch_size)
    total = count = 0.0
    for i in range(batches.batches_per_epoch):
        batch = batches.batch_at(i)
        tokens = int(batch.targets[:, 1:].sum())
        total += model(**torch_batch(batch)).loss.item() * tokens
        count += tokens

    test = source.load_records(settings.data, "test")[: settings.eval.answer_rows]
    references = [chat.answer_text(row).strip() for row in test]
    longest = max(len(tokenizer(text)["input_ids"]) for text in references)
    stops = list(stop_ids(settings.model, tokenizer))
    prompts = [chat.prompt_tokens(row, tokenizer) for row in test]
    right = 0
    for line, reference in zip(greedy(model, prompts, stops, longest + 1), references, strict=True):
        ended = line[-1] in stops
        answer = tokenizer.decode(line[:-1], skip_special_tokens=True)
        right += ended and answer.strip() == reference
    return {"exact_match": right / len(test), "eval_loss": total / count}


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[Sequence[int]], stops: Sequence[int], most: int
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to `most`; the last is a stop token, if any."""
    answers = []
    for start in range(0, len(prompts), 25):
        rows = prompts[start : start + 25]
        width = max(map(len, rows))
        tokens, mask = np.zeros((2, len(rows), width), np.int64)
        for row, prompt in enumerate(rows):
            tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        new = model.generate(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )[:, width:]
        for line in new.tolist():
            end = next((at for at, token in enumerate(line) if token in stops), len(line) - 1)
            answers.append(line[: end + 1])
    return answers


if __name__ == "__main__":
    main()
