"""The README's examples run as they stand and say what they claim."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import HF_CONFIG, write_model

import jlora
from jlora import cli
from jlora.data import shapes, source

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOKENS = jnp.arange(20).reshape(2, 10) % 10


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "README.md", "exec"), names)


# What a test calls a block -> text that it alone holds.
BLOCKS = {
    "loop": "nnx.Sequential(",
    "nnx": "jlora.inject(model, config, rngs=nnx.Rngs(0))\noptimizer",
    "linen": "adapters, base = jlora.partition(params)",
    "plain": "inputs=(tokens,)",
    "linen, on": "jlora.merge(model, params)",
    "plan": "jlora.plan_targets(linen_model",
    "own, nnx": "jlora.register(Projection",
    "own, linen": "jlora.register(LinenProjection",
    "qlora": 'jlora.load("models/smollm2", quant',
    "quantised, nnx": 'jlora.QuantConfig(kind="int8")',
    "quantised, linen": "jlora.QuantConfig(), params=params",
    "bank": "jlora.Bank(",
    "combined": "jlora.combine_adapters(",
}


def block(name: str) -> str:
    (found,) = [block for block in blocks("python") if BLOCKS[name] in block]
    return found


@pytest.fixture(scope="module")
def linen_model() -> Any:
    """A user's own Linen model: the transformer of the example."""
    return runpy.run_path(str(ROOT / "examples" / "linen_train_state.py"))["Transformer"]()


def nnx_model() -> nnx.Module:
    """A user's own NNX model."""
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Embed(10, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs))


def test_every_block_has_its_test() -> None:
    tested = [block(name) for name in BLOCKS]
    assert sorted(tested) == sorted(blocks("python"))
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in BLOCKS if f'block("{name}")' not in source] == []


def test_the_loop(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    example = block("loop")
    names: dict = {}
    run(example, names)
    claimed = re.search(r"print\(jlora\.summary\(model\)\)  # (.*)", example)
    assert claimed is not None
    assert capsys.readouterr().out == claimed[1] + "\n"
    assert names["loss"] < 0.5  # it learns: the base model's is over 1
    fresh = jlora.eject(names["model"])
    jlora.load_adapter("adapter", fresh)
    assert abs(names["loss_fn"](fresh) - names["loss"]) < 0.05


def test_three_lines_for_nnx() -> None:
    model = nnx_model()
    out = model(TOKENS)
    config = jlora.LoraConfig(r=2)
    names = {"jlora": jlora, "nnx": nnx, "optax": optax, "model": model, "config": config}
    run(block("nnx"), names)
    model, optimizer = names["model"], names["optimizer"]
    assert jnp.array_equal(model(TOKENS), out)
    wrt: Any = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: m(TOKENS).sum(), argnums=wrt)(model)
    optimizer.update(model, grads)
    assert not jnp.array_equal(model(TOKENS), out)
    assert jnp.array_equal(jlora.eject(model)(TOKENS), out)


def test_lines_for_linen(linen_model, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    config = jlora.LoraConfig(r=2)
    pretrained = linen_model.init(jax.random.key(1), TOKENS)["params"]
    names = {"jlora": jlora, "optax": optax, "model": linen_model, "config": config}
    names |= {"rng": jax.random.key(0), "tokens": TOKENS, "pretrained": pretrained}
    run(block("linen"), names)
    trained = sum(leaf.size for leaf in names["adapters"].values())
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,d} || ")
    state = names["tx"].init(names["params"])
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trained
    combined = jlora.combine(names["adapters"], names["base"])
    assert jax.tree.all(jax.tree.map(np.array_equal, combined, names["params"]))

    names["adapters"] = {path: leaf + 0.1 for path, leaf in names["adapters"].items()}
    run(block("linen, on"), names)
    read, _ = jlora.partition(names["params"])
    assert read.keys() == names["adapters"].keys()
    assert all(np.array_equal(read[path], leaf) for path, leaf in names["adapters"].items())
    adapted = names["model"].apply({"params": names["params"]}, TOKENS)
    merged = linen_model.apply({"params": names["merged"]}, TOKENS)
    base = linen_model.apply({"params": pretrained}, TOKENS)
    assert jlora.eject(names["model"]) == linen_model
    assert jnp.abs(merged - adapted).max() < 1e-4
    assert jnp.abs(merged - base).max() > 0.1


def test_quantised_models(linen_model, tmp_path: Path, monkeypatch) -> None:
    write_model(tmp_path / "models" / "smollm2", hidden_size=64, intermediate_size=128)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"jlora": jlora, "nnx": nnx, "config": jlora.LoraConfig(r=2)}
    run(block("qlora"), names)
    assert names["model"].model.layers[0].mlp.up_proj.kernel.get_value().kind == "nf4"
    assert "trainable params" in jlora.summary(names["model"])

    names["model"] = nnx_model()
    out = names["model"](TOKENS)
    run(block("quantised, nnx"), names)
    assert 0 < jnp.abs(names["model"](TOKENS) - out).max() < 0.1

    names["model"] = jlora.inject(linen_model, names["config"])
    names["params"] = names["model"].init(jax.random.key(0), TOKENS)["params"]
    out = names["model"].apply({"params": names["params"]}, TOKENS)
    run(block("quantised, linen"), names)
    assert jnp.abs(names["model"].apply({"params": names["params"]}, TOKENS) - out).max() > 0


def test_the_plan(linen_model, capsys) -> None:
    run(
        block("plan"),
        {"jlora": jlora, "linen_model": linen_model, "tokens": TOKENS},
    )
    (table,) = [text for text in blocks("text") if "layers/attention" in text]
    assert capsys.readouterr().out == table


def adapters_of(model: Any, paths: dict[str, int]) -> None:
    """Save an adapter at each path, of this seed."""
    config = jlora.LoraConfig(r=2, init_lora_weights=False)
    for path, seed in paths.items():
        jlora.inject(model, config, rngs=nnx.Rngs(seed))
        jlora.save_adapter(path, model, config)
        jlora.eject(model)


def test_a_bank(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write_model(tmp_path / "models" / "smollm2")
    model = jlora.load(directory)
    adapters_of(model, {"runs/french": 1, "runs/terse": 2})
    names: dict[str, Any] = {}
    run(block("bank"), names)
    tokens = names["tokens"]
    alone = [model(tokens)[0]]
    for path in ("runs/terse", "runs/french"):
        alone.append(jlora.load_adapter(path, jlora.load(directory))(tokens)[0])
    rows = names["run"](*names["bank"].partition(names["rows"]), tokens)
    for row, expected in zip(rows, alone[::-1], strict=True):
        assert jnp.abs(row - expected).max() < 1e-5
    assert jnp.abs(names["logits"] - alone[1]).max() < 1e-5
    assert jnp.abs(alone[1] - alone[2]).max() > 0.01
    assert len(names["answers"]) == 3


def test_combined_adapters(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nnx_model()
    adapters_of(model, {"RUN1": 1, "RUN2": 2})
    run(block("combined"), {"jlora": jlora})
    updates = []
    for path in ("RUN1", "RUN2", "both"):
        merged = jlora.merge(jlora.load_adapter(path, nnx_model()))
        updates.append(merged.layers[1].kernel[...] - model.layers[1].kernel[...])
    assert jnp.abs(updates[2] - (0.7 * updates[0] + 0.3 * updates[1])).max() < 1e-6


class Bare(nnx.Module):
    """A user's own model whose weight is no layer's."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(10, 8, rngs=rngs)
        self.weight = nnx.Param(rngs.normal((8, 5)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.einsum("btd,do->bto", self.table(tokens), self.weight[...])


def test_weights_in_plain_parameters() -> None:
    names: dict[str, Any] = {"jlora": jlora, "nnx": nnx, "tokens": TOKENS}
    names |= {"model": Bare(nnx.Rngs(0)), "config": jlora.LoraConfig(r=2)}
    run(block("plain"), names)
    assert jlora.summary(names["model"]).startswith(f"trainable params: {2 * (8 + 5)} ")


def test_layer_types_of_ones_own() -> None:
    names: dict[str, Any] = {"jlora": jlora, "nnx": nnx}
    run(block("own, nnx"), names)
    run(block("own, linen"), names)
    config = jlora.LoraConfig(r=2, init_lora_weights=False)
    x = jnp.ones((3, 4))
    model = nnx.Sequential(names["Projection"](4, 6, nnx.Rngs(0)))
    before = model(x)
    jlora.inject(model, config, rngs=nnx.Rngs(1))
    assert jlora.summary(model).startswith(f"trainable params: {2 * (4 + 6)} ")
    assert jnp.abs(model(x) - before).max() > 0
    assert jnp.abs(jlora.merge(model)(x) - model(x)).max() < 1e-5

    linen = nn.Sequential([names["LinenProjection"](6)])
    injected = jlora.inject(linen, config)
    params = injected.init(jax.random.key(0), x)["params"]
    assert jlora.summary(params).startswith(f"trainable params: {2 * (4 + 6)} ")
    merged = linen.apply({"params": jlora.merge(injected, params)}, x)
    assert jnp.abs(merged - injected.apply({"params": params}, x)).max() < 1e-5


def test_sharding_annotations_are_carried_to_the_factors() -> None:
    axes = ("data", "model")
    kernel: Any = {"out_sharding": axes, "eager_sharding": False}
    model: Any = nnx.Sequential(nnx.Linear(4, 6, kernel_metadata=kernel, rngs=nnx.Rngs(0)))
    jlora.inject(model, jlora.LoraConfig(r=2), rngs=nnx.Rngs(0))
    layer = model.layers[0]
    assert layer.lora_a.get_metadata()["out_sharding"] == (None, "data")
    assert layer.lora_b.get_metadata()["out_sharding"] == (None, "model")

    init = nn.with_partitioning(nn.initializers.normal(), axes)
    injected = jlora.inject(nn.Sequential([nn.Dense(6, kernel_init=init)]), jlora.LoraConfig(r=2))
    (layer,) = injected.init(jax.random.key(0), jnp.ones((3, 4)))["params"].values()
    assert layer["lora_a"].names == (None, "data")
    assert layer["lora_b"].names == (None, "model")


def test_what_inspect_prints(tmp_path: Path, capsys) -> None:
    changes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    changes |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    found = re.search(r"`jlora (inspect) --model (\S+) (.*)` prints\n", README)
    assert found is not None
    cli.main([found[1], "--model", str(tmp_path), *found[3].split()])
    (table,) = [text for text in blocks("text") if "self_attn" in text]
    assert capsys.readouterr().out == table


def test_every_file_that_it_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:jlora|tests|examples|benchmarks)/[\w./]*)`", README))
    named |= set(re.findall(r"\]\(([\w./]+)\)", README))
    assert len(named) > 10
    assert [name for name in named if not (root / name).exists()] == []


def test_the_record_with_reasoning_is_read_as_it_says(tmp_path: Path) -> None:
    (text,) = (block for block in blocks("json") if "reasoning_content" in block)
    (tmp_path / "x.json").write_text(text)
    (record,) = source.load_records(tmp_path / "x.json")
    assert record.trained == [3]
    assert record.context == {1}
    assert record.harmless == ("id",)
    assert record.messages[3]["reasoning_content"] == "two and two"


def test_every_key_of_the_readmes_table_is_known() -> None:
    table = README.partition("No key\nis passed over")[2].partition("A row of training begins")[0]
    flags = re.findall(r"`([\w]+)`", table.splitlines()[4])
    assert flags == list(shapes.FLAGS)
    assert set(re.findall(r"`([\w]+)`", table.splitlines()[5])) == set(shapes.REASONING)
