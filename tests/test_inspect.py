"""`jlora inspect`: what a configuration adapts, told from a config.json alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import HF_CONFIG, write_model

import jlora
from jlora import cli

LLAMA_2_7B = HF_CONFIG | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The config.json of a random Llama of six layers, without weights."""
    file = tmp_path / "small.json"
    file.write_text(json.dumps(HF_CONFIG | {"num_hidden_layers": 6}))
    return file


def inspect(capsys: pytest.CaptureFixture, *arguments: object) -> list[str]:
    capsys.readouterr()
    cli.main(["inspect", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


# The high water mark of /proc starts at zero with the process; that of getrusage may be a parent's.
WITH_PEAK = """
import sys
from jlora import cli
assert not cli.main(sys.argv[1:])
status = open("/proc/self/status").read() if sys.platform == "linux" else "VmHWM: 0"
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.parametrize(
    ("flags", "trained", "line"),
    [
        (
            ("--lora.r", "8", "--lora.target-modules", "q_proj", "v_proj"),
            4_194_304,
            "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622",
        ),
        (
            ("--lora.r", "16", "--lora.target-modules", "all-linear"),
            39_976_960,
            "trainable params: 39,976,960 || all params: 6,778,392,576 || trainable%: 0.5898",
        ),
    ],
)
def test_llama_2_7b_in_little_memory(tmp_path: Path, flags, trained, line) -> None:
    """The numbers are those that PEFT prints; the weights would take 27 GB."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_2_7B))
    done = subprocess.run(
        [sys.executable, "-c", WITH_PEAK, "inspect", "--model-config", str(file), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, summary, peak = done.stdout.splitlines()
    assert summary == line
    assert table[-1].split() == ["total", f"{trained:,d}"]
    assert table[1].startswith("model/layers/0-31/")
    assert len(table) == 2 + (2 if trained < 10**7 else 7)
    assert int(peak) * 1024 < 1e9


def test_a_directory_and_its_configuration_say_the_same(tmp_path: Path, capsys) -> None:
    directory = write_model(tmp_path / "model")
    by_directory = inspect(capsys, "--model", directory)
    assert by_directory == inspect(capsys, "--model-config", directory / "config.json")
    config = jlora.LoraConfig()
    model = jlora.load(directory)
    plan = jlora.plan_targets(model, config)
    jlora.inject(model, config, rngs=jax.random.key(0))
    assert by_directory[-1] == jlora.summary(model)
    (directory / "model.safetensors").unlink()
    assert inspect(capsys, "--model", directory, "--all-layers")[:-1] == str(plan).splitlines()


def test_only_layers_that_are_alike_share_a_row(small: Path, capsys) -> None:
    flags = ("--lora.target-modules", r".*\.q_proj")
    flags += ("--lora.layers-to-transform", "0", "1", "2", "4")
    flags += ("--lora.rank-pattern", r"layers\.1\.self_attn\.q_proj", "4")
    rows = inspect(capsys, "--model-config", small, "--lora.r", "2", *flags)
    assert [row.split() for row in rows[1:-1]] == [
        ["model/layers/0,2,4/self_attn/q_proj", "(32,", "32)", "2", "8", "3", "×", "128"],
        ["model/layers/1/self_attn/q_proj", "(32,", "32)", "4", "8", "256"],
        ["total", "640"],
    ]


def test_what_is_trained_as_a_whole_has_rows(small: Path, capsys) -> None:
    flags = ("--lora.modules-to-save", "input_layernorm", "norm")
    flags += ("--lora.trainable-token-indices", "1", "5", "--lora.target-modules", r".*\.o_proj")
    changes = {"tie_word_embeddings": False, "num_hidden_layers": 6}
    small.write_text(json.dumps(HF_CONFIG | changes))
    rows = inspect(capsys, "--model-config", small, *flags)
    assert [row.split() for row in rows[2:-1]] == [
        ["model/layers/0-5/input_layernorm/weight", "(32,)", "6", "×", "32"],
        ["model/norm/weight", "(32,)", "32"],
        ["model/embed_tokens", "2", "rows", "64"],
        ["total", f"{6 * 8 * 64 + 7 * 32 + 2 * 32:,d}"],
    ]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), "none was given"),
        (("--model", "a", "--model-config", "b"), "a, b were given"),
        (("c", "--model", "a"), "c, a were given"),
    ],
)
def test_one_of_three(flags: tuple[str, ...], problem: str, capfd) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", *flags])
    assert caught.value.code == 2
    said = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "one of ADAPTER" in said
    assert "--model DIR" in said
    assert "--model-config FILE" in said
    assert problem in said


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--model-config", "nope.json"), "nope.json does not exist; give a Hugging Face config"),
        (("--model", "nope"), "nope/config.json does not exist; --model takes a Hugging Face"),
    ],
)
def test_a_path_that_is_not_there(flags: tuple[str, ...], problem: str, capfd) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", *flags])
    assert problem in capfd.readouterr().err


def test_a_target_that_matches_nothing(small: Path, capfd) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--model-config", str(small), "--lora.target-modules", "q_prj", "x"])
    assert "target_modules: 'q_prj'; nearest: q_proj" in capfd.readouterr().err
