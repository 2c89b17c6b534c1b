"""Adapters on disk: what is saved is what is read, and what does not fit is refused whole."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora import adapter, adapters, canonical, checkpoint, injection, peft
from jlora.config import LoraConfig
from jlora.errors import JloraError

CONFIG = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, lora_dropout=0.1)
OTHER = dataclasses.replace(CONFIG, target_modules=("layers.1", "lm_head"), use_rslora=True)


def injected(config: LoraConfig = CONFIG, *, stacked: bool = False, seed: int = 5) -> Mlp:
    return jlora.inject(Mlp(nnx.Rngs(0), stacked=stacked), config, rngs=nnx.Rngs(seed))


def factors(model: nnx.Module) -> dict[str, np.ndarray]:
    """In the canonical form."""
    trained, _ = jlora.partition(model)
    flat = canonical.unstack(trained, injection.stacks(model))
    return {path: np.array(leaf) for path, leaf in sorted(flat.items())}


def everything(model: nnx.Module) -> tuple[Any, dict[str, np.ndarray]]:
    leaves, _ = injection.partition(model, everything=True)
    return nnx.graphdef(model), {path: np.array(leaf) for path, leaf in leaves.items()}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def orbax(path: Path, config: LoraConfig = CONFIG, *, stacked: bool = False) -> Path:
    jlora.save_adapter(path, injected(config, stacked=stacked), config)
    return path


def exported(path: Path, config: LoraConfig = CONFIG, *, stacked: bool = False) -> Path:
    jlora.export_peft(path, injected(config, stacked=stacked), config, base_model="org/base")
    return path


FORMATS = pytest.mark.parametrize("write", [orbax, exported])


class TestRoundTrips:
    @pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "injected"])
    @pytest.mark.parametrize(
        ("saved", "loaded"), [(False, False), (False, True), (True, False), (True, True)]
    )
    @FORMATS
    def test_same_bits(self, write: Callable, saved: bool, loaded: bool, fresh: bool, tmp_path):
        to = write(tmp_path / "adapter", stacked=saved)
        original = injected(stacked=saved)
        model = Mlp(nnx.Rngs(0), stacked=loaded) if fresh else injected(stacked=loaded, seed=9)
        base = {path: leaf for path, leaf in everything(model)[1].items() if "lora_" not in path}
        assert jlora.load_adapter(to, model) is model
        assert_same(factors(model), factors(original))
        after = everything(model)[1]
        assert_same({path: after[path] for path in base}, base)
        assert injection.scalings(model) == injection.scalings(injected(stacked=loaded))

    def test_orbax_keeps_the_configuration(self, tmp_path: Path) -> None:
        stored = checkpoint.read_adapter(orbax(tmp_path / "a", OTHER))
        assert stored.config == OTHER
        assert sorted(stored.factors) == [
            f"{layer}/lora_{x}" for layer in ("layers/1", "lm_head") for x in "ab"
        ]
        meta = json.loads(next((tmp_path / "a" / "meta").glob("*")).read_text())
        assert meta["schema_version"] == checkpoint.SCHEMA_VERSION == 1

    def test_import_peft(self, tmp_path: Path) -> None:
        model = Mlp(nnx.Rngs(0))
        jlora.import_peft(exported(tmp_path / "p", OTHER), model)
        assert_same(factors(model), factors(injected(OTHER)))
        assert injection.scalings(model) == injection.scalings(injected(OTHER))
        with pytest.raises(JloraError, match=r"adapter_config\.json does not exist"):
            jlora.import_peft(orbax(tmp_path / "o"), Mlp(nnx.Rngs(0)))

    def test_a_finished_run_is_read(self, tmp_path: Path) -> None:
        exported(tmp_path / "run" / "adapter")
        model = Mlp(nnx.Rngs(0))
        jlora.load_adapter(tmp_path / "run", model)
        assert_same(factors(model), factors(injected()))

    def test_a_run_is_read_at_its_newest_checkpoint(self, tmp_path: Path) -> None:
        for step, r in ((9, 2), (10, 4)):
            orbax(tmp_path / "run" / "checkpoints" / str(step), dataclasses.replace(CONFIG, r=r))
        (tmp_path / "run" / "checkpoints" / "11.tmp").mkdir()
        assert adapters.read(tmp_path / "run").config.r == 4

    def test_an_export_replaces_the_one_before(self, tmp_path: Path) -> None:
        exported(tmp_path / "p", OTHER)
        exported(tmp_path / "p")
        assert {file.name for file in (tmp_path / "p").iterdir()} == {
            peft.CONFIG_FILE, peft.WEIGHTS_FILE,
        }  # fmt: skip
        assert adapters.read(tmp_path / "p").config.r == 3


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_restack_is_the_inverse_of_unstack(data: st.DataObject) -> None:
    stacks = {f"s{i}": n for i, n in enumerate(data.draw(st.lists(st.integers(1, 12), max_size=3)))}
    flat = {}
    for name in data.draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
        shape = data.draw(st.lists(st.integers(1, 3), max_size=2))
        for stack, size in ({"": 0} | stacks).items():
            full = (size, *shape) if stack else tuple(shape)
            values = np.random.default_rng(len(flat)).normal(size=full).astype(np.float32)
            flat[f"{stack}/{name}/kernel" if stack else f"{name}/kernel"] = values
    unrolled = canonical.unstack(flat, stacks)
    assert len(unrolled) == sum(stacks.get(path.split("/")[0], 1) for path in flat)
    for path, leaf in flat.items():
        for i in range(stacks.get(path.split("/")[0], 0)):
            stack, rest = path.split("/", 1)
            np.testing.assert_array_equal(unrolled[f"{stack}/{i}/{rest}"], leaf[i])
    order = data.draw(st.permutations(list(unrolled)))
    again = canonical.restack({path: unrolled[path] for path in order}, stacks)
    assert_same({path: np.asarray(leaf) for path, leaf in again.items()}, flat)


def test_a_stack_that_lacks_layers() -> None:
    layers = {f"s/{i}/k": np.zeros(2) for i in (0, 2)}
    with pytest.raises(JloraError, match=r"s/k: layers \[1, 3\] of 4 are absent"):
        canonical.restack(layers, {"s": 4})


@pytest.mark.parametrize(
    ("shapes", "lists"),
    [
        ({"m/layers/0/a": (2, 3), "m/layers/1/a": (2, 3), "head/a": (1,)}, {"m/layers": 2}),
        ({"m/layers/0/a": (2, 3), "m/layers/1/a": (4, 3)}, {}),  # another rank
        ({"m/layers/0/a": (2, 3), "m/layers/1/b": (2, 3)}, {}),  # another site
        ({"m/layers/1/a": (2, 3), "m/layers/2/a": (2, 3)}, {}),  # layers_to_transform
        ({"m/layers/0/a": (2,), "m/layers/1/a": (2,), "m/layers/norm/a": (2,)}, {}),
        ({"e/0/x/0/a": (2,), "e/0/x/1/a": (2,), "e/1/x/0/a": (2,), "e/1/x/1/a": (2,)}, {"e": 2}),
        ({"e/0/a": (2,), "d/0/a": (2,), "d/1/a": (2,), "e/1/a": (2,), "e/2/a": (2,)},
         {"e": 3, "d": 2}),
        ({"0/a": (2,), "1/a": (2,)}, {}),
        ({f"e/{i}/a": (2,) for i in range(12)}, {"e": 12}),
    ],
)  # fmt: skip
def test_lists_of_like_layers(shapes: dict, lists: dict) -> None:
    flat = {path: np.full(shape, i, np.float32) for i, (path, shape) in enumerate(shapes.items())}
    assert canonical.layer_lists(flat) == lists
    stacked = canonical.restack(flat, lists)
    assert len(stacked) == len(flat) - sum(
        len([p for p in flat if p.startswith(f"{path}/")]) * (n - 1) // n
        for path, n in lists.items()
    )
    assert_same({p: np.asarray(v) for p, v in canonical.unstack(stacked, lists).items()}, flat)


class TestPeftFiles:
    def test_tensors(self, tmp_path: Path) -> None:
        exported(tmp_path, OTHER)
        original = factors(injected(OTHER))
        with safe_open(tmp_path / peft.WEIGHTS_FILE, framework="np") as file:
            assert file.metadata().keys() == {"format", "jlora"}
            assert file.metadata()["format"] == "pt"
        tensors = load_file(tmp_path / peft.WEIGHTS_FILE)
        prefix = "base_model.model."
        assert {key: tensor.shape for key, tensor in tensors.items()} == {
            f"{prefix}layers.1.lora_A.weight": (3, 8),
            f"{prefix}layers.1.lora_B.weight": (8, 3),
            f"{prefix}lm_head.lora_A.weight": (3, 8),
            f"{prefix}lm_head.lora_B.weight": (5, 3),
        }
        for key, tensor in tensors.items():
            layer, factor, _ = key.removeprefix(prefix).rsplit(".", 2)
            ours = original[f"{layer.replace('.', '/')}/{factor.lower()}"]
            np.testing.assert_array_equal(tensor, ours.T if factor == "lora_B" else ours)
            assert tensor.dtype == np.float32

    def test_settings(self, tmp_path: Path) -> None:
        exported(tmp_path, OTHER)
        assert json.loads((tmp_path / peft.CONFIG_FILE).read_text()) == {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/base",
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["layers.1", "lm_head"],
            "lora_dropout": 0.1,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": True,
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def test_patterns_are_written_as_what_they_chose(self, tmp_path: Path, model_dir: Path) -> None:
        config = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=".*self_attn.*",
            exclude_modules=("k_proj", "o_proj"),
            rank_pattern={r"layers\.1\..*": 5},
            alpha_pattern={"v_proj": 3},
            layers_to_transform=(0, 1),
            init_lora_weights=False,
        )
        model = jlora.inject(jlora.load(model_dir), config, rngs=nnx.Rngs(0))
        jlora.export_peft(tmp_path / "p", model, config)
        written = json.loads((tmp_path / "p" / peft.CONFIG_FILE).read_text())
        q, v = (f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "v_proj"))
        assert written["target_modules"] == ["q_proj", "v_proj"]
        assert written["rank_pattern"] == {q.format(1): 5, v.format(1): 5}
        assert written["alpha_pattern"] == {v.format(0): 3, v.format(1): 3}
        again = jlora.load(model_dir)
        jlora.load_adapter(tmp_path / "p", again)
        assert_same(factors(again), factors(model))
        assert injection.scalings(again) == injection.scalings(model)
        assert set(injection.scalings(model).values()) == {4 / 2, 4 / 5, 3 / 2, 3 / 5}

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            ({"layers_to_transform": (1,)}, ["model.layers.1.mlp.up_proj"]),
            ({"exclude_modules": ("layers.0.mlp.up_proj",)}, ["model.layers.1.mlp.up_proj"]),
            ({"layers_to_transform": (0, 1)}, ["up_proj"]),
        ],
    )
    def test_names_are_short_only_if_exact(self, config, names, tmp_path, model_dir: Path) -> None:
        lora = LoraConfig(r=1, target_modules=("up_proj",), **config)
        stored = adapters.StoredAdapter(config=lora, factors={}, where="test")
        model = jlora.models.load.abstract(model_dir)
        for name, target in adapter.iter_names(injection.plan(model, lora).targets):
            for factor, shape in target.shapes.items():
                stored.factors[f"{name}/{factor}"] = jnp.ones(shape)
        peft.write_peft(tmp_path, model, stored)
        assert json.loads((tmp_path / peft.CONFIG_FILE).read_text())["target_modules"] == names


def by_hand(to: Path, tensors: dict | None = None, **settings: Any) -> tuple[Path, dict]:
    """A PEFT directory as another program writes it: float16, keys that say nothing."""
    rng = np.random.default_rng(0)
    shapes = {"layers.0": (8, 8), "lm_head": (8, 5)}
    if tensors is None:
        tensors = {}
        for layer, (n_in, n_out) in shapes.items():
            prefix = f"base_model.model.{layer}"
            tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(2, n_in)).astype(np.float16)
            tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=(n_out, 2)).astype(np.float16)
    to.mkdir(parents=True)
    save_file(tensors, to / peft.WEIGHTS_FILE, metadata={"format": "pt"})
    written = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["layers.0", "lm_head"],
        "bias": "none", "use_dora": False, "lora_bias": False, "megatron_core": "megatron.core",
        "modules_to_save": None, "layers_pattern": None, "peft_version": "0.20.0",
        "use_qalora": False, "qalora_group_size": 16,
        "init_lora_weights": True, "base_model_name_or_path": "x", "exclude_modules": None,
    }  # fmt: skip
    (to / peft.CONFIG_FILE).write_text(json.dumps(written | settings))
    return to, tensors


def test_a_directory_by_hand_does_what_peft_would(tmp_path: Path) -> None:
    to, tensors = by_hand(tmp_path / "p")
    model, expected = Mlp(nnx.Rngs(0)), Mlp(nnx.Rngs(0))
    jlora.load_adapter(to, model)
    model.eval()
    for name, layer in (("layers.0", expected.layers[0]), ("lm_head", expected.lm_head)):
        a, b = (
            tensors[f"base_model.model.{name}.lora_{f}.weight"].astype(np.float32) for f in "AB"
        )
        layer.kernel.set_value(layer.kernel[...] + 3 * (b @ a).T)
    x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    np.testing.assert_allclose(model(x), expected(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_copy_of_the_base_weight_is_read_past(tmp_path: Path, dtype: type) -> None:
    """PEFT saves one along with a targeted lm_head, in the dtype that it had there."""
    model, expected = Mlp(nnx.Rngs(0)), Mlp(nnx.Rngs(0))
    _, tensors = by_hand(tmp_path / "p")
    jlora.load_adapter(tmp_path / "p", expected)
    kernel = np.ascontiguousarray(np.asarray(model.lm_head.kernel[...], dtype).T)
    tensors["base_model.model.lm_head.base_layer.weight"] = kernel
    jlora.load_adapter(by_hand(tmp_path / "q", tensors)[0], model)
    assert_same(everything(model)[1], everything(expected)[1])


def edit(change: Callable[[Path], Any], write: Callable = exported) -> Callable[[Path], Path]:
    """Write an adapter, then damage it."""

    def make(at: Path) -> Path:
        write(at)
        change(at)
        return at

    return make


def hand(**settings: Any) -> Callable[[Path], Path]:
    return lambda at: by_hand(at, **settings)[0]


def tensors(**changes: tuple[int, ...] | None) -> Callable[[Path], Path]:
    """The adapter by hand with tensors of other shapes (None: absent); "_" stands for "."."""

    def make(at: Path) -> Path:
        _, found = by_hand(at.parent / "whole")
        for key, shape in changes.items():
            name = f"base_model.model.{key.replace('__', '.')}"
            found.pop(name, None)
            if shape is not None:
                found[name] = np.zeros(shape, np.float32)
        return by_hand(at, found)[0]

    return make


def schema(version: int) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        file = next((at / "meta").glob("*"))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))

    return change


def full_run(at: Path) -> Path:
    (at / "model").mkdir(parents=True)
    (at / "model" / "config.json").write_text("{}")
    return at


def truncate(name: str) -> Callable[[Path], None]:
    return lambda at: (at / name).write_bytes((at / name).read_bytes()[:-7])


A0, B0 = "layers__0__lora_A__weight", "layers__0__lora_B__weight"
REFUSED: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "nothing there": (lambda at: at, ["does not exist; give a run, an Orbax adapter or a"]),
    "empty": (
        lambda at: (at.mkdir(), at)[1],
        ["holds no adapter; expected a run (adapter/ or check", "adapter_config.json"],
    ),
    "full run": (full_run, ["trained all weights and has no adapter: use --model"]),
    "no weights": (
        edit(lambda at: (at / peft.WEIGHTS_FILE).unlink()),
        ["adapter_model.safetensors does not exist; pickled adapters (.bin) are not read"],
    ),
    "truncated": (
        edit(truncate(peft.WEIGHTS_FILE)),
        ["adapter_model.safetensors is truncated or no safetensors file", "copy it again"],
    ),
    "no JSON": (edit(truncate(peft.CONFIG_FILE)), ["adapter_config.json is not JSON: "]),
    "a JSON list": (
        edit(lambda at: (at / peft.CONFIG_FILE).write_text("[]")),
        ["adapter_config.json holds no JSON object"],
    ),
    "other type": (hand(peft_type="IA3"), ["peft_type is 'IA3', only 'LORA' is read"]),
    "no type": (hand(peft_type=None), ["peft_type is None"]),
    "unsupported": (
        hand(use_dora=True, use_qalora=True, init_lora_weights="pissa", lora_bias=True,
             layer_replication=[[0, 2]], unheard_of=3),
        ["not supported: ", "use_dora = True", "use_qalora = True",
         "init_lora_weights = 'pissa'", "lora_bias = True",
         "layer_replication = [[0, 2]]", "unheard_of = 3"],
    ),
    "wrong value": (hand(r="two"), ["adapter_config.json:", "'r': "]),
    "strangers": (
        tensors(**{"layers__0__lora_magnitude_vector": (8,), "lm_head__weight": (5, 8)}),
        ["does not fit:", "unexpected: base_model.model.layers.0.lora_magnitude_vector (8,)",
         "unexpected: base_model.model.lm_head.weight (5, 8)"],
    ),
    "a base weight that is not targeted": (
        tensors(layers__1__base_layer__weight=(8, 8)),
        ["unexpected: base_model.model.layers.1.base_layer.weight (8, 8)"],
    ),
    "another base": (
        tensors(lm_head__base_layer__weight=(5, 8)),
        ["comes with base weights of lm_head that are not this model's", "another model"],
    ),
    "a larger base": (
        tensors(lm_head__base_layer__weight=(6, 8)), ["comes with base weights of lm_head that"]
    ),
    "does not fit": (
        tensors(**{A0: (2, 9), B0: None, "layers__1__lora_A__weight": (2, 8)}),
        ["does not fit:", "missing: base_model.model.layers.0.lora_B.weight (8, 2)",
         "unexpected: base_model.model.layers.1.lora_A.weight (2, 8)",
         "shape: base_model.model.layers.0.lora_A.weight is (2, 9), expected (2, 8)",
         "trained on another model"],
    ),
    "other rank": (
        hand(r=4), ["shape: base_model.model.lm_head.lora_B.weight is (5, 2), expected (5, 4)"]
    ),
    "other names": (
        hand(target_modules=["q_proj"]), ["target_modules: 'q_proj'; nearest: 0, 1, 2, lm_head"]
    ),
    "other schema": (
        edit(schema(2), orbax), ["schema version 2; this jlora reads 1: use the version of jlora"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(make, parts, tmp_path: Path) -> None:
    path = make(tmp_path / "adapter")
    for model in (Mlp(nnx.Rngs(0)), injected()):
        graphdef, leaves = everything(model)
        with pytest.raises(JloraError) as caught:
            jlora.load_adapter(path, model)
        message = str(caught.value)
        for part in parts:
            assert part in message
        assert str(path) in message
        assert nnx.graphdef(model) == graphdef
        assert_same(everything(model)[1], leaves)


@pytest.mark.parametrize(
    "config",
    [
        OTHER,
        dataclasses.replace(CONFIG, r=4),
        dataclasses.replace(CONFIG, lora_alpha=7),
        dataclasses.replace(CONFIG, use_rslora=True),
    ],
    ids=["targets", "rank", "alpha", "rslora"],
)
@FORMATS
def test_a_model_that_was_injected_otherwise(write: Callable, config, tmp_path: Path) -> None:
    path = write(tmp_path / "adapter", config)
    model = injected()
    graphdef, leaves = everything(model)
    with pytest.raises(JloraError, match=r"with other targets, .* jlora\.eject\(model\) first"):
        jlora.load_adapter(path, model)
    assert nnx.graphdef(model) == graphdef
    assert_same(everything(model)[1], leaves)
    jlora.load_adapter(path, jlora.eject(model))  # the remedy
    assert injection.scalings(model) == injection.scalings(injected(config))


class TestSaving:
    def test_an_existing_path_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(JloraError, match="exists already; save to a new directory"):
            jlora.save_adapter(tmp_path, injected(), CONFIG)
        assert [file.name for file in tmp_path.iterdir()] == ["mine"]

    def test_a_model_without_adapters(self, tmp_path: Path) -> None:
        for write in (jlora.save_adapter, jlora.export_peft):
            with pytest.raises(JloraError, match=r"holds no adapters: jlora\.inject"):
                write(tmp_path / "a", Mlp(nnx.Rngs(0)), CONFIG)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("write", [jlora.save_adapter, jlora.export_peft])
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (OTHER, r"in the model does not fit:\n  missing: lm_head/lora_a \(3, 8\)\n"),
            (dataclasses.replace(CONFIG, r=2), r"lora_a is \(3, 8\), expected \(2, 8\)"),
            (dataclasses.replace(CONFIG, lora_alpha=7), "with another scaling than lora_alpha = 7"),
        ],
    )
    def test_a_configuration_of_another_model(self, write, config, message, tmp_path) -> None:
        with pytest.raises(JloraError, match=message):
            write(tmp_path / "p", injected(), config)
        assert list(tmp_path.iterdir()) == []


def test_a_run_is_read_as_its_own_adapter(tmp_path: Path) -> None:
    """Not as what was exported into its directory."""
    run = tmp_path / "run"
    orbax(run / "checkpoints" / "7")
    exported(run / "export")
    assert adapters.read(run).where == str(run / "checkpoints" / "7")
    exported(run / "adapter")
    assert adapters.read(run).where == str(run / "adapter")
