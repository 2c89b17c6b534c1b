"""PEFT directories that are whole, as others write them; and what is said of those that are not."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jlora
from jlora import adapters, injection, peft
from jlora.errors import JloraError

P = "base_model.model.model."
TOKENS = jnp.arange(5, 17, dtype=jnp.int32)[None]
EMBEDDING = "embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return helpers.write_model(tmp_path_factory.mktemp("m") / "m", tie_word_embeddings=False)


def written(base: Path, at: Path, **settings: Any) -> Path:
    """A PEFT directory with factors that do something."""
    model = jlora.load(base)
    choice = {"r": 2, "target_modules": ("q_proj", "up_proj"), "init_lora_weights": False}
    config = jlora.LoraConfig(**{**choice, **settings})
    jlora.inject(model, config, rngs=nnx.Rngs(0))
    jlora.export_peft(at, model, config)
    return at


def configure(at: Path, **changes: Any) -> None:
    file = at / peft.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit(at: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(at / peft.WEIGHTS_FILE)
    tensors = change(tensors) or tensors
    save_file(tensors, at / peft.WEIGHTS_FILE)


def logits(base: Path, at: Path, **options: Any) -> Any:
    return jlora.load_adapter(at, jlora.load(base, **options))(TOKENS)


def refused(base: Path, at: Path) -> str:
    with pytest.raises(JloraError) as caught:
        jlora.load_adapter(at, jlora.load(base))
    assert str(at) in str(caught.value)
    return str(caught.value)


class TestSettings:
    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_one_layer(self, base: Path, tmp_path: Path, layer: int, scan_layers: bool) -> None:
        expected = logits(base, written(base, tmp_path / "a", layers_to_transform=(layer,)))
        configure(tmp_path / "a", layers_to_transform=layer, target_modules=["q_proj", "up_proj"])
        got = logits(base, tmp_path / "a", scan_layers=scan_layers)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert adapters.read(tmp_path / "a").config.layers_to_transform == (layer,)

    def test_no_layers_are_all(self, base: Path, tmp_path: Path) -> None:
        expected = logits(base, written(base, tmp_path / "a"))
        configure(tmp_path / "a", layers_to_transform=[])
        np.testing.assert_array_equal(logits(base, tmp_path / "a"), expected)
        assert jlora.LoraConfig(layers_to_transform=()).layers_to_transform is None

    @pytest.mark.parametrize("pattern", ["layers", ["layers", "h"], "", [], None])
    def test_what_stands_before_a_layers_number(self, base: Path, tmp_path: Path, pattern) -> None:
        expected = logits(base, written(base, tmp_path / "a", layers_to_transform=(1,)))
        choice = {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}
        configure(tmp_path / "a", **choice, layers_pattern=pattern)
        np.testing.assert_array_equal(logits(base, tmp_path / "a"), expected)

    @pytest.mark.parametrize(
        "changes",
        [
            {"fan_in_fan_out": True},
            {"megatron_core": "megatron.core"},
            {"megatron_core": "my.core", "megatron_config": None},
        ],
        ids=str,
    )
    def test_what_changes_nothing(self, base: Path, tmp_path: Path, changes: dict) -> None:
        expected = logits(base, written(base, tmp_path / "a"))
        configure(tmp_path / "a", **changes)
        np.testing.assert_array_equal(logits(base, tmp_path / "a"), expected)

    @pytest.mark.parametrize(
        "changes", [{"r": None}, {"lora_alpha": None}, {"r": None, "lora_alpha": None}], ids=str
    )
    def test_null_is_no_default(self, base: Path, tmp_path: Path, changes: dict) -> None:
        configure(written(base, tmp_path / "a", r=8, lora_alpha=8), **changes)
        assert f"{', '.join(changes)}: null" in refused(base, tmp_path / "a")

    def test_a_layer_is_no_truth(self, base: Path, tmp_path: Path) -> None:
        configure(written(base, tmp_path / "a"), layers_to_transform=True)
        assert "layers_to_transform" in refused(base, tmp_path / "a")


class TestNames:
    @pytest.mark.parametrize("name", ["default", "sql-2"])
    def test_an_adapters_own_is_passed_over(self, base: Path, tmp_path: Path, name: str) -> None:
        settings = {
            "target_modules": ("q_proj", "embed_tokens"), "modules_to_save": ("norm",),
        }  # fmt: skip
        expected = logits(base, written(base, tmp_path / "a", **settings))

        def infix(key: str) -> str:
            key = re.sub(r"(lora_[AB])\.weight", rf"\1.{name}.weight", key)
            key = re.sub(r"(lora_embedding_[AB])", rf"\1.{name}", key)
            return re.sub(r"(model\.norm)\.weight", rf"\1.modules_to_save.{name}.weight", key)

        edit(tmp_path / "a", lambda tensors: {infix(k): v for k, v in tensors.items()})
        assert f"{P}norm.modules_to_save.{name}.weight" in load_file(
            tmp_path / "a/adapter_model.safetensors"
        )
        np.testing.assert_array_equal(logits(base, tmp_path / "a"), expected)

    def test_rows_of_an_embedding(self, base: Path, tmp_path: Path) -> None:
        settings = {"trainable_token_indices": {"embed_tokens": (6, 7)}}
        expected = logits(base, written(base, tmp_path / "a", **settings))
        key = f"{P}embed_tokens.token_adapter.trainable_tokens_delta"

        def infix(name: str) -> str:
            return f"{key}.mine" if name == key else re.sub(r"(lora_[AB])\.", r"\1.mine.", name)

        edit(tmp_path / "a", lambda tensors: {infix(k): v for k, v in tensors.items()})
        assert f"{key}.mine" in load_file(tmp_path / "a" / peft.WEIGHTS_FILE)
        np.testing.assert_array_equal(logits(base, tmp_path / "a"), expected)

    def test_two_adapters_in_one_file(self, base: Path, tmp_path: Path) -> None:
        def twice(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            names = ("one", "two")
            return {re.sub(r"(lora_[AB])\.", rf"\1.{n}.", k): v for k, v in tensors.items()
                    for n in names}  # fmt: skip

        edit(written(base, tmp_path / "a"), twice)
        assert "several adapters, one, two" in refused(base, tmp_path / "a")

    def test_the_same_with_a_name_and_without(self, base: Path, tmp_path: Path) -> None:
        def both(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return tensors | {k.replace("lora_A.", "lora_A.x."): v for k, v in tensors.items()}

        edit(written(base, tmp_path / "a"), both)
        assert "and the same without" in refused(base, tmp_path / "a")

    @pytest.mark.parametrize(
        "changes",
        [
            {"target_modules": ["q_proj", "up_proj", "c_attn"]},
            {"exclude_modules": ["vision_tower"]},
            {"exclude_modules": r".*vision_tower.*"},
            {"rank_pattern": {"c_attn": 4}},
            {"alpha_pattern": {r"^h\.\d+\.c_attn": 4}},
            {"modules_to_save": ["score", "classifier"]},
            {"layers_to_transform": [0, 1, 2, 40], "target_modules": ["q_proj", "up_proj"]},
        ],
        ids=str,
    )
    def test_what_matches_nothing_is_warned_of(
        self, base: Path, tmp_path: Path, changes: dict, caplog
    ) -> None:
        expected = logits(base, written(base, tmp_path / "a"))
        configure(tmp_path / "a", **changes)
        with caplog.at_level(logging.WARNING, "jlora"):
            got = logits(base, tmp_path / "a")
        np.testing.assert_array_equal(got, expected)
        (record,) = caplog.records
        assert next(iter(changes)) in record.getMessage()
        assert "every tensor of its file has a place" in record.getMessage()

    def test_what_matches_nothing_where_tensors_have_no_place(self, base, tmp_path) -> None:
        configure(written(base, tmp_path / "a"), target_modules=["q_proj", "up_prj"])
        said = refused(base, tmp_path / "a")
        assert "target_modules: 'up_prj'; nearest: up_proj" in said
        assert "unexpected: base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in said

    def test_all_targets_match_nothing(self, base: Path, tmp_path: Path) -> None:
        configure(written(base, tmp_path / "a"), target_modules=["c_attn"])
        assert "target_modules: 'c_attn'" in refused(base, tmp_path / "a")


class TestBesides:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_the_bases_own_are_read_past(self, base: Path, tmp_path: Path, dtype: type) -> None:
        expected = logits(base, written(base, tmp_path / "a"))
        own = load_file(base / "model.safetensors")

        def add(tensors: dict[str, np.ndarray]) -> None:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[f"base_model.model.{name}"] = own[name].astype(dtype)

        edit(tmp_path / "a", add)
        np.testing.assert_array_equal(logits(base, tmp_path / "a"), expected)

    def test_those_of_a_tied_model(self, model_dir: Path, tmp_path: Path) -> None:
        expected = logits(model_dir, written(model_dir, tmp_path / "a"))
        table = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            edit(
                tmp_path / "a",
                lambda t, name=name: t.update({f"base_model.model.{name}": table.copy()}),
            )
        np.testing.assert_array_equal(logits(model_dir, tmp_path / "a"), expected)
        edit(tmp_path / "a", lambda t: t.update({"base_model.model.lm_head.weight": table + 1}))
        assert "lm_head.weight differs in 272 of 272 rows" in refused(model_dir, tmp_path / "a")

    def test_others_are_named_and_can_be_saved_modules(self, base: Path, tmp_path: Path) -> None:
        written(base, tmp_path / "a")
        own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        changed = own.copy()
        changed[[6, 9]] += 1
        edit(tmp_path / "a", lambda t: t.update({f"{P}{EMBEDDING}": changed}))
        said = refused(base, tmp_path / "a")
        assert f"{P}{EMBEDDING} differs in 2 of 272 rows" in said
        assert "save_embedding_layers" in said
        model = jlora.load_adapter(tmp_path / "a", jlora.load(base), force=True)
        np.testing.assert_array_equal(model.model.embed_tokens.embedding[...], own)
        configure(tmp_path / "a", modules_to_save=["embed_tokens"])
        model = jlora.load_adapter(tmp_path / "a", jlora.load(base))
        np.testing.assert_array_equal(model.model.embed_tokens.embedding[...], changed)

    def test_a_larger_vocabulary(self, base: Path, tmp_path: Path) -> None:
        larger = np.zeros((280, 32), np.float32)
        edit(written(base, tmp_path / "a"), lambda t: t.update({f"{P}{EMBEDDING}": larger}))
        said = refused(base, tmp_path / "a")
        assert f"{P}{EMBEDDING} is (280, 32), the model's (272, 32)" in said
        assert "resize_token_embeddings" in said


Q0 = "layers.0.self_attn.q_proj.lora_"
REMEDIES: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "ranks": (
        lambda at: configure(at, r=4), "of other ranks than r", ("another model", "saved in part")
    ),
    "a rank pattern": (
        lambda at: configure(at, rank_pattern={"q_proj": 3}), "of other ranks", ("another model",)
    ),
    "targets": (
        lambda at: configure(at, target_modules=["q_proj"]),
        "does not choose model.layers.0.mlp.up_proj",
        ("another model", "saved in part"),
    ),
    "a file in part": (
        lambda at: edit(at, lambda t: t.pop(f"{P}{Q0}B.weight") is None or None),
        "saved in part",
        ("another model", "of other ranks"),
    ),
    "other layers": (
        lambda at: edit(at, lambda t: {k.replace("layers.2.", "layers.9."): v
                                       for k, v in t.items()}),
        "layers of the file are none of this model's",
        ("edited", "saved in part"),
    ),
    "other sizes": (
        lambda at: edit(at, lambda t: t.update({f"{P}{Q0}A.weight": np.zeros((2, 9), np.float32)})),
        "layers of other sizes: the adapter was trained on another model",
        ("edited", "saved in part"),
    ),
    "another kind": (
        lambda at: edit(at, lambda t: t.update(
            {f"{P}layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(32, np.float32)})),
        "another kind of adapter",
        ("edited", "saved in part"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said", "not_said"), REMEDIES.values(), ids=REMEDIES)
def test_the_remedy_is_that_of_the_cause(change, said, not_said, base, tmp_path: Path) -> None:
    written(base, tmp_path / "a")
    change(tmp_path / "a")
    message = refused(base, tmp_path / "a")
    assert said in message
    assert not [words for words in not_said if words in message], message


def test_trained_leaves_are_those_of_the_file(base: Path, tmp_path: Path) -> None:
    """What is passed over leaves nothing behind on the model."""
    written(base, tmp_path / "a")
    configure(tmp_path / "a", target_modules=["q_proj", "up_proj", "c_attn"])
    model = jlora.load_adapter(tmp_path / "a", jlora.load(base))
    trained, _ = injection.partition(model)
    assert len(trained) == len(load_file(tmp_path / "a" / peft.WEIGHTS_FILE)) == 12
