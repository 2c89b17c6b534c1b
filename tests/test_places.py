"""URLs where paths are wanted: handed to Orbax, or refused by name; never a directory "gs:"."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
from etils import epath
from flax import nnx
from helpers import Mlp, write_model

import jlora
from jlora import adapters, checkpoint, cli, places
from jlora.errors import JloraError
from jlora.files import new_directory, read_template_of


@pytest.fixture(autouse=True)
def _nothing_is_made_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def injected():
    model = Mlp(nnx.Rngs(0), layers=1)
    config = jlora.LoraConfig(r=2)
    jlora.inject(model, config, rngs=nnx.Rngs(1))
    return model, config


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("gs://bucket/x", "gs://bucket/x"),
        (Path("gs://bucket/x"), "gs://bucket/x"),  # from which pathlib took a slash
        ("S3://bucket", "s3://bucket"),
        (epath.Path("gs://bucket/x"), "gs://bucket/x"),
        ("https://host/a?b=c", "https://host/a?b=c"),
        ("file:///tmp", "file:///tmp"),
        (Path("file:///tmp"), "file:///tmp"),
        ("file://host/tmp", "file://host/tmp"),
        ("gs://", "gs://"),
        (Path("gs://"), "gs://"),
        (Path("s3:"), "s3://"),
        ("C:", None),
        ("/tmp/x", None),
        ("a:b/c", None),
        ("org/name:config", None),
        (Path("C:/x"), None),
    ],
)
def test_what_is_a_url(path, url):
    assert places.url_of(path) == url


FLAGS = {
    "train --model m --data d --output {}": "--output",
    "train --model {} --data d --output o": "--model",
    "train --model m --data {} --output o": "--data",
    "train --model m --data d --output o --chat-template {}": "--chat-template",
    "train --config {}": "--config",
    "train --resume --output {}": "--output",
    "fetch smollm2 --to {}": "--to",
    "convert {} --to o": "--gguf",
    "eval --model m --data {}": "--data",
    "generate --model m --prompts {}": "--prompts",
    "quantize --model m --to {}": "--to",
    "export --run {} --to o": "--run",
    "export --run r --to {}": "--to",
    "import --model m --adapter {} --to o": "--adapter",
    "merge --model m --adapter a --to {}": "--to",
    "merge --model m --adapter a --to o --verify {}": "--verify",
    "inspect --model {}": "--model",
    "inspect --model-config {}": "--model-config",
}


@pytest.mark.parametrize("scheme", ["gs", "az", "https"])
@pytest.mark.parametrize("command", FLAGS)
def test_a_url_is_refused_by_name(capsys, command, scheme):
    url = f"{scheme}://place/a/b"
    with pytest.raises(SystemExit) as caught:
        cli.main(command.format(url).split())
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"jlora: {FLAGS[command]} {url}: no URL is taken here; copy it to or from a local path, "
        "and give that\n"
    )


@pytest.mark.parametrize(
    ("command", "flag"), [*FLAGS.items(), ("eval --model m --data d --adapter {}", "--adapter")]
)
def test_what_is_here_is_given_by_its_path(capsys, command, flag):
    with pytest.raises(SystemExit):
        cli.main(command.format("file:///a/b").split())
    assert capsys.readouterr().err == (
        f"jlora: {flag} file:///a/b: what is here is given by its path alone: /a/b\n"
    )


def test_all_urls_are_named_at_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(
            ["train", "--model", "hf://org/a", "--data", "s3://b/d.jsonl", "--output", "gs://b/run"]
        )
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0] == "jlora: --model hf://org/a: a model on the hub is given by its name alone: org/a"
    )
    assert [line.split(":")[0] for line in said[1:]] == ["--data s3", "--output gs"]


IN_BUCKETS = [
    "eval --model m --data d --adapter {}",
    "generate --model m --prompt q --adapter {}",
    "generate --model m --prompt q --adapter one={} two=x",
    "inspect {}",
    "merge --model m --to o --adapter {}",
    "diff {} b",
    "diff a {}",
    "combine --adapters {} b --weights 1 1 --to o",
    "combine --adapters a b --weights 1 1 --to {}",
    "import --model m --adapter a --to {}",
]


@pytest.mark.parametrize("command", IN_BUCKETS)
def test_adapters_may_be_in_buckets_that_orbax_reaches(capsys, command):
    words = command.format("gs://bucket/x").split()
    assert cli.parse(words[0], words[1:])
    for scheme in ("hf", "az"):
        words = command.format(f"{scheme}://bucket/x").split()
        with pytest.raises(JloraError, match=f"{scheme}://bucket/x: gs:// and s3:// alone are"):
            cli.parse(words[0], words[1:])


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="would ask for a bucket")
def test_what_a_bucket_needs_is_said(injected):
    model, config = injected
    for call in (
        lambda: jlora.save_adapter("gs://bucket/x", model, config),
        lambda: jlora.load_adapter("gs://bucket/x", model),
        lambda: jlora.combine_adapters(["gs://bucket/x"], [1.0]),
        lambda: read_template_of(Path("gs://bucket/x")),
    ):
        with pytest.raises(JloraError) as caught:
            call()
        assert str(caught.value).startswith("gs://bucket/x cannot be reached: Please install gcsfs")


def test_orbax_is_given_the_url_as_it_is(monkeypatch, injected):
    """No bucket is to be had here; what is handed on is looked at."""
    model, config = injected
    asked, given = [], []

    class Checkpointer(contextlib.AbstractContextManager):
        def __init__(self, handler):
            pass

        def __exit__(self, *error):
            return None

        def save(self, path, args):
            given.append(("save", path, sorted(args.adapters.item)))

        def restore(self, path, args):
            given.append(("restore", path))
            raise OSError("403: no access")

    def answer(name, value):
        def method(self, *args, **kwargs):
            asked.append((name, str(self)))
            return value

        monkeypatch.setattr(type(epath.Path("gs://bucket")), name, method)

    monkeypatch.setattr(checkpoint.ocp, "Checkpointer", Checkpointer)
    answer("exists", False)
    jlora.save_adapter(Path("gs://bucket/x"), model, config)
    assert given[0][:2] == ("save", epath.Path("gs://bucket/x"))
    assert [path.split("/")[-1] for path in given[0][2]] == ["lora_a", "lora_b"]
    answer("exists", True)
    with pytest.raises(JloraError, match="gs://bucket/x exists already"):
        jlora.save_adapter("gs://bucket/x", model, config)
    answer("is_dir", True)
    with pytest.raises(JloraError, match=r"gs://bucket/x is damaged or incomplete \(403"):
        adapters.read("gs://bucket/x")
    assert given[1] == ("restore", epath.Path("gs://bucket/x"))
    assert all(path.startswith("gs://bucket/x") for _, path in asked)


def test_no_url_becomes_a_directory(injected, tmp_path_factory):
    model, config = injected
    with pytest.raises(JloraError, match=r"gs://b/x: no URL is taken here"):
        jlora.export_peft("gs://b/x", model, config)
    with pytest.raises(JloraError, match=r"az://b/x: no URL is taken here"):
        jlora.save_adapter("az://b/x", model, config)
    with pytest.raises(JloraError, match=r"s3://b/x: no URL is taken here"):
        jlora.load("s3://b/x")
    with pytest.raises(JloraError, match=r"gs://b/x: no URL is taken here"):
        jlora.import_peft("gs://b/x", model)
    with pytest.raises(JloraError, match=r"gs://b/x: no URL"), new_directory(Path("gs://b/x")):
        pass
    base = write_model(tmp_path_factory.mktemp("places") / "model", num_hidden_layers=1)
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--model", str(base), "--to", "gs://b/x"])
