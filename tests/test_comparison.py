"""`jlora inspect ADAPTER` and `jlora diff A B`: what they print, and exit with."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Mlp, write_model

import jlora
from jlora import adapters, cli, comparison, description, injection, norms, tables
from jlora.checkpoint import StoredAdapter
from jlora.errors import JloraError

CONFIG = jlora.LoraConfig(
    r=2,
    lora_alpha=4,
    target_modules=("q_proj", "up_proj"),
    rank_pattern={r"1\.mlp\.up_proj": 3},
    init_lora_weights=False,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def write(model: Path, tmp_path: Path):
    """Save an adapter of the small model and return where."""

    def written(name: str, config: jlora.LoraConfig = CONFIG, seed: int = 0, change: Any = None):
        injected = jlora.inject(jlora.load(model), config, rngs=nnx.Rngs(seed))
        if change is not None:
            leaves, _ = injection.partition(injected)
            injection.update(injected, {path: change(path, x) for path, x in leaves.items()})
        if name.startswith("peft"):
            jlora.export_peft(tmp_path / name, injected, config, base_model="org/base")
        else:
            jlora.save_adapter(tmp_path / name, injected, config)
        return tmp_path / name

    return written


def run(capsys: pytest.CaptureFixture, *arguments: Any) -> tuple[list[str], int]:
    """Lines printed, and the exit status."""
    capsys.readouterr()
    status = 0
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = int(stop.code or 0)
    return capsys.readouterr().out.splitlines(), status


def cells(lines: list[str], start: str) -> list[str]:
    """The row that starts with a path."""
    (row,) = [line for line in lines if line.split(" ")[0] == start]
    return [cell.strip() for cell in row.replace(" to ", "…").split("  ") if cell.strip()]


class TestInspect:
    def test_tables(self, write, capsys) -> None:
        path = write("peft")
        lines, status = run(capsys, "inspect", path)
        assert status == 0
        assert lines[0].split() == ["adapter", str(path), "(PEFT)"]
        assert lines[1].split() == ["base", "model", "org/base"]
        assert ["r", "2"] in [line.split() for line in lines]
        assert ["lora_alpha", "4"] in [line.split() for line in lines]
        stored = adapters.read(path)
        sizes = norms.delta_norms(stored)
        q = [x for name, x in sizes.items() if "q_proj" in name]
        assert cells(lines, "model/layers/0-2/self_attn/q_proj")[1:] == [
            "(32, 32)", "2", "4", tables.span(q).replace(" to ", "…"), "3 × 128",
        ]  # fmt: skip
        one = sizes["model/layers/1/mlp/up_proj"]
        assert cells(lines, "model/layers/1/mlp/up_proj")[1:] == [
            "(32, 48)", "3", "4", f"{one:.3g}", "240",
        ]  # fmt: skip
        total = np.linalg.norm(list(sizes.values()))
        parameters = sum(leaf.size for leaf in stored.factors.values())
        assert cells(lines, "total")[1:] == [f"{total:.3g}", f"{parameters:,d}"]
        assert lines[-2].startswith("adapter_config.json")
        assert lines[-1].startswith("adapter_model.safetensors")
        assert lines[-1].endswith("kB")

    def test_every_layer(self, write, capsys) -> None:
        lines, _ = run(capsys, "inspect", write("a"), "--all-layers")
        paths = [line.split()[0] for line in lines if line.startswith("model/layers/")]
        assert paths == list(norms.delta_norms(adapters.read(write("b"))))

    def test_the_base_of_a_run(self, write, model: Path, tmp_path: Path, capsys) -> None:
        run_directory = tmp_path / "run"
        shutil.copytree(write("a"), run_directory / "checkpoints" / "7")
        (run_directory / "config.toml").write_text(f'model = "{model}"\n')
        lines, _ = run(capsys, "inspect", run_directory)
        assert lines[0].split() == ["adapter", str(run_directory), "(Orbax)"]
        assert lines[1].split() == ["base", "model", str(model)]
        assert any(line.startswith("adapters/ ") for line in lines)
        (run_directory / "config.toml").unlink()
        assert run(capsys, "inspect", run_directory)[0][1].endswith("not said")

    def test_an_update_that_does_nothing(self, write, capsys) -> None:
        fresh = dataclasses.replace(CONFIG, init_lora_weights=True)
        lines, _ = run(capsys, "inspect", write("a", fresh))
        assert lines[-1] == "the low-rank update is zero everywhere: it changes nothing there"
        one = write("b", change=lambda path, x: x * ("0/mlp" not in path))
        lines, _ = run(capsys, "inspect", one)
        assert lines[-1].startswith("the low-rank update is zero at model/layers/0/mlp/up_proj: ")

    def test_values_that_are_not_finite(self, write, capsys) -> None:
        path = write("a", change=lambda p, x: x / ("2/mlp" not in p))
        with pytest.raises(JloraError, match=r"not finite(.|\n)*layers.2.mlp.up_proj"):
            description.describe(path)

    def test_the_base(self, write, capsys) -> None:
        lines, _ = run(capsys, "inspect", write("a"))
        (line,) = [line for line in lines if line.startswith("trained on")]
        assert re.search(r"CausalLM, [\d,]+ parameters, hash [0-9a-f]{8}", line)

    def test_what_is_trained_beside_factors(self, write, capsys) -> None:
        config = dataclasses.replace(CONFIG, modules_to_save=("norm",))
        lines, _ = run(capsys, "inspect", write("a", config))
        assert cells(lines, "model/norm/weight")[1:] == ["(32,)", "32"]

    def test_refused(self, write, tmp_path: Path, capsys) -> None:
        for arguments in (("nowhere",), (tmp_path, "--lora.r", "4")):
            assert run(capsys, "inspect", *arguments) == ([], 2)


class TestDiff:
    def test_the_same_in_other_forms(self, write, capsys) -> None:
        a, b = write("orbax"), write("peft")
        lines, status = run(capsys, "diff", a, b)
        assert status == 0
        assert lines[-1] == "both adapters hold the same for each weight, bit for bit"
        assert cells(lines, "total")[-2:] == ["same bits", "1"]
        named = [line.split()[0] for line in lines[: lines.index("")]]
        assert named == ["setting", "rank_pattern", "init_lora_weights"]

    def test_how_far_apart(self, write, capsys) -> None:
        other = dataclasses.replace(
            CONFIG, r=4, target_modules=("q_proj", "v_proj"), rank_pattern={}
        )
        a, b = write("a"), write("b", other, seed=1)
        lines, status = run(capsys, "diff", a, b)
        assert status == 1
        first, second = adapters.read(a), adapters.read(b)
        ours, theirs = deltas(first), deltas(second)
        relative, cosine = [], []
        for name in (name for name in ours if name in theirs):
            relative.append(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(ours[name]))
            product = np.linalg.norm(ours[name]) * np.linalg.norm(theirs[name])
            cosine.append((ours[name] * theirs[name]).sum() / product)
        row = cells(lines, "model/layers/0-2/self_attn/q_proj")
        assert row[1:3] == ["2 | 4", "4"]
        assert row[-2:] == [tables.span(x).replace(" to ", "…") for x in (relative, cosine)]
        at = [i for i, line in enumerate(lines) if line.startswith("only in ")]
        assert [lines[i].split()[:3] for i in at] == [["only", "in", "A"], ["only", "in", "B"]]
        assert lines[at[1] + 1].split()[0] == "model/layers/0-2/self_attn/v_proj"

    def test_the_total(self, write) -> None:
        found = comparison.compare(write("a"), write("b", seed=1))
        ours, theirs = (np.concatenate([x.ravel() for x in deltas(adapters.read(p)).values()])
                        for p in (write("c"), write("d", seed=1)))  # fmt: skip
        expected = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
        np.testing.assert_allclose(found.total.relative, expected, rtol=1e-5)
        product = np.linalg.norm(ours) * np.linalg.norm(theirs)
        np.testing.assert_allclose(found.total.cosine, ours @ theirs / product, atol=1e-6)

    def test_one_bit(self, write, capsys) -> None:
        def change(path: str, x: Any) -> Any:
            last = path.endswith("2/mlp/up_proj/lora_b")
            return x.at[0, 0].set(jnp.nextafter(x[0, 0], 1e9)) if last else x

        a, b = write("a"), write("b", change=change)
        lines, status = run(capsys, "diff", a, b, "--all-layers")
        assert status == 1
        assert cells(lines, "model/layers/0/mlp/up_proj")[-2] == "same bits"
        assert float(cells(lines, "model/layers/2/mlp/up_proj")[-2]) < 1e-6
        assert run(capsys, "diff", a, a)[1] == 0

    def test_scaling_alone(self, write) -> None:
        found = comparison.compare(
            write("a"), write("b", dataclasses.replace(CONFIG, lora_alpha=8))
        )
        assert not found.same
        np.testing.assert_allclose(found.total.relative, 1)
        np.testing.assert_allclose(found.total.cosine, 1)
        assert found.settings == {"lora_alpha": ("4", "8")}

    def test_other_factors_of_the_same_update(self, write, tmp_path: Path) -> None:
        """The order of the ranks is no difference but in the bits."""
        a = adapters.read(write("a"))
        b = dataclasses.replace(a, factors={path: x[::-1] for path, x in a.factors.items()})
        found = comparison.compare(a, b)
        assert not found.same
        assert found.total.relative < 1e-7

    def test_zero(self) -> None:
        change = comparison.Change(0.0, 4.0, 0.0, same=False)
        assert (change.relative, np.isnan(change.cosine)) == (np.inf, True)
        assert comparison.Change(0.0, 0.0, 0.0, same=True).relative == 0

    def test_shapes_that_differ(self, write) -> None:
        a = adapters.read(write("a"))
        path = "model/layers/0/mlp/up_proj"
        smaller = {f"{path}/lora_b": a.factors[f"{path}/lora_b"][:, :9]}
        b = dataclasses.replace(a, factors=a.factors | smaller)
        found = comparison.compare(a, b)
        assert found.unlike == {path: ((32, 48), (32, 9))}
        assert not found.same
        assert "shapes differ" in str(found)

    def test_leaves_that_are_no_factors(self, write) -> None:
        config = dataclasses.replace(CONFIG, modules_to_save=("norm",))
        a = write("a", config)
        b = write("b", config, change=lambda path, x: x * 1.5 if "norm" in path else x)
        found = comparison.compare(a, b)
        np.testing.assert_allclose(found.changes["model/norm/weight"].relative, 0.5)
        assert not found.same
        assert set(comparison.compare(a, write("c")).only_a) == {"model/norm/weight"}

    def test_nothing_there(self, write, tmp_path: Path, capsys) -> None:
        assert run(capsys, "diff", write("a"), tmp_path / "b") == ([], 2)


def deltas(stored: StoredAdapter) -> dict[str, np.ndarray]:
    result = {}
    for name, update in jlora.updates.updates(stored).items():
        a, b = (np.asarray(x[0], np.float64) for x in update.matrices())
        result[name] = update.scaling * a.T @ b
    return result


def test_a_configuration_that_is_damaged(write, tmp_path: Path) -> None:
    path = write("peft")
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"r": 5}))
    with pytest.raises(JloraError, match=r"(?s)not what its configuration says.*rank is 5"):
        comparison.compare(path, path)


def test_leaves_that_only_a_model_can_match(tmp_path: Path) -> None:
    config = jlora.LoraConfig(r=2, target_modules=("layers.0",), modules_to_save=["lm_head"])
    model = jlora.inject(Mlp(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    jlora.save_adapter(tmp_path / "orbax", model, config)
    jlora.export_peft(tmp_path / "peft", model, config)
    with pytest.raises(JloraError, match=r"in different forms(.|\n)*jlora import"):
        comparison.compare(tmp_path / "orbax", tmp_path / "peft")
    assert comparison.compare(tmp_path / "peft", tmp_path / "peft").same


def test_a_span_of_unknown_numbers_is_unknown() -> None:
    assert tables.span([1.0, math.nan, 2.0]) == "nan"
    assert tables.span([1.0, 2.0]) == "1 to 2"
