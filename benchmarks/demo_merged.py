"""A run's adapter in PEFT and here, beside the base and merged into it: greedy answers compared.

    make bench-demo

Five models answer the first snippets of the test rows: ours with the adapter, the directory that
`jlora merge` writes, here and in transformers, and PEFT's before and after merge_and_unload.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import record
import torch
import transformers
from demo_vs_peft import base_model, greedy

import jlora
from jlora import cli, conversion
from jlora.config import TrainConfig
from jlora.data import chat, source
from jlora.generation import generate, stop_ids

NEW_TOKENS = 16


def main() -> None:
    """Let each answer, print, write; exit with 1 where any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--rows", type=int, default=50)
    args = parser.parse_args()
    file = args.run / "config.toml"
    settings = conversion.from_dict(TrainConfig, conversion.read_toml(file), where=str(file))
    if settings.method != "lora":
        raise SystemExit(f"{file}: only LoRA on a plain base is compared")
    tokenizer = chat.load_tokenizer(settings.model)
    test = source.load_records(settings.data, "test")[: args.rows]
    prompts = [chat.prompt_tokens(row, tokenizer) for row in test]
    stops = list(stop_ids(settings.model, tokenizer))
    adapter = args.run / "adapter"

    def ours(model: Any) -> list[str]:
        found = generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=stops, batch_size=25)
        return texts([line.tolist() for line in found])

    def theirs(model: Any) -> list[str]:
        found = greedy(model.eval(), prompts, stops, NEW_TOKENS)
        return texts([line[:-1] if line[-1] in stops else line for line in found])

    def texts(lines: Sequence[Sequence[int]]) -> list[str]:
        return [tokenizer.decode(line, skip_special_tokens=True) for line in lines]

    answers = {"jlora": ours(jlora.load_adapter(adapter, jlora.load(settings.model)))}
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch, "merged")
        cli.main(["merge", f"--model={settings.model}", f"--adapter={adapter}", f"--to={merged}"])
        answers["jlora_merged"] = ours(jlora.load(merged))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        answers["jlora_merged_in_transformers"] = theirs(loaded)
    model: Any = peft.PeftModel.from_pretrained(base_model(settings), adapter)
    answers["peft"] = theirs(model)
    answers["peft_merged"] = theirs(model.merge_and_unload())

    own = answers["jlora"]
    same = {
        name: sum(a == b for a, b in zip(own, other, strict=True))
        for name, other in answers.items()
    }
    right = [chat.answer_text(row).strip() for row in test]
    result = {
        "rows": len(test),
        "distinct_answers": sorted(set(own)),
        "right": sum(a.strip() == b for a, b in zip(own, right, strict=True)),
        "answers_like_jlora": same,
        "versions": record.versions(["jax", "flax", "torch", "peft", "transformers"]),
    }
    written = record.write(
        "demo_merged", f"python benchmarks/demo_merged.py --run {args.run}", result
    )
    print(json.dumps(result, indent=2))
    print(f"written to {written}")
    if set(same.values()) != {len(test)}:
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
