"""Training on quantised models: runs, how they are gone on with, and what they refuse."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, write_chats, write_model
from safetensors.numpy import load_file

import jlora
from jlora import actions, commands
from jlora.config import EvalConfig, LoaderConfig, OptimConfig, TrainConfig
from jlora.errors import JloraError
from jlora.models import load
from jlora.train import loop

TOKENS = jnp.asarray([[5, 9, 200, 7, 7, 31, 2], [8, 1, 4, 100, 23, 0, 1]], jnp.int32)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("quantised") / "model", **SIZES)


@pytest.fixture(scope="module")
def settings(source: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    data = write_chats(tmp_path_factory.mktemp("quantised") / "data")
    return TrainConfig(
        model=source,
        data=str(data),
        output=Path("set by each test"),
        method="qlora",
        steps=6,
        checkpoint_every=3,
        lora=jlora.LoraConfig(r=4, lora_alpha=8),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        loader=LoaderConfig(batch_size=8, max_shapes=1),
        eval=EvalConfig(loss_rows=8, answer_rows=0, samples=0),
    )


def run(settings: TrainConfig, **changes: Any) -> dict[str, Any]:
    return loop.train(dataclasses.replace(settings, **changes), say=lambda line: None)


def test_runs(settings: TrainConfig, tmp_path: Path) -> None:
    report = run(settings, output=tmp_path / "run")
    assert report["method"] == "qlora"
    assert report["eval_loss_after"] < report["eval_loss_before"]
    # On a directory that holds the same codes, the same run.
    load.quantize(settings.model, tmp_path / "small", jlora.QuantConfig())
    run(settings, model=tmp_path / "small", output=tmp_path / "other")
    run(settings, output=tmp_path / "halves", steps=6, scan_layers=False)
    first = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for other in ("other", "halves"):
        assert_same(first, load_file(tmp_path / other / "adapter" / "adapter_model.safetensors"))
    base = jlora.load(settings.model, quant=jlora.QuantConfig())
    loaded = jlora.load_adapter(tmp_path / "run", base)
    assert np.abs(loaded(TOKENS) - jlora.eject(loaded)(TOKENS)).max() > 1e-3
    from_checkpoint = jlora.load_adapter(tmp_path / "run" / "checkpoints" / "6", base)
    np.testing.assert_array_equal(
        from_checkpoint.model.layers[0].mlp.up_proj.lora_b[...].T,
        first["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"],
    )


def test_a_run_from_before_there_was_a_setting(settings: TrainConfig, tmp_path: Path) -> None:
    run(settings, method="lora", output=tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    file = tmp_path / "run" / "config.toml"
    text = file.read_text()
    table = text[text.index("[quant]") : text.index("[", text.index("[quant]") + 1)]
    file.write_text(text.replace(table, ""))
    run(settings, method="lora", output=tmp_path / "run", resume=True)
    file.write_text(text.replace(table, '[quant]\nkind = "int8"\n\n'))
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(JloraError, match=r"quant\.kind: 'int8' then, 'nf4' now"):
        run(settings, method="lora", output=tmp_path / "run", resume=True)


def test_other_commands_quantise_as_the_run_did(settings: TrainConfig, tmp_path: Path) -> None:
    quant = jlora.QuantConfig(kind="fp4", double_quant=True)
    run(settings, output=tmp_path / "run", quant=quant)
    given = commands.EvaluateConfig(
        model=settings.model, data="", adapter=tmp_path / "run", dtype="float32"
    )
    model, _ = actions.load_base(given, [tmp_path / "run"])
    jlora.load_adapter(tmp_path / "run", model)
    expected = jlora.load_adapter(tmp_path / "run", jlora.load(settings.model, quant=quant))
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))
    # Quantised on disk, they stay what they are.
    load.quantize(settings.model, tmp_path / "small", jlora.QuantConfig())
    small = dataclasses.replace(given, model=tmp_path / "small")
    model, _ = actions.load_base(small, [tmp_path / "run"])
    assert model.model.layers[0].mlp.up_proj.kernel.get_value().kind == "nf4"


def test_what_config_json_says_is_not_believed(settings: TrainConfig, tmp_path: Path) -> None:
    """The weights are asked."""
    for name in ("plain", "small"):
        if name == "plain":
            shutil.copytree(settings.model, tmp_path / name)
        else:
            load.quantize(settings.model, tmp_path / name, jlora.QuantConfig())
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        if config.pop("quantization_config", None) is None:
            config["quantization_config"] = {"quant_method": "bitsandbytes"}
        file.write_text(json.dumps(config))
    run(
        settings,
        model=tmp_path / "plain",
        output=tmp_path / "int8",
        quant=jlora.QuantConfig(kind="int8"),
    )
    with pytest.raises(JloraError, match=r"--method full: the weights in .* are quantised"):
        run(settings, model=tmp_path / "small", output=tmp_path / "full", method="full")


def test_runs_that_are_refused(settings: TrainConfig, tmp_path: Path) -> None:
    load.quantize(settings.model, tmp_path / "small", jlora.QuantConfig())
    refused = {
        r"--method full: the weights in .* are quantised": {"method": "full"},
        r"--quant: the weights in .* are quantised already": {
            "quant": jlora.QuantConfig(kind="int8")
        },
    }
    for message, changes in refused.items():
        with pytest.raises(JloraError, match=message):
            run(settings, model=tmp_path / "small", output=tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_quant_without_qlora_is_not_ignored(settings: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(JloraError, match=r"--quant .* --method qlora"):
        run(
            settings,
            method="lora",
            quant=jlora.QuantConfig(kind="int8"),
            output=tmp_path / "run",
        )
