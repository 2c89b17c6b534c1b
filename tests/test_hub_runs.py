"""Every command on a model by its hub's name, out of a cache in the hub's layout, offline."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compilation_cache, contents, write_chats, write_model
from hub_server import COMMIT, write_cache

import jlora
from jlora import cli

NAME = "org/tiny"
PINNED = f"{NAME}@{COMMIT}"
OTHER = "f" * 40
RUN = (
    *("--steps", "2", "--optim.warmup-steps", "0", "--lora.r", "2", "--loader.batch-size", "8"),
    *("--loader.max-shapes", "1", "--eval.loss-rows", "8", "--eval.answer-rows", "2"),
    *("--eval.samples", "1", "--eval.max-new-tokens", "2", "--checkpoint-every", "1"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a cache of the hub, chats, and a run on the hub's model."""
    home = tmp_path_factory.mktemp("hub")
    write_model(home / "model", num_hidden_layers=1)
    write_cache(home / "cache", NAME, home / "model")
    write_chats(home / "data")
    with (
        pytest.MonkeyPatch.context() as patch,
        compilation_cache(tmp_path_factory.getbasetemp() / "compiled"),
    ):
        patch.chdir(home)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        train(home / "run", NAME)
        yield home


def train(output, *model):
    chosen = ("--model", *model) if model else ()
    run("train", *chosen, "--data", "data", "--output", output, *RUN)


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def test_a_run_keeps_the_name_and_its_commit(home):
    used = tomllib.loads((home / "run" / "config.toml").read_text())
    assert used["model"] == PINNED
    settings = json.loads((home / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == NAME
    assert settings["revision"] == COMMIT


def test_a_run_on_the_directory_is_the_same(home, tmp_path):
    train(tmp_path / "run", home / "model")
    ours, theirs = (
        contents(path / "adapter")["adapter_model.safetensors"]
        for path in (home / "run", tmp_path / "run")
    )
    assert ours == theirs
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(home / "model")
    assert "revision" not in settings


@pytest.mark.parametrize("given", [(), (NAME,), (PINNED,)])
def test_resuming_takes_the_commit_of_the_start(home, tmp_path, capfd, given):
    """Though the branch has gone on to weights that the run was not trained on."""
    shutil.copytree(home / "cache", tmp_path / "cache", symlinks=True)
    write_model(tmp_path / "newer", seed=1, num_hidden_layers=1)
    write_cache(tmp_path / "cache", NAME, tmp_path / "newer", commit=OTHER)
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "checkpoints" / "2").rename(tmp_path / "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        model = ("--model", *given) if given else ()
        run("train", "--resume", *model, "--output", tmp_path / "run")
        assert "going on after step 1 of 2" in capfd.readouterr().out
        weights = "adapter/adapter_model.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (home / "run" / weights).read_bytes()
        (tmp_path / "run" / "report.json").unlink()
        with pytest.raises(SystemExit):
            run("train", "--resume", "--model", f"{NAME}@main", "--output", tmp_path / "run")
    said = capfd.readouterr().err
    assert f"was trained on another base than {NAME}@{OTHER}:" in said
    assert "other values in " in said


def test_a_run_whose_commit_is_gone_says_how_to_go_on(home, tmp_path, capfd):
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
        with pytest.raises(SystemExit):
            run("train", "--resume", "--output", tmp_path / "run")
        said = capfd.readouterr().err
        assert "HF_HUB_OFFLINE is set" in said
        assert f"began with {PINNED}: if that was moved, say with --model where it is now" in said
        run("train", "--resume", "--output", tmp_path / "run", "--model", home / "model")
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["model"] == str(home / "model")


def test_jlora_load_takes_a_name(home):
    tokens = jnp.arange(12)[None]
    ours, theirs = (jlora.load(model)(tokens) for model in (NAME, home / "model"))
    assert np.array_equal(ours, theirs)


def outputs(home, tmp_path, model):
    """Return what each command that has --model makes of a model, its own paths left out."""
    to = tmp_path / "to"
    made = {}
    for command in (
        ("eval", "--model", model, "--data", "data", "--adapter", "run", "--rows", "2"),
        ("generate", "--model", model, "--adapter", "run", "--prompt", "a"),
        ("inspect", "--model", model),
        ("quantize", "--model", model, "--to", to / "quantized", "--quant.kind", "int8"),
        ("import", "--model", model, "--adapter", "run/adapter", "--to", to / "imported"),
        ("merge", "--model", model, "--adapter", "run", "--to", to / "merged"),
        ("combine", "--adapters", "run", "--weights", "0.5", "--model", model, "--to",
         to / "combined"),
        ("export", "--run", "run", "--to", to / "exported", "--model", model),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            said = []
            patch.setattr("builtins.print", lambda *a, said=said, **k: said.append(a))
            run(*command)
        made[command[0]] = str(said).replace(str(to), "")
    for file in sorted(to.rglob("*.safetensors")):
        assert not file.is_symlink()
        made[str(file.relative_to(to))] = file.read_bytes()
    return to, made


def test_every_command_takes_a_name(home, tmp_path):
    _, theirs = outputs(home, tmp_path / "directory", home / "model")
    to, ours = outputs(home, tmp_path / "hub", NAME)
    assert len(ours) == 12
    assert ours == theirs
    for adapter in ("combined", "exported"):
        settings = json.loads((to / adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == NAME
        assert settings["revision"] == COMMIT
    assert not any(path.is_symlink() for path in to.rglob("*"))


def test_the_readmes_first_lines(home, tmp_path, capfd):
    """Run them as they stand, on our model under that name and records as the README's."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(pip install .*?)```", readme, re.DOTALL)[1]
    _, *commands = block.splitlines()
    assert len(commands) == 4
    (name,) = set(re.findall(r"--model (\S+)", block))
    record = json.loads(re.search(r"`(\{\"messages\": .*\})`", readme)[1])
    write_cache(tmp_path / "cache", name, home / "model")
    texts = [json.dumps(record).replace("\\u2026", f"row {i}") + "\n" for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        for command in commands:
            program, *arguments = shlex.split(command)
            assert program == "jlora"
            run(*arguments)
        assert '"eval_loss_after": ' in capfd.readouterr().out
        assert json.loads(Path("run/report.json").read_text())["loss_rows"] == 2
        assert Path("run/adapter/adapter_model.safetensors").is_file()
        assert jlora.load("merged")(jnp.arange(4)[None]).shape[:2] == (1, 4)


def test_inspect_needs_no_weights(home, tmp_path, capfd):
    write_model(tmp_path / "bare", num_hidden_layers=1)
    (tmp_path / "bare" / "model.safetensors").unlink()
    write_cache(tmp_path / "cache", NAME, tmp_path / "bare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        run("inspect", "--model", NAME)
        assert "trainable params: " in capfd.readouterr().out
        with pytest.raises(SystemExit):
            run("eval", "--model", NAME, "--data", "data")
        assert "the hub's cache" in capfd.readouterr().err


def test_a_name_that_the_cache_has_not(home, capfd):
    with pytest.raises(SystemExit) as caught:
        run("inspect", "--model", "org/tinny")
    assert caught.value.code == 2
    assert "org/tinny: no such directory here, and the hub's cache" in capfd.readouterr().err
