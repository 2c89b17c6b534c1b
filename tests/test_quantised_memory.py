"""How tensors are read, and how little that holds beside a quantised model, as the kernel says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import HF_CONFIG
from safetensors.numpy import save_file

from jlora.errors import JloraError
from jlora.models.tensors import Tensors
from jlora.quant.quantize import transpose_into

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "host_memory.py"
WIDTH, INNER, VOCAB = 512, 1536, 1024


def write_weights(to: Path, layers: int) -> Path:
    """A random Llama in bfloat16; 7 MB a layer."""
    to.mkdir()
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCAB}
    config = HF_CONFIG | sizes | {"num_key_value_heads": 4, "num_hidden_layers": layers}
    (to / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (VOCAB, WIDTH), "norm": (WIDTH,)}
    for layer in (f"layers.{i}." for i in range(layers)):
        shapes |= {f"{layer}self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj": (WIDTH, INNER)}
        shapes |= {f"{layer}{x}_layernorm": (WIDTH,) for x in ("input", "post_attention")}
    noise = np.random.default_rng(0).normal(size=WIDTH * INNER + 7).astype(ml_dtypes.bfloat16)
    tensors = {f"model.{name}.weight": np.resize(noise, shape) for name, shape in shapes.items()}
    save_file(tensors, to / "model.safetensors")
    return to


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of one layer, and one of 16."""
    to = tmp_path_factory.mktemp("weights")
    return write_weights(to / "one", 1), write_weights(to / "many", 16)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's kernel tells the peak")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_no_more_than_the_quantised_model_and_two_tensors(scan_layers: bool, models) -> None:
    # What is compiled for these shapes is there after the model of one layer.
    one, many = models
    command = [sys.executable, BENCHMARK, f"--model={many}", f"--warm-up={one}", "--dtype=float32"]
    command += ["--scan-layers"] * scan_layers
    # Freed memory goes back at once: how much malloc keeps differs from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["quantised_bytes"] < result["limit_bytes"] < result["on_disk_bytes"] / 2
    grown = result["load"]["grown_bytes"]
    assert 0.9 * result["quantised_bytes"] < grown < result["limit_bytes"]  # it measures, and fits


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5), (64, 3), (131, 70)])
def test_transposed_in_parts_is_transposed(shape: tuple[int, int], dtype) -> None:
    matrix = np.random.default_rng(0).integers(0, 200, shape).astype(np.float32)
    to = np.zeros((shape[1], shape[0] + 2), dtype)
    transpose_into(to[:, 1:-1], matrix)
    np.testing.assert_array_equal(to[:, 1:-1], matrix.T.astype(dtype))
    assert not to[:, [0, -1]].any()


def test_a_tensor_is_read_from_its_own_place(tmp_path: Path) -> None:
    stored = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.arange(3).astype(ml_dtypes.bfloat16),
        "code": np.array(7, np.uint8),
    }
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "np"})
    tensors = Tensors(tmp_path)
    assert set(tensors.shapes()) == set(stored)
    for name, value in stored.items():
        got = tensors.read(name)
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(got, value)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": np.ones((4, 4), np.float32)}, file)
    tensors = Tensors(tmp_path)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(JloraError, match=r"model.safetensors was cut short .* fetch it again"):
        tensors.read("w")


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(JloraError, match="w is F8_E8M0, and only F64, F32"):
        Tensors(tmp_path).read("w")
