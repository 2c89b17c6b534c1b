"""Files of weights: each tensor read or named, by every reader of a directory alike."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jlora
from jlora import fingerprint, injection, merging
from jlora.commands import MergeConfig
from jlora.config import QuantConfig
from jlora.errors import JloraError
from jlora.models import load
from jlora.models.directory import EMBEDDING, HEAD, Directory
from jlora.models.tensors import INDEX, WEIGHTS, Tensors

NORM = "model.norm.weight"
TOKENS = jnp.arange(5, 17, dtype=jnp.int32)[None]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return helpers.write_model(tmp_path / "tied", num_hidden_layers=2, intermediate_size=64)


def change(model_dir: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> dict[str, np.ndarray]:
    """Edit the tensors of model.safetensors; what they are then."""
    tensors = load_file(model_dir / WEIGHTS)
    edit(tensors)
    save_file(tensors, model_dir / WEIGHTS)
    return tensors


def another_head(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = tensors[EMBEDDING][::-1].copy()


def move_head(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def copy_head(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].copy()


def in_shards(model_dir: Path, count: int = 2, **listed: str) -> dict[str, np.ndarray]:
    """Split the weights; the index says of tensors in `listed` that they are elsewhere."""
    tensors = load_file(model_dir / WEIGHTS)
    (model_dir / WEIGHTS).unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: names[i % count] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, model_dir / file)
    (model_dir / INDEX).write_text(json.dumps({"weight_map": where | listed}))
    return tensors


class TestHeads:
    def test_one_of_its_own_is_not_dropped(self, tied: Path, caplog) -> None:
        before = jlora.load(tied)(TOKENS)
        tensors = change(tied, another_head)
        with caplog.at_level(logging.WARNING, "jlora"):
            model = jlora.load(tied)
        np.testing.assert_array_equal(model.head_weight(), tensors[HEAD])
        assert np.abs(model(TOKENS) - before).max() > 0.1
        np.testing.assert_allclose(
            model(TOKENS)[..., ::-1], before, rtol=1e-4, atol=1e-5
        )  # rows in reverse
        assert f"{HEAD} and {EMBEDDING} with different values" in caplog.text

    def test_every_reader_knows_of_it(self, tied: Path, tmp_path: Path) -> None:
        change(tied, another_head)
        model = jlora.load(tied)
        assert fingerprint.of_directory(tied, load.abstract(tied)) == fingerprint.of(model)
        assert "lm_head/kernel" in fingerprint.of(model).shapes
        config = jlora.LoraConfig(r=2, target_modules=("lm_head",), init_lora_weights=False)
        jlora.inject(model, config, rngs=nnx.Rngs(0))
        jlora.export_peft(tmp_path / "adapter", model, config)
        merged = merge(tied, tmp_path)
        np.testing.assert_allclose(jlora.load(merged)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
        load.quantize(tied, tmp_path / "quantised", QuantConfig(block_size=32))
        again = jlora.load(tmp_path / "quantised")
        np.testing.assert_array_equal(again.head_weight(), jlora.load(tied).head_weight())

    @pytest.mark.parametrize("edit", [move_head, copy_head])
    def test_a_tied_one_by_any_name(self, tied: Path, tmp_path: Path, edit: Callable) -> None:
        expected = jlora.load(tied)
        known = fingerprint.of_directory(tied, load.abstract(tied))
        tensors = change(tied, edit)
        model = jlora.load(tied, scan_layers=True)
        np.testing.assert_allclose(model(TOKENS), expected(TOKENS), rtol=1e-4, atol=1e-5)
        assert fingerprint.of_directory(tied, load.abstract(tied)) == known
        weight = load.weights_of(tied)("model/embed_tokens/embedding")
        np.testing.assert_array_equal(weight, tensors[HEAD])
        config = jlora.LoraConfig(
            r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens",),
            init_lora_weights=False,
        )  # fmt: skip
        jlora.inject(model := jlora.load(tied), config, rngs=nnx.Rngs(0))
        leaves = jlora.partition(model)[0]
        path = "model/embed_tokens/embedding"
        injection.update(model, leaves | {path: leaves[path] + 1})
        jlora.save_adapter(tmp_path / "adapter", model, config)
        merged = merge(tied, tmp_path)
        assert load_file(merged / WEIGHTS).keys() == tensors.keys()
        np.testing.assert_allclose(jlora.load(merged)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)

    def test_none_where_nothing_ties_it(self, tied: Path) -> None:
        about = json.loads((tied / "config.json").read_text())
        del about["tie_word_embeddings"]
        (tied / "config.json").write_text(json.dumps(about))
        with pytest.raises(JloraError, match=r"missing: lm_head(.|\n)*say true there"):
            jlora.load(tied)


def merge(model_dir: Path, tmp_path: Path) -> Path:
    settings = MergeConfig(model=model_dir, adapter=tmp_path / "adapter", to=tmp_path / "merged")
    merging.merge(settings)
    return tmp_path / "merged"


class TestFiles:
    @pytest.mark.parametrize("shards", [1, 2])
    def test_an_index_of_an_older_save(self, tied: Path, tmp_path, caplog, shards: int) -> None:
        expected = load_file(tied / WEIGHTS)
        older = shutil.copytree(tied, tmp_path / "older")
        change(older, lambda tensors: tensors.update({NORM: -tensors[NORM]}))
        in_shards(older, shards)
        for file in [*older.glob("model-*"), older / INDEX]:
            shutil.copy(file, tied)
        with caplog.at_level(logging.WARNING, "jlora"):
            model = jlora.load(tied)
        np.testing.assert_array_equal(model.model.norm.weight[...], expected[NORM])
        assert f"read from {WEIGHTS}" in caplog.text
        assert f"{INDEX}, model-00001" in caplog.text
        weight = load.weights_of(tied)("model/norm/weight")
        np.testing.assert_array_equal(weight, expected[NORM])
        config = jlora.LoraConfig(r=2, init_lora_weights=False)
        jlora.inject(model, config, rngs=nnx.Rngs(0))
        jlora.save_adapter(tmp_path / "adapter", model, config)
        merged = merge(tied, tmp_path)
        assert not (merged / INDEX).exists()
        np.testing.assert_allclose(jlora.load(merged)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)

    def test_an_index_of_the_one_file_is_none_to_speak_of(self, tied: Path, caplog) -> None:
        where = dict.fromkeys(load_file(tied / WEIGHTS), WEIGHTS)
        (tied / INDEX).write_text(json.dumps({"weight_map": where}))
        with caplog.at_level(logging.WARNING, "jlora"):
            jlora.load(tied)
        assert caplog.text == ""

    @pytest.mark.parametrize("text", ["{}", "not json", '{"weight_map": {}}', "[" * 100_000])
    def test_an_index_that_is_none_beside_the_one_file(self, tied: Path, caplog, text) -> None:
        expected = load_file(tied / WEIGHTS)
        (tied / INDEX).write_text(text)
        with caplog.at_level(logging.WARNING, "jlora"):
            model = jlora.load(tied)
        np.testing.assert_array_equal(model.model.norm.weight[...], expected[NORM])
        assert f"read from {WEIGHTS}" in caplog.text
        assert f"{INDEX} beside it left unread" in caplog.text
        (tied / WEIGHTS).unlink()
        with pytest.raises(JloraError, match=r"is not a safetensors index|lacks model"):
            jlora.load(tied)

    def test_links_that_lead_nowhere(self, tied: Path) -> None:
        (tied / WEIGHTS).rename(tied / "there")
        (tied / WEIGHTS).symlink_to("there")
        jlora.load(tied)
        (tied / "there").unlink()
        with pytest.raises(JloraError, match=r"safetensors: it is a link to there, which is not"):
            jlora.load(tied)

    def test_a_shard_that_no_index_names(self, tied: Path, caplog) -> None:
        tensors = in_shards(tied)
        extra = "model-00003-of-00003.safetensors"
        save_file({NORM: -tensors[NORM]}, tied / extra)
        with caplog.at_level(logging.WARNING, "jlora"):
            model = jlora.load(tied)
        np.testing.assert_array_equal(model.model.norm.weight[...], tensors[NORM])
        assert f"read from {INDEX}" in caplog.text
        assert extra in caplog.text

    def test_the_index_need_not_say_where(self, tied: Path) -> None:
        """Transformers takes all that is in the files that it names."""
        tensors = in_shards(tied, **{NORM: "model-00002-of-00002.safetensors"})
        np.testing.assert_array_equal(jlora.load(tied).model.norm.weight[...], tensors[NORM])

    def test_one_tensor_in_two_files(self, tied: Path) -> None:
        tensors = in_shards(tied)
        first, second = (tied / f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
        (own,) = (f for f in (first, second) if NORM in load_file(f))
        (other,) = {first, second} - {own}
        save_file(load_file(other) | {NORM: tensors[NORM]}, other)
        np.testing.assert_array_equal(jlora.load(tied).model.norm.weight[...], tensors[NORM])
        for value in (tensors[NORM] + 1, tensors[NORM][:-1]):
            save_file(load_file(other) | {NORM: value}, other)
            with pytest.raises(JloraError, match=f"{NORM} is in .*00001.*, otherwise, in .*00002"):
                jlora.load(tied)

    @pytest.mark.parametrize(
        "buffer",
        [
            "model.rotary_emb.inv_freq",
            "model.layers.1.self_attn.rotary_emb.inv_freq",
            "model.layers.0.self_attn.rotary_emb.cos_cached",
            "model.layers.0.self_attn.masked_bias",
        ],
    )
    def test_buffers_are_passed_over(self, tied: Path, tmp_path: Path, buffer: str) -> None:
        expected = jlora.load(tied)
        change(tied, lambda tensors: tensors.update({buffer: np.full(4, 9, np.float32)}))
        model = jlora.load(tied)
        np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))
        load.quantize(tied, tmp_path / "to", QuantConfig(block_size=32))

    def test_what_is_no_buffer_is_named(self, tied: Path) -> None:
        name = "model.layers.0.self_attn.sinks"
        change(tied, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
        with pytest.raises(JloraError, match=rf"unexpected: {name} \(4,\)"):
            jlora.load(tied)

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            ([], r"lacks model\.safetensors; weights must be safetensors: fetch or convert"),
            (["pytorch_model.bin"], r"pytorch_model\.bin is pickled.*save_pretrained"),
            (["pytorch_model-00001-of-00002.bin"], r"00001-of-00002\.bin is pickled"),
            (["model-00001-of-00002.safetensors"], r"and model\.safetensors\.index\.json, which"),
            (["consolidated.safetensors"], r"consolidated\.safetensors is there, and is not it"),
        ],
        ids=["none", "pickled", "pickled shards", "no index", "another format"],
    )
    def test_none_that_are_read(self, tied: Path, files: list[str], said: str) -> None:
        (tied / WEIGHTS).unlink()
        for file in files:
            (tied / file).write_bytes(b"")
        with pytest.raises(JloraError, match=said):
            jlora.load(tied)

    def test_an_adapter_beside_them(self, tied: Path, caplog) -> None:
        (tied / "adapter_model.safetensors").write_bytes(b"")
        with caplog.at_level(logging.WARNING, "jlora"):
            jlora.load(tied)
        assert "adapter_model.safetensors beside the weights is an adapter" in caplog.text

    def test_the_size_is_that_of_what_is_read(self, tied: Path) -> None:
        size = (tied / WEIGHTS).stat().st_size
        save_file({NORM: np.zeros(9, np.float32)}, tied / "model-00001-of-00001.safetensors")
        assert Tensors(tied).size() == size


def spoil_headers(model_dir: Path) -> None:
    """Overwrite each header with as many spaces: who parses it again fails."""
    for file in model_dir.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        data[8 : 8 + size] = b" " * size
        file.write_bytes(data)


def test_headers_are_parsed_once(tied: Path) -> None:
    in_shards(tied)
    expected = jlora.load(tied)
    known = fingerprint.of(expected)
    directory, lazy = Directory.open(tied), load.weights_of(tied)
    lazy("model/norm/weight")
    (tied / INDEX).unlink()
    spoil_headers(tied)
    with pytest.raises(JloraError):
        jlora.load(tied)
    model = load.load(directory)
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))
    assert fingerprint.of_directory(directory, load.abstract(directory)) == known
    assert not load.is_quantised(directory)
    leaves, _ = injection.partition(expected, everything=True)
    for read in (lazy, load.weights_of(directory)):
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(read(path), jax.device_get(leaf), path)
