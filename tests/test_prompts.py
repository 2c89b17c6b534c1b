"""`jlora generate` with several adapters: what it is asked, and that each row gets its adapter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilation_cache, write_model

import jlora
from jlora import cli, injection, prompts
from jlora.errors import JloraError


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(tmp_path_factory):
    with compilation_cache(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with model/ and two adapters of other targets and ranks, a/ and b/."""
    home = tmp_path_factory.mktemp("prompts")
    write_model(home / "model", num_hidden_layers=1)
    for r, name in enumerate("ab", start=2):
        config = jlora.LoraConfig(r=r, target_modules=["q_proj", "up_proj"][r % 2 :])
        model = jlora.load(home / "model")
        jlora.inject(model, config, rngs=jax.random.key(r))
        random = np.random.default_rng(r)
        factors, _ = jlora.partition(model)
        values = {p: jnp.asarray(random.normal(size=x.shape)) for p, x in factors.items()}
        injection.update(model, values)
        jlora.save_adapter(home / name, model, config)
    return home


@pytest.fixture
def says(home, capsys):
    def run(*flags):
        cli.main(list(map(str, ("generate", "--model", home / "model", *flags))))
        return capsys.readouterr().out

    return lambda *flags: run("--max-new-tokens", "6", *flags)


@pytest.fixture
def fails(says, capsys):
    def run(*flags):
        with pytest.raises(SystemExit) as error:
            says(*flags)
        assert error.value.code == 2
        return capsys.readouterr().err

    return run


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_each_row_is_answered_by_the_adapter_it_names(home, tmp_path, says):
    rows = [
        {"prompt": "aaa", "adapter": "b"},
        {"prompt": "aaa", "adapter": None},
        {"prompt": "bb", "adapter": "a", "system": "ccc"},
        {"prompt": "aaa", "adapter": "a"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    both = ("--adapter", f"a={home / 'a'}", f"b={home / 'b'}")
    out = says("--prompts", file, *both)
    printed = [json.loads(line) for line in out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "answer"} for row in printed] == rows
    adapter_a, adapter_b = ("--adapter", home / "a"), ("--adapter", f"b={home / 'b'}")
    alone = [
        says("--prompt", "aaa", *adapter_b),
        says("--prompt", "aaa"),
        says("--prompt", "bb", "--system", "ccc", *adapter_a),
        says("--prompt", "aaa", *adapter_a),
    ]
    assert [row["answer"] + "\n" for row in printed] == alone
    assert len(set(alone)) == 4
    repeated = says("--prompts", file, *both[:2], "--adapter", both[2])
    assert repeated == out


def test_rows_that_name_none_get_the_only_adapter(home, tmp_path, says):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "aaa"}, {"prompt": "aaa"}])
    first, second = map(json.loads, says("--prompts", file, "--adapter", home / "a").splitlines())
    assert first == second
    assert first["answer"] + "\n" == says("--prompt", "aaa", "--adapter", home / "a")
    mixed = write_rows(
        tmp_path / "mixed.jsonl", [{"prompt": "aaa"}, {"prompt": "aaa", "adapter": None}]
    )
    adapted, bare = map(json.loads, says("--prompts", mixed, "--adapter", home / "a").splitlines())
    assert adapted["answer"] == first["answer"]
    assert bare["answer"] + "\n" == says("--prompt", "aaa")
    assert bare["answer"] != adapted["answer"]


def test_rows_that_cannot_be_asked_are_all_named(home, tmp_path, fails):
    rows = [
        {"prompt": "x", "adapter": "c"},
        {"prompt": "x"},
        {"prompt": "", "adapter": "a"},
        {"prompt": "x", "adapter": "a"},
        {"promt": "x", "adapter": "a"},
        ["x"],
        {"prompt": "x", "adapter": 3},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    file.write_text(file.read_text() + "{\n")
    said = fails("--prompts", file, "--adapter", f"a={home / 'a'}", f"b={home / 'b'}")
    assert said.startswith(f"jlora: 7 of the 8 rows of {file} cannot be asked:")
    assert "rows.jsonl:1: no adapter 'c'; there are: a, b" in said
    assert "rows.jsonl:2: names no adapter; give one of a, b, or null" in said
    assert "rows.jsonl:3:\n  'prompt' is empty" in said
    assert (
        "rows.jsonl:5:\n  missing key 'prompt'\n  unknown key 'promt'; did you mean 'prompt'"
        in said
    )
    assert "rows.jsonl:6: not a JSON object" in said
    assert "rows.jsonl:7:\n  'adapter': " in said
    assert "rows.jsonl:8: not JSON" in said
    file.write_text("")
    assert "has no row; a row is" in fails("--prompts", file)
    write_rows(file, [{"prompt": "x", "adapter": "a"}])
    assert "no adapter 'a'; there are: none" in fails("--prompts", file)


def test_flags_that_do_not_say_enough(home, tmp_path, fails):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    a, b = home / "a", home / "b"
    assert "neither was given" in fails("--adapter", a)
    assert "both were given" in fails("--prompt", "x", "--prompts", file)
    assert "--adapter is given without a value" in fails("--prompt", "x", "--adapter")
    assert f"{a} has no name; {b} has no name" in fails("--prompts", file, "--adapter", a, b)
    said = fails("--prompts", file, "--adapter", f"x={a}", f"x={b}")
    assert "'x' is given 2 times; several adapters are told apart by names" in said
    said = fails("--prompt", "x", "--adapter", f"a={a}", f"b={b}")
    assert "--prompt does not say which of the adapters a, b answers" in said


def test_runs_on_bases_quantised_in_different_ways_do_not_go_together(home, tmp_path, fails):
    for name, method in (("one", "qlora"), ("two", "lora")):
        (tmp_path / name).mkdir()
        used = f'method = "{method}"\n[quant]\nkind = "int8"\n'
        (tmp_path / name / "config.toml").write_text(used)
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "adapter": "one"}])
    said = fails("--prompts", file, "--adapter", f"one={tmp_path}/one", f"two={tmp_path}/two")
    assert "trained on bases quantised in different ways" in said
    assert f"{tmp_path}/two on plain weights" in said


def test_names_of_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert {k: str(v) for k, v in prompts.named(["lr=1"]).items()} == {"default": "lr=1"}
    assert {k: str(v) for k, v in prompts.named(["runs/lr=2"]).items()} == {"default": "runs/lr=2"}
    assert {k: str(v) for k, v in prompts.named(["x=y=z"]).items()} == {"x": "y=z"}
    assert prompts.named([]) == {}
    with pytest.raises(JloraError, match="=y has no name"):
        prompts.named(["=y", "x=z"])
