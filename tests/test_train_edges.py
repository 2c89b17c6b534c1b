"""Runs and their parts on unusual data and files."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_model

from jlora import cli, optim
from jlora.config import EvalConfig, LoaderConfig, LoraConfig, OptimConfig, TrainConfig
from jlora.data import chat, source
from jlora.data.batching import Batches
from jlora.errors import JloraError
from jlora.models import families, load
from jlora.train import loop, measure
from jlora.train.run import Run


def records(file: Path, *conversations: list[tuple[str, str]]) -> Path:
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n"
        for turns in conversations
    ]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def test_samples_of_records_without_a_user_turn(model_dir: Path, tmp_path: Path) -> None:
    data = records(
        tmp_path / "data.jsonl",
        [("system", "Say it."), ("assistant", "it")],
        [("user", "one"), ("assistant", "1"), ("user", "zwei äöü"), ("assistant", "2")],
    )
    said: list[str] = []
    settings = TrainConfig(
        model=model_dir,
        data=str(data),
        output=tmp_path / "run",
        steps=1,
        lora=LoraConfig(r=2),
        optim=OptimConfig(warmup_steps=0),
        loader=LoaderConfig(batch_size=2, max_shapes=1),
        eval=EvalConfig(max_new_tokens=2),
    )
    loop.train(settings, say=said.append)
    samples = (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
    assert "> Say it.\n\n- **reference**: it\n" in samples
    assert "> zwei äöü\n\n- **reference**: 2\n" in samples
    text = "\n".join(said)
    assert "[[it<|im_end|>]]" in text  # what is trained is shown
    assert "trainable params: " in text
    assert f"the adapter lies in {tmp_path / 'run' / 'adapter'}" in text


def test_metrics_that_are_taken_again_are_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 0.5},
             {"step": 3, "loss": 1.0}]  # fmt: skip
    for line in lines:
        run.add_metrics(line)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    run.keep_metrics(2, last=2)
    assert run.read_metrics() == lines[:2]
    run.add_metrics(lines[2])
    run.keep_metrics(2, last=9)  # an evaluation on the way stays
    assert run.read_metrics() == lines[:3]


def test_padding_advice_only_where_it_helps(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(model_dir)
    turns = [[("user", "x" * n), ("assistant", "y")] for n in (1, 1, 1, 60)]
    rows = source.load_records(records(tmp_path / "a.jsonl", *turns))
    examples, _ = chat.encode_all(rows, tokenizer, 200)
    batches = Batches(examples, 2, max_shapes=1)
    assert "raise loader.max_shapes above 1" in loop._padding(batches, max_shapes=1)
    assert "raise" not in loop._padding(batches, max_shapes=2)


def test_an_evaluation_loss_that_is_not_finite_stops(monkeypatch) -> None:
    class One:
        batches_per_epoch = 1

        def batch_at(self, step: int) -> SimpleNamespace:
            return SimpleNamespace(rows=np.zeros(1, np.int32))

    monkeypatch.setattr(measure, "eval_step", lambda *args: (float("nan"), 3))
    with pytest.raises(JloraError, match="the evaluation loss is nan"):
        measure.mean_loss({}, None, One())  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_refused(model_dir: Path) -> None:
    assert len(chat.load_tokenizer(model_dir, 272)) == 259
    with pytest.raises(JloraError, match=r"tokenizer.json has 259 tokens, .* vocab_size 100"):
        chat.load_tokenizer(model_dir, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32", "head_dim": 0}, "whole number); head_dim 0 (only"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks rope_scaling.factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks rope_scaling.low_freq_factor"),
        ({"architectures": "GPT2LMHeadModel"}, "architecture 'GPT2LMHeadModel' is not supported"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(changes: dict, message: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(JloraError, match=r"config\.json") as caught:
        families.read_config(tmp_path)
    assert message in str(caught.value)


def test_weights_that_are_trained_stay_exact() -> None:
    assert load.compute_dtype("auto", exact=True) == "float32"
    assert load.compute_dtype("bfloat16", exact=True) == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
        ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\['q'\] must be positive"),
    ],
)
def test_alphas_that_train_nothing(changes: dict, message: str) -> None:
    with pytest.raises(JloraError, match=message):
        LoraConfig(**changes)


def test_the_warm_up_is_a_twentieth_where_none_is_given() -> None:
    for steps, warmup in ((1, 0), (19, 0), (100, 5)):
        rate = optim.schedule(OptimConfig(lr=1.0), steps)
        values = [float(rate(step)) for step in range(steps)]
        assert values.index(max(values)) == warmup
        assert values[0] == pytest.approx(1 / (warmup + 1))


def test_resuming_what_is_not_there_says_so(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--resume", "--output", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert f"--resume: {tmp_path / 'none'} holds no run" in capsys.readouterr().err
