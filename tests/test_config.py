"""Configurations: what is read is what was written, and every mistake is named."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import conversion
from jlora.config import (
    EvalConfig,
    LoaderConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
)
from jlora.conversion import from_dict, read_toml, to_dict
from jlora.errors import JloraError

names = st.text("abc_.*", min_size=1, max_size=8)
several = st.lists(names, min_size=1, max_size=3).map(tuple)
numbers = st.floats(1e-3, 1e3)
loras = st.builds(
    LoraConfig,
    r=st.integers(1, 64),
    lora_alpha=numbers,
    target_modules=names | several,
    exclude_modules=st.none() | names | several,
    lora_dropout=st.floats(0, 0.99),
    layers_to_transform=st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple),
    rank_pattern=st.dictionaries(names, st.integers(1, 64), max_size=2),
    alpha_pattern=st.dictionaries(names, numbers, max_size=2),
    use_rslora=st.booleans(),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
    task_type=st.sampled_from(["CAUSAL_LM", "SEQ_CLS"]),
)
trains = st.builds(
    TrainConfig,
    model=st.just(Path("models/one")),
    data=names,
    output=st.just(Path("runs/one")),
    method=st.sampled_from(["lora", "full"]),
    steps=st.none() | st.integers(1, 9),
    dtype=st.sampled_from(["auto", "bfloat16"]),
    scan_layers=st.none() | st.booleans(),
    lora=loras,
    optim=st.builds(OptimConfig, lr=numbers, betas=st.tuples(st.floats(0, 1), st.floats(0, 1))),
    loader=st.builds(LoaderConfig, batch_size=st.integers(1, 99)),
    eval=st.builds(EvalConfig, every=st.integers(0, 99)),
)
MINIMAL: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}


@settings(deadline=None, max_examples=60)
@given(trains)
def test_what_is_written_is_read(train: TrainConfig) -> None:
    written = to_dict(train)
    assert from_dict(TrainConfig, written, where="x") == train
    assert from_dict(TrainConfig, json.loads(json.dumps(written)), where="x") == train
    assert from_dict(TrainConfig, tomllib.loads(tomli_w.dumps(written)), where="x") == train


def test_what_is_left_out_has_its_default() -> None:
    train = from_dict(TrainConfig, MINIMAL | {"lora": {"r": 3}}, where="x")
    assert train == TrainConfig(model=Path("m"), data="d", output=Path("o"), lora=LoraConfig(r=3))
    assert conversion.required(TrainConfig) == ["model", "data", "output"]


def test_configurations_are_frozen_and_share_nothing() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 3  # type: ignore[misc]
    assert LoraConfig().rank_pattern is not LoraConfig().rank_pattern


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"dataa": 1}, ["unknown key 'dataa'; did you mean 'data'?"]),
        ({"zzzzzz": 1}, ["unknown key 'zzzzzz'"]),
        ({"lora": {"lora_alhpa": 1}},
         ["unknown key 'lora.lora_alhpa'; did you mean 'lora_alpha'"]),
        ({"optim": {"learn": 1, "weight_deca": 0}},
         ["unknown key 'optim.learn'",
          "unknown key 'optim.weight_deca'; did you mean 'weight_decay'"]),
        ({"loader": {"batchsize": 1}},
         ["unknown key 'loader.batchsize'; did you mean 'batch_size'"]),
        ({"eval": {"rows": 1}}, ["unknown key 'eval.rows'; did you mean 'loss_rows'"]),
        ({"model": None, "data": 3},
         ["'model': ", "'data': Input should be a valid string, got 3"]),
        ({"steps": "many"}, ["'steps': Input should be a valid integer"]),
        ({"dtype": "float16"},
         ["'dtype': Input should be 'auto', 'float32' or 'bfloat16', got 'float16'"]),
        ({"optim": {"lr": "fast"}}, ["'optim.lr': Input should be a valid number"]),
        ({"optim": 3}, ["'optim': "]),
        ({"lora": {"r": 1.5}}, ["'lora.r': Input should be a valid integer"]),
        ({"lora": {"r": 0, "lora_dropout": 1}},
         ["LoraConfig: r must be a positive integer, got 0; lora_dropout must be in [0, 1)"]),
        ({"lora": {"target_modules": ["up", "down"], "modules_to_save": ["up"]}},
         ["LoraConfig: up cannot be both in target_modules, which get factors, and in modules_to"]),
        ({"lora": {"r": 0}, "stepz": 1}, ["LoraConfig: r must be", "unknown key 'stepz'; did you"]),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_all_named(changes: dict, lines: list[str]) -> None:
    with pytest.raises(JloraError) as caught:
        from_dict(TrainConfig, MINIMAL | changes, where="run.toml")
    first, *rest = str(caught.value).splitlines()
    assert first == "run.toml:"
    assert len(rest) == len(lines)
    for line in lines:
        assert any(found.startswith("  " + line) for found in rest), (line, rest)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(JloraError) as caught:
        from_dict(TrainConfig, {"data": "d"}, where="run.toml")
    assert str(caught.value) == "run.toml:\n  missing key 'model'\n  missing key 'output'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.0}, "r must be a positive integer, got 2.0"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern['q'] must be a positive integer, got -1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout must be in [0, 1), got -0.1"),
        ({"init_lora_weights": "pissa"}, "must be true, false or 'gaussian', got 'pissa'"),
        ({"target_modules": ()}, "target_modules is empty; name layers or say 'all-linear'"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"task_type": None}, "task_type must be a string"),
        ({"r": 0, "lora_dropout": 2}, "r must be a positive integer, got 0; lora_dropout must"),
    ],
    ids=str,
)
def test_values_that_make_no_adapter(arguments: dict, message: str) -> None:
    with pytest.raises(JloraError, match=r"^LoraConfig: ") as caught:
        LoraConfig(**arguments)
    assert message in str(caught.value)


def test_lists_are_taken_as_peft_users_write_them() -> None:
    lora = LoraConfig(target_modules=["q", "v"], layers_to_transform=[1])  # type: ignore[arg-type]
    assert lora == LoraConfig(target_modules=("q", "v"), layers_to_transform=(1,))
    lora = LoraConfig(target_modules={"q"})  # type: ignore[arg-type]
    assert lora == LoraConfig(target_modules=("q",))


def test_scaling() -> None:
    assert LoraConfig(r=16, lora_alpha=32).scaling(16, 32) == 2
    assert LoraConfig(use_rslora=True).scaling(16, 32) == 8


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    with pytest.raises(JloraError, match=r"run\.toml does not exist"):
        read_toml(file)
    file.write_text("a = 1\nb = = 2\n")
    with pytest.raises(JloraError, match=r"run\.toml cannot be read as TOML: .*line 2"):
        read_toml(file)
    file.write_bytes(b"\xff")
    with pytest.raises(JloraError, match=r"run\.toml cannot be read as TOML: .*utf-8"):
        read_toml(file)
    file.write_text("[lora]\nr = 3\n")
    assert read_toml(file) == {"lora": {"r": 3}}
