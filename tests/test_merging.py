"""Adapters merged into a model directory: what is written, what is refused, what is measured."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import contents, write_model
from safetensors.numpy import load_file, save_file
from test_quantised_memory import write_weights

import jlora
from jlora import adapter, adapters, cli, injection, merging, verify
from jlora.commands import MergeConfig
from jlora.errors import JloraError
from jlora.models import load
from jlora.models.tensors import INDEX, Tensors

CONFIG = jlora.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
QUANT = jlora.QuantConfig(double_quant=True)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
DTYPES = ("auto", "bfloat16")
FREE = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tied/ and free/ (head and biases of its own, in shards); prompts.txt; their adapters."""
    home = tmp_path_factory.mktemp("merging")
    write_model(home / "tied", **SIZES)
    shard(write_model(home / "free", **SIZES, **FREE), 3)
    (home / "prompts.txt").write_text("abc\n\nWhat is this?\n")
    save(home / "a", jlora.load(home / "tied"))
    save(home / "q", jlora.load(home / "tied", quant=QUANT))
    load.quantize(home / "tied", home / "small", QUANT)
    return home


def shard(model_dir: Path, count: int) -> Path:
    whole = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    where = {}
    for i in range(count):
        file = f"model-{i}.safetensors"
        names = sorted(whole)[i::count]
        save_file({name: whole[name] for name in names}, model_dir / file)
        where |= dict.fromkeys(names, file)
    (model_dir / INDEX).write_text(json.dumps({"weight_map": where}))
    return model_dir


def save(to: Path, model: Any, config: jlora.LoraConfig = CONFIG) -> Any:
    """Inject, train a little, save; the adapted model."""
    jlora.inject(model, config, rngs=nnx.Rngs(1), training=False)
    leaves, _ = jlora.partition(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [
        0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves.values(), strict=True)
    ]
    more = dict(zip(leaves, noise, strict=True))
    injection.update(model, {path: leaf + more[path] for path, leaf in leaves.items()})
    jlora.save_adapter(to, model, config)
    return model


def merge(home: Path, adapter: Path, to: Path, **changes: Any) -> merging.Merged:
    given = {"model": home / "tied", "adapter": adapter, "to": to} | changes
    return merging.merge(MergeConfig(**given))


def tensors(model_dir: Path) -> dict[str, np.ndarray]:
    read = Tensors(model_dir)
    return {name: read.read(name) for name in read.shapes()}


def expected(adapted: Any, to: Path, source: Path) -> dict[str, np.ndarray]:
    """What the merge in memory gives."""
    load.save(jlora.merge(adapted), to, source=source)
    return tensors(to)


KINDS = {
    "linear": {"rank_pattern": {"up_proj": 5}, "layers_to_transform": (1,), "use_rslora": True},
    "biases": {"bias": "all", "target_modules": ("q_proj",)},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head")},
    "saved": {"modules_to_save": ("norm", "lm_head", "input_layernorm")},
    "tokens": {"trainable_token_indices": (3, 0, 271)},
}


@pytest.mark.parametrize("block", [None, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_is_what_the_model_in_memory_is(
    kind: str, block: int | None, home: Path, tmp_path: Path, monkeypatch
) -> None:
    if block:
        monkeypatch.setattr(merging, "_BLOCK", block)
    free, before = home / "free", contents(home / "free")
    config = dataclasses.replace(CONFIG, **KINDS[kind])
    adapted = save(tmp_path / "a", jlora.load(free), config)
    merged = merge(home, tmp_path / "a", tmp_path / "m", model=free)
    assert contents(free) == before
    own, base = tensors(tmp_path / "m"), tensors(free)
    moved = 0.0
    for name, value in expected(adapted, tmp_path / "memory", free).items():
        assert own[name].dtype == base[name].dtype
        assert np.abs(own[name] - value).max() <= 1e-6 * np.abs(value).max(), name
        moved += float(((own[name] - base[name]) ** 2).sum())
    assert merged.delta == pytest.approx(np.sqrt(moved), rel=1e-5)
    assert merged.changed == sum(not np.array_equal(own[name], base[name]) for name in base)
    assert merged.errors == {"original": 0}
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["weight_map"] == json.loads((free / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in own.values())
    for file in set(index["weight_map"].values()):
        assert load_file(tmp_path / "m" / file).keys() == load_file(free / file).keys()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (free / file).read_bytes()
    out = jlora.load(tmp_path / "m")(jnp.arange(6)[None])
    np.testing.assert_allclose(out, adapted(jnp.arange(6)[None]), atol=1e-4)


def test_each_weight_is_rounded_once(home: Path, tmp_path: Path) -> None:
    exact = merge(home, home / "a", tmp_path / "f32")
    half = merge(home, home / "a", tmp_path / "bf16", dtype="bfloat16")
    own, wide = tensors(tmp_path / "bf16"), tensors(tmp_path / "f32")
    squares = 0.0
    for name, value in wide.items():
        np.testing.assert_array_equal(own[name], value.astype(ml_dtypes.bfloat16))
        if "proj" in name:
            squares += float(((own[name].astype(np.float32) - value) ** 2).sum())
    assert exact.delta == half.delta > 0
    assert half.errors == pytest.approx({"original": np.sqrt(squares)}, rel=1e-5)
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    again = merge(home, home / "a", tmp_path / "again", model=tmp_path / "bf16", force=True)
    assert {x.dtype for x in tensors(tmp_path / "again").values()} == {jnp.dtype("bfloat16")}
    assert "rounding: off by" in str(again)


def test_tied_embeddings(home: Path, tmp_path: Path) -> None:
    for name, config in {
        "e": dataclasses.replace(CONFIG, target_modules=("embed_tokens",)),
        "t": dataclasses.replace(CONFIG, trainable_token_indices=(1,)),
    }.items():
        save(tmp_path / name, jlora.load(home / "free"), config)
        with pytest.raises(JloraError, match="also used by the output head"):
            merge(home, tmp_path / name, tmp_path / "m", force=True)
        assert not (tmp_path / "m").exists()
    # Trained as a whole they are one weight; a file that holds it twice holds it twice again.
    config = dataclasses.replace(CONFIG, modules_to_save=("embed_tokens",))
    twice = write_model(tmp_path / "twice", **SIZES)
    own = load_file(twice / "model.safetensors")
    own["lm_head.weight"] = own["model.embed_tokens.weight"].copy()
    save_file(own, twice / "model.safetensors")
    adapted = save(tmp_path / "s", jlora.load(twice), config)
    merge(home, tmp_path / "s", tmp_path / "m", model=twice)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert not np.array_equal(merged["lm_head.weight"], own["lm_head.weight"])
    np.testing.assert_array_equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        merged["lm_head.weight"], adapted.model.embed_tokens.embedding[...]
    )


def test_a_quantised_base_leaves_a_choice(home: Path, tmp_path: Path) -> None:
    with pytest.raises(JloraError, match=r"quantised to nf4.*--into dequantized is.*--into orig"):
        merge(home, home / "q", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    plain = jlora.load_adapter(home / "q", jlora.load(home / "tied"))
    seen = jlora.load_adapter(home / "q", jlora.load(home / "tied", quant=QUANT))
    models = {"original": plain, "dequantized": seen}
    saw = expected(seen, tmp_path / "saw", home / "tied")
    for into, model in models.items():
        for dtype in ("auto", "bfloat16"):
            to = tmp_path / f"{into}-{dtype}"
            merged = merge(home, home / "q", to, into=into, dtype=dtype)
            own = tensors(to)
            wanted = expected(model, tmp_path / f"memory-{to.name}", home / "tied")
            rounding = 1e-6 if dtype == "auto" else 2.0**-8
            for name, value in wanted.items():
                limit = rounding * np.abs(value).max()
                assert np.abs(own[name].astype(np.float32) - value).max() <= limit, name
            off = [own[n].astype(np.float32) - saw[n] for n in own if "proj" in n]
            total = np.sqrt(sum(float((x**2).sum()) for x in off))
            assert merged.errors[into] == pytest.approx(total, rel=1e-3, abs=1e-5)
            assert merged.errors.keys() == {"dequantized", "original"}
            assert merged.errors["original"] > 10 * merged.errors["dequantized"]
            assert f"into the {into} weights: off by" in str(merged)
    with pytest.raises(JloraError, match="trained on weights that were not quantised"):
        merge(home, home / "a", tmp_path / "m", into="dequantized")


def test_a_quantised_directory_is_dequantised(home: Path, tmp_path: Path) -> None:
    small = home / "small"
    merge(home, home / "q", tmp_path / "m", model=small)
    merge(home, home / "q", tmp_path / "n", into="dequantized")
    assert contents(tmp_path / "m").keys() == contents(tmp_path / "n").keys()
    own, other = tensors(tmp_path / "m"), tensors(tmp_path / "n")
    for name, value in other.items():
        np.testing.assert_array_equal(own[name], value, err_msg=name)
    assert "quantization_config" in (small / "config.json").read_text()
    assert "quantization_config" not in (tmp_path / "m" / "config.json").read_text()
    with pytest.raises(JloraError, match=r"the original ones are not there"):
        merge(home, home / "q", tmp_path / "o", model=small, into="original")


def test_what_training_did_not_see_is_said(home: Path, tmp_path: Path) -> None:
    said = "trained on weights that were not quantised, or otherwise than these"
    quantised_since = merge(home, home / "a", tmp_path / "a", model=home / "small")
    assert said in str(quantised_since)
    assert "from W + ΔW" in str(quantised_since)
    seen = merge(home, home / "q", tmp_path / "q", model=home / "small")
    assert said not in str(seen)
    assert "from what training saw" in str(seen)
    adapted = jlora.load(home / "tied", quant=jlora.QuantConfig(kind="int8"))
    save(tmp_path / "int8", adapted)
    otherwise = merge(home, tmp_path / "int8", tmp_path / "o", model=home / "small")
    assert said in str(otherwise)


def test_what_is_saved_whole_and_quantised_is_refused(home: Path, tmp_path: Path) -> None:
    free = write_model(tmp_path / "free", tie_word_embeddings=False, **SIZES)
    config = dataclasses.replace(CONFIG, target_modules=("q_proj",), modules_to_save=("lm_head",))
    save(tmp_path / "a", jlora.load(free), config)
    quant = dataclasses.replace(QUANT, target_modules=("q_proj", "lm_head"))
    load.quantize(free, tmp_path / "small", quant)
    said = "^lm_head/kernel: what is quantised cannot be trained as a whole"
    with pytest.raises(JloraError, match=said):
        merge(home, tmp_path / "a", tmp_path / "m", model=tmp_path / "small")
    assert not (tmp_path / "m").exists()
    model = jlora.load(tmp_path / "small")
    graphdef = nnx.graphdef(model)
    with pytest.raises(JloraError, match=said):
        jlora.load_adapter(tmp_path / "a", model)
    assert nnx.graphdef(model) == graphdef


def test_values_beyond_float16_are_refused(home: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    config = dataclasses.replace(CONFIG, target_modules=("q_proj",))
    large = write_model(tmp_path / "large", **SIZES)
    own = load_file(large / "model.safetensors")
    own[name][:] = 65000
    own = {key: value.astype(np.float16) for key, value in own.items()}
    save_file(own, large / "model.safetensors")
    save(tmp_path / "a", jlora.load(large), dataclasses.replace(config, lora_alpha=40000))
    with pytest.raises(JloraError, match=rf"^{name}: values beyond .*--dtype float32 or bfloat16"):
        merge(home, tmp_path / "a", tmp_path / "m", model=large)
    assert not list(tmp_path.glob("*m*"))
    merge(home, tmp_path / "a", tmp_path / "m", model=large, dtype="bfloat16")
    # Also what no adapter changes.
    wide = write_model(tmp_path / "wide", **SIZES)
    own = load_file(wide / "model.safetensors")
    own["model.norm.weight"][:] = 1e6
    save_file(own, wide / "model.safetensors")
    with pytest.raises(JloraError, match=r"^model\.norm\.weight: values beyond"):
        merge(home, home / "a", tmp_path / "n", model=wide, dtype="float16", force=True)


def test_what_is_of_other_weights_is_not_copied(home: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", **SIZES)
    for name in ("adapter_config.json", "pytorch_model.bin.index.json", "special_tokens_map.json"):
        (model / name).write_text("{}")
    merge(home, home / "a", tmp_path / "m", model=model)
    copied = {path.name for path in (tmp_path / "m").iterdir()}
    own = {path.name for path in model.iterdir()}
    assert own - copied == {"adapter_config.json", "pytorch_model.bin.index.json"}


def test_another_base_or_an_untrained_adapter(home: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1, **SIZES)
    with pytest.raises(JloraError, match=r"another base than this:\n  other values in 1"):
        merge(home, home / "a", tmp_path / "m", model=other)
    with pytest.raises(JloraError, match=r"another base than this:\n  15 parameters new"):
        merge(home, home / "a", tmp_path / "m", model=write_model(tmp_path / "w", **SIZES | FREE))
    model = jlora.inject(jlora.load(other), jlora.LoraConfig(r=2), rngs=nnx.Rngs(0))
    jlora.save_adapter(tmp_path / "zero", model, jlora.LoraConfig(r=2))
    with pytest.raises(JloraError, match="changes nothing"):
        merge(home, tmp_path / "zero", tmp_path / "m", model=other)
    assert not (tmp_path / "m").exists()
    merge(home, home / "a", tmp_path / "m", model=other, force=True)
    merge(home, tmp_path / "zero", tmp_path / "n", model=other, force=True)
    assert contents(tmp_path / "n").keys() == contents(other).keys()
    for name, value in tensors(other).items():
        np.testing.assert_array_equal(tensors(tmp_path / "n")[name], value)
    with pytest.raises(JloraError, match="isn't empty"):
        merge(home, home / "a", tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("a", {}),
        ("a", {"dtype": "bfloat16"}),
        ("q", {"into": "original"}),
        ("q", {"into": "dequantized"}),
        ("q", {"model": "small"}),
    ],
)
def test_verified(name: str, changes: dict, home: Path, tmp_path: Path) -> None:
    changes = changes | ({"model": home / changes["model"]} if "model" in changes else {})
    merged = merge(home, home / name, tmp_path / "m", verify=home / "prompts.txt", **changes)
    assert merged.verified is not None
    assert merged.verified.prompts == 2
    assert merged.verified.difference <= merged.verified.bound <= merged.verified.effect / 2
    assert "logits differ by at most" in str(merged)
    if changes.get("dtype") != "bfloat16":
        assert merged.verified.agreement == 1


def broken(kind: str) -> Any:
    own = adapter.delta_weight
    left = iter(range(100))

    def delta(site: Any, *rest: Any) -> Any:
        value = own(site, *rest)
        if kind == "one layer":
            return value if next(left) else 0 * value
        return {"nothing": 0, "twice": 2, "sign": -1}[kind] * value

    return delta


# One weight of 14 left out is within what rounding to bfloat16 may do.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("one layer", "auto"), *((k, d) for k in ("nothing", "twice", "sign") for d in DTYPES)],
)
def test_a_broken_merge_is_caught(kind: str, dtype: str, home, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapter, "delta_weight", broken(kind))
    with pytest.raises(JloraError, match="is not the adapted one, and was not kept"):
        merge(home, home / "a", tmp_path / "m", dtype=dtype, verify=home / "prompts.txt")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_in_any_prompt_is_caught(home: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "free", tie_word_embeddings=False, **SIZES)
    save(tmp_path / "a", jlora.load(model))
    merge(home, tmp_path / "a", tmp_path / "m", model=model)
    own = load_file(tmp_path / "m" / "model.safetensors")
    own["model.embed_tokens.weight"][100] = np.nan
    save_file(own, tmp_path / "m" / "model.safetensors")
    stored = adapters.read(tmp_path / "a")
    prompts = [np.arange(5, 15, dtype=np.int32), np.arange(95, 105, dtype=np.int32)]
    for asked in (prompts, prompts[::-1]):
        with pytest.raises(JloraError, match="differ by at most nan"):
            verify.compare(lambda: load.load(model), stored, tmp_path / "m", asked, eps=1e-7)


def test_the_bound_and_the_prompts_are_the_users(home: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(JloraError, match=r"\(bound 1e-09; .* is the bound too tight"):
        merge(home, home / "a", tmp_path / "m", verify=chats, verify_bound=1e-9)
    with pytest.raises(JloraError, match=r"\(bound 1e-09; .*--dtype float32 keeps it"):
        merge(home, home / "a", tmp_path / "m", verify=chats, verify_bound=1e-9, dtype="bfloat16")
    with pytest.raises(JloraError, match=r"nope\.txt cannot be read"):
        merge(home, home / "a", tmp_path / "m", verify=tmp_path / "nope.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(JloraError, match=r"empty\.txt holds no prompt"):
        merge(home, home / "a", tmp_path / "m", verify=tmp_path / "empty.txt")
    assert not (tmp_path / "m").exists()
    with pytest.raises(JloraError, match="verify_bound is for --verify"):
        MergeConfig(model=home, adapter=home, to=home, verify_bound=1)


def test_the_command(home: Path, tmp_path: Path, capfd) -> None:
    given = ["--model", str(home / "tied"), "--adapter", str(home / "q")]
    with pytest.raises(SystemExit) as caught:
        cli.main(["merge", *given, "--to", str(tmp_path / "m")])
    assert caught.value.code == 2
    assert "say which to merge into" in capfd.readouterr().err
    cli.main(["merge", *given, "--to", str(tmp_path / "m"), "--into", "original"])
    said = capfd.readouterr()
    assert said.err == f"adapter {home / 'q'}: 14 weights, |ΔW| = {said.out.split()[5]}\n"
    assert said.out.startswith("merged 14 weights: |ΔW| = ")
    other = str(write_model(tmp_path / "other", seed=1, **SIZES))
    prompt = ["generate", "--model", other, "--prompt", "a", "--max-new-tokens", "1"]
    with pytest.raises(SystemExit):
        cli.main([*prompt, "--adapter", str(home / "a")])
    assert "was trained on another base than this" in capfd.readouterr().err
    cli.main([*prompt, "--adapter", str(home / "a"), "--force"])
    assert "14 weights, |ΔW| = " in capfd.readouterr().err


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd() / "benchmarks"))
import host_memory
from jlora import merging
from jlora.commands import MergeConfig
warm, model, adapter, to = map(Path, sys.argv[1:])
run = lambda model, to: merging.merge(MergeConfig(model=model, adapter=adapter, to=to, force=True))
run(warm, to / "warm")
print(host_memory.peak(lambda: run(model, to / "merged"))[1]["grown_bytes"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's kernel tells the peak")
def test_it_takes_no_more_than_twice_the_largest_shard(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, target_modules=("q_proj", "up_proj"))
    one, many = write_weights(tmp_path / "one", 16), write_weights(tmp_path / "many", 16)
    shard(many, 8)
    save(tmp_path / "a", jlora.load(one, dtype=jnp.bfloat16), config)
    largest = max(file.stat().st_size for file in many.glob("*.safetensors"))
    whole = (one / "model.safetensors").stat().st_size
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, one, many, tmp_path / "a", tmp_path]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2 * largest < whole / 2
