"""PEFT directories: all that is trained goes out and comes in, and what is malformed is refused."""

import dataclasses
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jlora
from jlora import adapters, checkpoint, injection, peft
from jlora.errors import JloraError
from jlora.peft import vllm

P = "base_model.model."
CONFIG = jlora.LoraConfig(
    r=2, lora_alpha=3, target_modules=("lin", "conv", "emb"), rank_pattern={"lin": 3}, bias="all",
    modules_to_save=("head", "norm"), trainable_token_indices={"rows": (4, 1)}, task_type="",
    init_lora_weights=False,
)  # fmt: skip


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.emb, self.rows = (nnx.Embed(6, 4, rngs=rngs) for _ in range(2))
        self.conv = nnx.Conv(4, 4, 3, rngs=rngs)
        self.lin = nnx.LinearGeneral(4, (2, 5), rngs=rngs)
        self.norm = nnx.LayerNorm(10, rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(self.conv(self.emb(tokens) + self.rows(tokens)))
        return self.head(self.norm(self.lin(x).reshape(*tokens.shape, 10)))


TOKENS = jnp.asarray([[0, 1, 2, 3, 4, 5]])


def trained() -> Model:
    """Every trained leaf has moved; rows so little that their difference is exact."""
    model = jlora.inject(Model(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    rng, leaves = np.random.default_rng(0), jlora.partition(model)[0]
    moved = {
        path: leaf + np.float32(0.1) * rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in leaves.items()
    }
    rows = model.rows.embedding[...][jnp.asarray([4, 1])]
    moved["rows/lora_tokens"] = rows * np.float32(1.25) - rows
    injection.update(model, moved)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("peft") / "adapter"
    jlora.export_peft(to, trained(), CONFIG)
    return to


def bits(model: nnx.Module) -> tuple[Any, dict[str, bytes]]:
    leaves, _ = injection.partition(model, everything=True)
    return nnx.graphdef(model), {path: np.asarray(leaf).tobytes() for path, leaf in leaves.items()}


class TestThereAndBack:
    def test_tensors_have_torchs_names_and_axes(self, written: Path) -> None:
        model, tensors = trained(), load_file(written / peft.WEIGHTS_FILE)
        leaves = {path: np.asarray(leaf) for path, leaf in jlora.partition(model)[0].items()}
        expected = {
            "emb.lora_embedding_A": leaves["emb/lora_a"],
            "emb.lora_embedding_B": leaves["emb/lora_b"].T,
            "conv.lora_A.weight": np.einsum("rki->rik", leaves["conv/lora_a"]),
            "conv.lora_B.weight": leaves["conv/lora_b"].T[:, :, None],
            "conv.base_layer.bias": leaves["conv/bias"],
            "lin.lora_A.weight": leaves["lin/lora_a"],
            "lin.lora_B.weight": leaves["lin/lora_b"].reshape(3, 10).T,
            "lin.base_layer.bias": leaves["lin/bias"].reshape(10),
            "norm.weight": leaves["norm/scale"],
            "norm.bias": leaves["norm/bias"],
            "head.weight": leaves["head/kernel"].T,
            "head.bias": leaves["head/bias"],
            "rows.token_adapter.trainable_tokens_delta": leaves["rows/lora_tokens"]
            + np.asarray(model.rows.embedding[...])[[4, 1]],
        }
        assert tensors.keys() == {P + key for key in expected}
        for key, value in expected.items():
            np.testing.assert_array_equal(tensors[P + key], value, key)

    def test_same_bits(self, written: Path, tmp_path: Path) -> None:
        model = jlora.load_adapter(written, Model(nnx.Rngs(0)))
        for path, leaf in jlora.partition(trained())[0].items():
            np.testing.assert_array_equal(jlora.partition(model)[0][path], leaf, path)
        np.testing.assert_array_equal(model(TOKENS), trained()(TOKENS))
        config = adapters.read(written).config
        jlora.export_peft(tmp_path / "again", model, config)
        for name in (peft.WEIGHTS_FILE, peft.CONFIG_FILE):
            assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()

    def test_settings(self, written: Path) -> None:
        said = json.loads((written / peft.CONFIG_FILE).read_text())
        assert said["bias"] == "all"
        assert said["task_type"] is None
        assert said["modules_to_save"] == ["head", "norm"]
        assert said["trainable_token_indices"] == {"rows": [4, 1]}
        assert "ensure_weight_tying" not in said

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8), st.booleans())
    def test_rows_come_back_to_one_unit(self, values: list[float], near: bool) -> None:
        """What replaces a row is kept as a difference: exact within a factor of two of the row."""
        base = np.asarray(values, np.float32).reshape(2, 4)
        rows = base * np.float32(1.7) if near else base[::-1].copy()
        entry = peft.tensors.Entry("k", "p", (2, 4), (0, 1), (2, 4), base="b", rows=(0, 1))
        again = entry.to_torch(entry.from_torch(rows, lambda _: base), lambda _: base)
        if near:
            np.testing.assert_array_equal(again, rows)
        largest = np.maximum(np.abs(rows), np.abs(base))
        assert (np.abs(again - rows) <= np.spacing(largest)).all()

    def test_bfloat16_is_read_as_the_same_numbers(self, written: Path, tmp_path: Path) -> None:
        tensors = load_file(written / peft.WEIGHTS_FILE)
        half = {key: tensor.astype(jnp.bfloat16) for key, tensor in tensors.items()}
        shutil.copytree(written, tmp_path / "half")
        save_file(half, tmp_path / "half" / peft.WEIGHTS_FILE)
        stored = peft.fit(peft.read_peft(tmp_path / "half"), Model(nnx.Rngs(0)))
        lin_a = stored.factors["lin/lora_a"]
        assert lin_a.dtype == jnp.float32
        np.testing.assert_array_equal(lin_a, half[f"{P}lin.lora_A.weight"].astype(np.float32))

    def test_shapes_alone_do_where_no_row_is_needed(self, written: Path) -> None:
        abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
        with pytest.raises(JloraError, match=r"rows/embedding: the base's own values are needed"):
            peft.fit(peft.read_peft(written), abstract)
        rows = np.asarray(Model(nnx.Rngs(0)).rows.embedding[...])
        stored = peft.fit(peft.read_peft(written), abstract, weights=lambda path: rows)
        expected = jlora.partition(trained())[0]["rows/lora_tokens"]
        np.testing.assert_array_equal(stored.factors["rows/lora_tokens"], expected)


class TestSubdirectories:
    def test_the_only_one_is_taken(self, written: Path, tmp_path: Path) -> None:
        shutil.copytree(written, tmp_path / "named")
        assert adapters.read(tmp_path).where == str(tmp_path / "named")
        jlora.import_peft(tmp_path, Model(nnx.Rngs(0)))

    def test_several_are_listed(self, written: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            shutil.copytree(written, tmp_path / name)
        for read in (adapters.read, peft.read_peft):
            with pytest.raises(
                JloraError, match=r"several adapters, one, two: give one, as .*one$"
            ):
                read(tmp_path)
        assert adapters.read(tmp_path / "two").config.r == 2
        shutil.copy(written / peft.CONFIG_FILE, tmp_path)  # the default one, and others
        shutil.copy(written / peft.WEIGHTS_FILE, tmp_path)
        assert adapters.read(tmp_path).where == str(tmp_path)


class Named(nnx.Module):
    """Ends of names that mean more to PEFT, which matches them without a dot."""

    def __init__(self, rngs: nnx.Rngs):
        self.out, self.head, self.subhead = (nnx.Linear(2, 2, rngs=rngs) for _ in range(3))
        self.q = nnx.Linear(2, 2, rngs=rngs)


@pytest.mark.parametrize(
    ("saved", "more"), [("head", "subhead"), ("out", "q.lora_dropout"), ("subhead", None)]
)
def test_saved_modules_are_those_that_peft_finds(saved, more, tmp_path: Path) -> None:
    config = jlora.LoraConfig(r=1, target_modules=["q"], modules_to_save=[saved])
    model = jlora.inject(Named(nnx.Rngs(0)), config, rngs=nnx.Rngs(0))
    if more is None:
        jlora.export_peft(tmp_path / "p", model, config)
        return
    with pytest.raises(JloraError, match=f"that of {saved} would also be {more}; keep the adapter"):
        jlora.export_peft(tmp_path / "p", model, config)
    assert not (tmp_path / "p").exists()


class Odd(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **how: Any):
        self.lin, self.emb = nnx.Linear(4, 4, rngs=rngs), nnx.Embed(4, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, 3, rngs=rngs, **how)
        self.experts = nnx.Einsum("NTD,NDE->NTE", (2, 4, 3), rngs=rngs)


@pytest.mark.parametrize(
    ("how", "config", "reason"),
    [
        ({"feature_group_count": 2}, {}, "conv: a convolution in groups, whose update in PEFT"),
        ({"kernel_dilation": 2}, {}, "conv: a convolution with kernel_dilation, which PEFT's"),
        ({"padding": "CIRCULAR"}, {}, "conv: a convolution with padding CIRCULAR"),
        ({"mask": jnp.ones((3, 4, 4))}, {}, "conv: a convolution with a mask"),
        ({}, {"target_modules": ("experts",)}, "experts: experts, each with factors of its own"),
        ({}, {"target_modules": ("lin",), "modules_to_save": ("experts",)}, "weights of experts"),
        (
            {},
            {"target_modules": ("emb",), "trainable_token_indices": {"emb": (1,)}},
            "emb: PEFT trains rows of an embedding",
        ),
        (
            {},
            {"exclude_modules": ("lin",), "target_modules": ("lin",), "modules_to_save": ("emb",)},
            "no layer is adapted",
        ),
    ],
)
def test_what_the_format_has_no_place_for(how, config, reason, tmp_path: Path) -> None:
    lora = jlora.LoraConfig(**{"target_modules": ("conv",), "r": 1} | config)
    model = jlora.inject(Odd(nnx.Rngs(0), **how), lora, rngs=nnx.Rngs(0))
    with pytest.raises(JloraError, match="the PEFT format has no place for:") as caught:
        jlora.export_peft(tmp_path / "p", model, lora)
    assert reason in str(caught.value)
    assert "keep the adapter with jlora.save_adapter" in str(caught.value)


def with_settings(**changes: Any) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        file = at / peft.CONFIG_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def with_tensor(key: str, new: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        tensors = load_file(at / peft.WEIGHTS_FILE)
        tensors[key] = np.ascontiguousarray(new(tensors[key]))
        save_file(tensors, at / peft.WEIGHTS_FILE)

    return change


def test_copies_are_of_the_base_and_not_of_what_is_trained(written: Path, tmp_path: Path) -> None:
    """PEFT saves the base's own bias of a module that is saved whole, with bias="all"."""
    shutil.copytree(written, tmp_path / "p")
    key = f"{P}head.original_module.bias"
    tensors = load_file(written / peft.WEIGHTS_FILE)
    base, own = np.zeros(3, np.float32), tensors[f"{P}head.bias"]
    for copy, fits in ((base, True), (own, False)):
        save_file(tensors | {key: copy}, tmp_path / "p" / peft.WEIGHTS_FILE)
        for model in (Model(nnx.Rngs(0)), trained()):
            if fits:
                jlora.load_adapter(tmp_path / "p", model)
            else:
                with pytest.raises(JloraError, match="base weights of head that are not this mode"):
                    jlora.load_adapter(tmp_path / "p", model)


class Fused(nnx.Module):
    """Query, key and value in one kernel of 8 + 4 + 4 outputs."""

    fused_layers: ClassVar = {"qkv": {"q": 8, "k": 4, "v": 4}}

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Dict(qkv=nnx.Linear(4, 16, rngs=rngs)) for _ in range(2)])
        self.out = nnx.Linear(4, 4, rngs=rngs)


class TestFused:
    CONFIG = jlora.LoraConfig(
        r=2, lora_alpha=3, target_modules=("qkv", "out"), bias="all", init_lora_weights=False,
        rank_pattern={r"layers\.1\.qkv": 3}, alpha_pattern={r"layers\.0\.qkv": 5},
    )  # fmt: skip

    @pytest.fixture
    def fused(self, tmp_path: Path) -> tuple[Fused, Path]:
        model = jlora.inject(Fused(nnx.Rngs(0)), self.CONFIG, rngs=nnx.Rngs(1))
        leaves = jlora.partition(model)[0]
        injection.update(model, {p: x + jnp.arange(x.shape[-1]) for p, x in leaves.items()})
        jlora.export_peft(tmp_path / "p", model, self.CONFIG)
        return model, tmp_path / "p"

    def test_its_parts_have_their_own_rows(self, fused) -> None:
        model, at = fused
        tensors, leaves = load_file(at / peft.WEIGHTS_FILE), jlora.partition(model)[0]
        said = json.loads((at / peft.CONFIG_FILE).read_text())
        assert said["target_modules"] == ["k", "out", "q", "v"]
        assert said["rank_pattern"] == {f"layers.1.{n}": 3 for n in "qkv"}
        assert said["alpha_pattern"] == {f"layers.0.{n}": 5 for n in "qkv"}
        b = np.asarray(leaves["layers/1/qkv/lora_b"]).T
        for part, rows in (("q", slice(0, 8)), ("k", slice(8, 12)), ("v", slice(12, 16))):
            key = f"{P}layers.1.{part}"
            np.testing.assert_array_equal(
                tensors[f"{key}.lora_A.weight"], leaves["layers/1/qkv/lora_a"]
            )
            np.testing.assert_array_equal(tensors[f"{key}.lora_B.weight"], b[rows])
            np.testing.assert_array_equal(
                tensors[f"{key}.base_layer.bias"], leaves["layers/1/qkv/bias"][rows]
            )
        assert len(tensors) == 2 * 3 * 3 + 3

    def test_they_are_joined_again(self, fused) -> None:
        model, at = fused
        again = jlora.load_adapter(at, Fused(nnx.Rngs(0)))
        assert injection.scalings(again) == injection.scalings(model)
        for path, leaf in jlora.partition(model)[0].items():
            np.testing.assert_array_equal(jlora.partition(again)[0][path], leaf, path)

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (with_tensor(f"{P}layers.0.k.lora_A.weight", lambda x: x + 1), "factor A of its own"),
            (with_tensor(f"{P}layers.0.k.lora_B.weight", lambda x: x[:3]), "missing: "),
            (with_settings(rank_pattern={r"layers\.1\.q": 3}), "are not adapted alike"),
            (with_settings(target_modules=["qkv"]), "target_modules: 'qkv'; nearest: "),
        ],
    )
    def test_parts_that_do_not_join(self, fused, change, part) -> None:
        change(fused[1])
        model = Fused(nnx.Rngs(0))
        before = bits(model)
        with pytest.raises(JloraError, match=re.escape(part)):
            jlora.load_adapter(fused[1], model)
        assert bits(model) == before


class TestVllm:
    @pytest.mark.parametrize(
        ("config", "rank"),
        [
            ({"r": 1}, 1),
            ({"r": 9, "lora_alpha": 3}, 16),
            ({"r": 2, "lora_alpha": 2, "rank_pattern": {"lin": 300}, "alpha_pattern": {"lin": 300}},
             320),
            ({"r": 17, "use_rslora": True}, 32),
        ],
    )  # fmt: skip
    def test_the_rank_that_a_server_needs(self, config, rank, recwarn) -> None:
        lora = jlora.LoraConfig(target_modules=("lin", "head"), **config)
        assert vllm.max_lora_rank(lora, injection.plan(Model(nnx.Rngs(0)), lora)) == rank

    def test_every_reason_at_once(self, recwarn) -> None:
        lora = dataclasses.replace(CONFIG, r=600)
        with pytest.raises(JloraError) as caught:
            vllm.max_lora_rank(lora, injection.plan(Model(nnx.Rngs(0)), lora))
        for part in (
            "bias = 'all': no biases are served; train with bias = 'none'",
            "modules_to_save = ['head', 'norm']: only factors",
            "trainable_token_indices: most versions",
            "conv: convolutions have no factors there",
            "at 1 layers (alpha, rank), lin (3, 3) among them",
            "rank 600: 512 is the largest",
        ):
            assert part in str(caught.value)


# What is refused ----------------------------------------------------------------------------------


def with_tensors(**changes: Any) -> Callable[[Path], None]:
    """Tensors by name ("__" for "."), or what makes one of the old; None takes it away."""

    def change(at: Path) -> None:
        file = at / peft.WEIGHTS_FILE
        tensors = load_file(file)
        for name, new in changes.items():
            key = P + name.replace("__", ".")
            old = tensors.pop(key, None)
            if new is not None:
                tensors[key] = np.ascontiguousarray(new(old) if callable(new) else new)
        save_file(tensors, file)

    return change


def named(key: str) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        tensors = load_file(at / peft.WEIGHTS_FILE)
        save_file(tensors | {key: np.ones(2, np.float32)}, at / peft.WEIGHTS_FILE)

    return change


def header(entry: dict[str, Any], payload: bytes = b"") -> Callable[[Path], None]:
    """A file whose header declares one tensor."""

    def change(at: Path) -> None:
        text = json.dumps({f"{P}lin.lora_A.weight": entry}).encode()
        (at / peft.WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + payload)

    return change


def content(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        file = at / name
        file.write_bytes(data(file.read_bytes()) if callable(data) else data)

    return change


def pickled(at: Path) -> None:
    (at / peft.WEIGHTS_FILE).unlink()
    (at / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def a_directory(at: Path) -> None:
    (at / peft.WEIGHTS_FILE).unlink()
    (at / peft.WEIGHTS_FILE).mkdir()


def poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        old = old.copy()
        old.flat[1] = value
        return old

    return change


W, C = peft.WEIGHTS_FILE, peft.CONFIG_FILE
LIN_A, LIN_B = "lin__lora_A__weight", "lin__lora_B__weight"
NO_FILE = "is truncated or no safetensors file"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated tensors": (content(W, lambda data: data[:-5]), NO_FILE),
    "truncated header": (content(W, lambda data: data[:30]), NO_FILE),
    "empty file": (content(W, b""), NO_FILE),
    "bytes after the end": (content(W, lambda data: data + b"\0" * 8), NO_FILE),
    "a pickle under the name": (content(W, pickle.dumps({"a": 1})), NO_FILE),
    "a pickle": (pickled, "does not exist; pickled adapters (.bin) are not read"),
    "a directory for a file": (a_directory, "does not exist; pickled"),
    "a huge shape": (
        header({"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}),
        NO_FILE,
    ),
    "a huge shape of few bytes": (
        header({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}, b"\0" * 4),
        NO_FILE,
    ),
    "a huge shape of no bytes": (
        header({"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}),
        "array is too big",
    ),
    "a shape that overflows": (
        header({"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 0]}),
        NO_FILE,
    ),
    "a negative shape": (
        header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, b"\0" * 4),
        NO_FILE,
    ),
    "an unknown dtype": (
        header({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, b"\0" * 4),
        NO_FILE,
    ),
    "integers": (
        with_tensors(**{LIN_A: lambda old: old.astype(np.int32)}),
        "lin.lora_A.weight (I32): an adapter's tensors are floats",
    ),
    "booleans": (with_tensors(norm__bias=lambda old: old > 0), "norm.bias (BOOL): an adapter's"),
    "8-bit floats": (
        with_tensors(norm__bias=lambda old: old.astype(jnp.float8_e4m3fn)),
        "norm.bias (F8_E4M3): an adapter's",
    ),
    "NaN": (with_tensors(**{LIN_B: poisoned(np.nan)}), "not finite: base_model.model.lin.lora_B."),
    "infinity": (with_tensors(head__bias=poisoned(np.inf)), "not finite: base_model.model.head."),
    "too large for float32": (
        with_tensors(head__bias=lambda old: old.astype(np.float64) + 1e300),
        "not finite: base_model.model.head.bias",
    ),
    "missing factor": (
        with_tensors(**{LIN_A: None}),
        "missing: base_model.model.lin.lora_A.weight",
    ),
    "missing bias": (
        with_tensors(conv__base_layer__bias=None),
        "missing: base_model.model.conv.base_layer.bias (4,)",
    ),
    "missing rows": (
        with_tensors(rows__token_adapter__trainable_tokens_delta=None),
        "missing: base_model.model.rows.token_adapter.trainable_tokens_delta (2, 4)",
    ),
    "missing saved weight": (
        with_tensors(head__weight=None),
        "missing: base_model.model.head.weight (3, 10)",
    ),
    "extra factor": (
        with_tensors(head__lora_A__weight=np.ones((2, 10), np.float32)),
        "unexpected: base_model.model.head.lora_A.weight (2, 10)",
    ),
    "extra magnitude": (
        with_tensors(lin__lora_magnitude_vector=np.ones(10, np.float32)),
        "unexpected: base_model.model.lin.lora_magnitude_vector (10,)",
    ),
    "transposed factor": (
        with_tensors(**{LIN_B: lambda old: old.T}),
        "lin.lora_B.weight is (3, 10), expected (10, 3)",
    ),
    "transposed embedding": (
        with_tensors(emb__lora_embedding_A=lambda old: old.T),
        "emb.lora_embedding_A is (6, 2), expected (2, 6)",
    ),
    "channels last": (
        with_tensors(conv__lora_A__weight=lambda old: old.swapaxes(1, 2)),
        "conv.lora_A.weight is (2, 3, 4), expected (2, 4, 3)",
    ),
    "a linear factor for a convolution": (
        with_tensors(conv__lora_B__weight=lambda old: old[..., 0]),
        "conv.lora_B.weight is (4, 2), expected (4, 2, 1)",
    ),
    "one number": (with_tensors(**{LIN_A: lambda old: old[0, :1]}), "is (1,), expected (3, 4)"),
    "other rank in the settings": (
        with_settings(r=4),
        "conv.lora_A.weight is (2, 4, 3), expected (4",
    ),
    "other rank in a pattern": (
        with_settings(rank_pattern={"lin": 1}),
        "is (3, 4), expected (1, 4)",
    ),
    "other number of rows": (
        with_settings(trainable_token_indices={"rows": [1]}),
        "trainable_tokens_delta is (2, 4), expected (1, 4)",
    ),
    "climbing out of the directory": (
        named(f"{P}../../etc/passwd.lora_A.weight"),
        "are no adapter's",
    ),
    "an absolute path": (named("/etc/passwd"), "are no adapter's"),
    "another name for a layer": (named(f"{P}lin/lora_a"), "are no adapter's"),
    "an empty component": (named(f"{P}lin..lora_A.weight"), "are no adapter's"),
    "a control character": (named(f"{P}lin.\0lora_A.weight"), "are no adapter's"),
    "no prefix": (named("lin.lora_A.weight"), "are no adapter's"),
    "settings cut short": (content(C, lambda data: data[:-20]), "is not JSON"),
    "settings of bytes": (content(C, b"\xff\xfe\0"), "is not JSON"),
    "settings that nest": (content(C, b"[" * 100_000), "is not JSON"),
    "settings that are a list": (content(C, b"[]"), "holds no JSON object"),
    "no settings": (lambda at: (at / C).unlink(), "holds no adapter"),
    "another method": (with_settings(peft_type="LOHA"), "peft_type is 'LOHA', only 'LORA' is read"),
    "DoRA": (with_settings(use_dora=True), "not supported: use_dora = True"),
    "experts": (with_settings(target_parameters=["w"]), "not supported: target_parameters = ['w']"),
    "replicated layers": (
        with_settings(layer_replication=[[0, 1]]),
        "layer_replication = [[0, 1]]",
    ),
    "PiSSA": (with_settings(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "from the future": (with_settings(warp=9), "not supported: warp = 9"),
    "no targets": (with_settings(target_modules=None), "target_modules is None, which leaves the"),
    "targets that are not there": (
        with_settings(target_modules=["q_proj"]),
        "target_modules: 'q_proj'; nearest: ",
    ),
    "targets that are no expression": (
        with_settings(target_modules="lin("),
        "no regular expression",
    ),
    "an expression that overflows": (
        with_settings(target_modules="a{99999999999}"),
        "no regular expression",
    ),
    "a rank of words": (with_settings(r="two"), "'r': "),
    "a negative rank": (with_settings(r=-1), "r must be a positive integer, got -1"),
    "a rank beyond everything": (with_settings(r=10**12), "r: a number beyond"),
    "an alpha beyond everything": (
        with_settings(alpha_pattern={"lin": 10**400}),
        "a number beyond",
    ),
    "an alpha that is none": (
        with_settings(lora_alpha=float("nan")),
        "lora_alpha must be positive",
    ),
    "a dropout of all": (with_settings(lora_dropout=1), "lora_dropout must be in [0, 1)"),
    "a bias of another kind": (with_settings(bias="most"), "'bias': "),
    "rows that are not there": (
        with_settings(trainable_token_indices={"rows": [4, 6]}),
        "[6] are no rows of rows, which has 6",
    ),
    "rows named twice": (with_settings(trainable_token_indices={"rows": [1, 1]}), "more than once"),
    "rows of no embedding": (
        with_settings(trainable_token_indices={"lin": [4, 1]}),
        "no embedding 'lin'",
    ),
    "a saved module that is not there": (
        with_settings(modules_to_save=["hat"]),
        "modules_to_save: 'hat'; nearest: ",
    ),
    "settings in settings": (
        content(C, lambda data: data.replace(b"{", b'{"x": %b%b,' % (b"[" * 400, b"]" * 400), 1)),
        "is nested more than 50 deep",
    ),
    "a base of its own": (
        with_tensors(emb__base_layer__weight=np.ones((6, 4), np.float32)),
        "comes with base weights of emb that are not this model's",
    ),
    "a copy that differs": (
        with_tensors(head__modules_to_save__bias=np.ones(3, np.float32)),
        "should repeat base_model.model.head.bias, and differ",
    ),
}


@pytest.mark.parametrize(("change", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_malformed_is_refused(change, part, written: Path, tmp_path: Path) -> None:
    at = tmp_path / "adapter"
    shutil.copytree(written, at)
    change(at)
    for model in (Model(nnx.Rngs(0)), trained()):
        before = bits(model)
        with pytest.raises(JloraError) as caught:
            jlora.load_adapter(at, model)
        assert part in str(caught.value)
        assert str(at) in str(caught.value)
        assert bits(model) == before


def orbax_with(**changes: Any) -> Callable[[Path], None]:
    """An adapter checkpoint with other leaves ("__" for "/") or settings."""

    def make(at: Path) -> None:
        stored = checkpoint.gather(trained(), CONFIG)
        config = dataclasses.replace(CONFIG, **changes.pop("config", {}))
        leaves = dict(stored.factors)
        for name, new in changes.items():
            path = name.replace("__", "/")
            old = leaves.pop(path, None)
            if new is not None:
                leaves[path] = new(old)
        dataclasses.replace(stored, config=config, factors=leaves).save(at)

    return make


def damaged(item: str) -> Callable[[Path], None]:
    def make(at: Path) -> None:
        orbax_with()(at)
        for file in (at / item).rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:3])

    return make


def meta(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def make(at: Path) -> None:
        orbax_with()(at)
        file = next((at / "meta").glob("*"))
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return make


def without(key: str) -> Callable[[dict], dict]:
    return lambda values: {k: v for k, v in values.items() if k != key}


ORBAX = {
    "no settings": (meta(lambda _: []), "meta holds no JSON object"),
    "settings of no method": (meta(without("method")), "is damaged or incomplete ('method')"),
    "settings of no LoRA": (meta(without("lora")), "is damaged or incomplete ('lora')"),
    "leaves cut short": (damaged("adapters"), "is damaged or incomplete"),
    "settings cut short": (damaged("meta"), "is damaged or incomplete"),
    "a missing leaf": (orbax_with(lin__lora_a=None), "missing: lin/lora_a (3, 4)"),
    "an extra leaf": (orbax_with(x__lora_a=lambda _: jnp.ones(2)), "unexpected: x/lora_a (2,)"),
    "a transposed leaf": (orbax_with(emb__lora_a=lambda x: x.T), "emb/lora_a is (6, 2), expected"),
    "NaN": (orbax_with(head__bias=lambda x: x * jnp.nan), "not finite: head/bias"),
    "integers": (orbax_with(head__bias=lambda x: x.astype(jnp.int32)), "no floats: head/bias"),
    "another rank": (orbax_with(config={"r": 5}), "conv/lora_a is (2, 3, 4), expected (5, 3, 4)"),
}


@pytest.mark.parametrize(("make", "part"), ORBAX.values(), ids=ORBAX)
def test_malformed_checkpoints_are_refused(make, part, tmp_path: Path) -> None:
    make(tmp_path / "adapter")
    model = Model(nnx.Rngs(0))
    before = bits(model)
    with pytest.raises(JloraError) as caught:
        jlora.load_adapter(tmp_path / "adapter", model)
    assert part in str(caught.value)
    assert str(tmp_path / "adapter") in str(caught.value)
    assert bits(model) == before


# Whatever is done to the files --------------------------------------------------------------------

KEYS = [*peft.config._READ, *sorted(peft.config._INERT), "use_dora", "loftq_config", "new"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["all", "lora_only", "lin", "conv", "emb", "(", "[a", ".*", "a{9999999999}"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3) | st.sampled_from(["lin", "rows"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return trained()


def outcome(at: Path, model: Model) -> None:
    """A load that fails leaves every bit; one that succeeds has the values of the file."""
    before = bits(model)
    try:
        stored = peft.fit(peft.read_peft(at), model)
        jlora.load_adapter(at, model)
    except JloraError:
        assert bits(model) == before
        return
    for path, leaf in jlora.partition(model)[0].items():
        np.testing.assert_array_equal(leaf, stored.factors[path])


FUZZ = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_any_settings(written: Path, tmp_path: Path, model: Model, changes: dict) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with_settings(**changes)(tmp_path)
    outcome(tmp_path, model)


@FUZZ
@given(st.sampled_from([W, C]), st.data())
def test_any_bytes(written: Path, tmp_path: Path, model: Model, name: str, data: Any) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    whole = bytearray((written / name).read_bytes())
    # Most of what decides lies in the header.
    for at in data.draw(st.lists(st.integers(0, min(len(whole), 1200) - 1), max_size=4)):
        whole[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789[],{}":.')))
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    (tmp_path / name).write_bytes(bytes(whole[:cut]))
    outcome(tmp_path, model)


@FUZZ
@given(st.data())
def test_any_tensors(written: Path, tmp_path: Path, model: Model, data: Any) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    tensors = load_file(written / W)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(key)
        part = st.text(max_size=3) | st.sampled_from(["lin", "lora_A", "weight", "..", "a/b"])
        how = data.draw(st.sampled_from(["gone", "renamed", "dtype", "shape", "value"]))
        if how == "renamed":
            tensors[P + ".".join(data.draw(st.lists(part, min_size=1, max_size=4)))] = tensor
        elif how == "dtype":
            other = [np.float16, np.float64, np.int8, np.uint64, np.bool_, jnp.bfloat16]
            tensors[key] = tensor.astype(data.draw(st.sampled_from(other)))
        elif how == "shape":
            shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
            tensors[key] = np.zeros(shape, np.float32)
        elif how == "value" and tensor.size:
            tensors[key] = tensor + np.asarray(data.draw(st.floats(width=16))).astype(tensor.dtype)
        if not tensors:
            break
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / W)
    outcome(tmp_path, model)
