"""Models by name: what is downloaded, what the cache gives, and how a name is refused."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import COMMIT, Repository, serve, write_cache

from jlora import hub
from jlora.errors import JloraError

FILES = {
    "config.json": b"{}",
    "generation_config.json": b'{"a": 1}',
    "tokenizer.json": b"tokens",
    "tokenizer_config.json": b'{"b": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "README.md": b"# A card",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "onnx/model.onnx": b"another form",
    "original/params.json": b"{}",
}
MISSED = "/config.json does not exist; --model takes a Hugging Face model directory"
NEEDED = [
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
SCRIPT = """
import json, logging, sys, time
from jlora import hub
from jlora.errors import JloraError
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
try:
    found = hub.find(sys.argv[1], weights=sys.argv[2] == "True")
    print(json.dumps([str(found.directory), found.pinned]))
except JloraError as error:
    print(json.dumps([str(error), None]))
"""


@pytest.fixture
def find(tmp_path):
    """Find a model in a process of its own, since the hub's client reads its settings once."""

    def run(name, *, weights=True, endpoint="http://127.0.0.1:9", **environment):
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        run.began = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, name, str(weights)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(Path(hub.__file__).parents[1])} | settings | environment,
        )
        run.seconds = time.perf_counter() - run.began
        assert process.returncode == 0, process.stderr
        run.said = process.stderr
        return json.loads(process.stdout)

    return run


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in Path(directory).rglob("*") if p.is_file())


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_model_is_downloaded_once_and_no_more_of_it_than_is_read(find, revision):
    with serve({"org/tiny": Repository(FILES)}) as server:
        directory, pinned = find(f"org/tiny{revision}", endpoint=server.endpoint)
        assert pinned == f"org/tiny@{COMMIT}"
        assert files(directory) == server.downloads() == NEEDED
        assert (Path(directory) / "model.safetensors").read_bytes() == b"weights"
        assert f"model org/tiny at commit {COMMIT}" in find.said
        asked = len(server.asked)
        assert find(pinned, endpoint=server.endpoint) == [directory, pinned]
        assert len(server.asked) == asked  # a commit is not asked about again
        assert find("org/tiny", endpoint=server.endpoint) == [directory, pinned]
        assert server.downloads() == NEEDED


def test_what_was_downloaded_serves_without_a_network(find):
    with serve({"org/tiny": Repository(FILES)}) as server:
        found = find("org/tiny", endpoint=server.endpoint)
    assert find("org/tiny", endpoint=server.endpoint) == found
    assert "what its cache holds is used" in find.said
    assert find("org/tiny", HF_HUB_OFFLINE="1") == found
    assert find(found[1], HF_HUB_OFFLINE="1") == found


def test_no_weights_where_none_are_needed(find):
    with serve({"org/tiny": Repository(FILES)}) as server:
        directory, _ = find("org/tiny", weights=False, endpoint=server.endpoint)
        assert files(directory) == [name for name in NEEDED if name != "model.safetensors"]
        said, pinned = find("org/tiny")  # the weights are not there yet
        assert pinned is None
        assert "cache" in said
        assert "does not hold all of it" in said
        assert find("org/tiny", weights=False)[0] == directory
        find("org/tiny", endpoint=server.endpoint)
        assert files(directory) == NEEDED


def test_shards_are_whole_or_downloaded(find, tmp_path):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    shards = {"model-1-of-2.safetensors": b"a", "model-2-of-2.safetensors": b"b"}
    whole = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    model = tmp_path / "model"
    model.mkdir()
    for name, data in whole.items():
        (model / name).write_bytes(data)
    (model / "model-1-of-2.safetensors").write_bytes(b"a")
    directory = write_cache(tmp_path / "hf" / "hub", "org/tiny", model)
    for name in ("org/tiny", f"org/tiny@{COMMIT}"):
        assert "does not hold all of it" in find(name)[0]
    with serve({"org/tiny": Repository(whole | shards)}) as server:
        assert find(f"org/tiny@{COMMIT}", endpoint=server.endpoint)[0] == str(directory)
    assert files(directory) == sorted(whole | shards)


@pytest.mark.parametrize("absent", ["tokenizer.json", "generation_config.json"])
def test_a_commit_that_is_here_in_part_is_completed(find, tmp_path, absent):
    """Leave out what a program that needs no tokenizer does, or a download that was cut short."""
    model = tmp_path / "model"
    model.mkdir()
    for name in NEEDED:
        if name != absent:
            (model / name).write_bytes(FILES[name])
    directory = write_cache(tmp_path / "hf" / "hub", "org/tiny", model)
    pinned = f"org/tiny@{COMMIT}"
    assert find(pinned) == [str(directory), pinned]  # no network: it may be all that there is
    assert "what its cache holds is used" in find.said
    with serve({"org/tiny": Repository(FILES)}) as server:
        assert find(pinned, endpoint=server.endpoint) == [str(directory), pinned]
        assert server.downloads() == [absent]
    assert files(directory) == NEEDED


def test_a_link_without_its_blob_is_not_there(find, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in NEEDED:
        (model / name).write_bytes(FILES[name])
    directory = write_cache(tmp_path / "hf" / "hub", "org/tiny", model)
    (directory / "model.safetensors").resolve().unlink()
    assert "does not hold all of it" in find(f"org/tiny@{COMMIT}")[0]


def test_a_cache_that_another_program_wrote(find, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in NEEDED:
        (model / name).write_bytes(FILES[name])
    snapshot = write_cache(tmp_path / "hf" / "hub", "org/tiny", model)
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert find(name) == [str(snapshot), f"org/tiny@{COMMIT}"]


def test_the_token_is_that_of_the_login(find, tmp_path):
    with serve({"org/tiny": Repository(FILES, token="hf_secret")}) as server:
        said, _ = find("org/tiny", endpoint=server.endpoint)
        assert "has no model of that name for you" in said
        assert "`hf auth login` or set HF_TOKEN" in said
        assert find("org/tiny", endpoint=server.endpoint, HF_TOKEN="hf_other")[1] is None
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "token").write_text("hf_secret")
        assert find("org/tiny", endpoint=server.endpoint)[1] is not None


@pytest.mark.parametrize(
    ("name", "repository", "expected"),
    [
        ("org/tinny", Repository(FILES), "has no model of that name for you: check the name"),
        ("org/tiny@v2", Repository(FILES), "no revision 'v2': give a branch, a tag or a whole"),
        ("org/tiny", Repository(FILES, gated=True), "those who accepted its terms: do so on"),
        ("org/tiny", Repository({"config.json": b"{}", "pytorch_model.bin": b""}),
         "has no model.safetensors: it is no model in transformers' format with safetensors"),
        ("org/tiny", Repository({"tiny.gguf": b""}), "no config.json and no model.safetensors"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_said(find, name, repository, expected):
    with serve({"org/tiny": repository}) as server:
        said, pinned = find(name, endpoint=server.endpoint)
    assert pinned is None
    assert expected in said
    assert said.startswith(f"{name.partition('@')[0]}")


def test_no_network_is_said_in_time(find):
    said, _ = find("org/tiny")
    assert find.seconds < 5
    assert said.startswith("org/tiny: no such directory here, and the hub's cache (")
    assert "http://127.0.0.1:9 does not give it (ConnectError" in said
    assert "run `hf download org/tiny` where there is one, and give the directory" in said
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers
        said, _ = find(f"org/tiny@{COMMIT}", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "TimeoutError: no answer in 2.5 s; HF_HUB_ETAG_TIMEOUT sets how many to wait" in said
    assert find.seconds < 5
    said, _ = find("org/tiny", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or give a directory" in said


def test_a_directory_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/tiny", "org/tiny@main"):
        (tmp_path / name).mkdir(parents=True)
        found = hub.find(name)
        assert (found.directory, found.pinned) == (Path(name), name)
    (tmp_path / "config.json").write_text("{}")
    assert hub.find("config.json").directory == Path("config.json")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("models/smolm", (f"models/smolm{MISSED}", "did you mean 'smollm'?",
                          "; the hub's model of that name is models/smolm@main;")),
        ("{}/models/smolm", (f"/models/smolm{MISSED}", "revision; did you mean 'smollm'?")),
        ("smollm", (f"smollm{MISSED}",)),
        ("a/b/c", (f"a/b/c{MISSED}",)),
        ("~/models", (f"~/models{MISSED}",)),
        ("hf://org/tiny", ("hf://org/tiny: a model on the hub is given by its name",)),
        ("gs://bucket/tiny", ("gs://bucket/tiny: no URL is taken here; copy it",)),
    ],
)  # fmt: skip
def test_a_slip_of_the_pen_is_not_asked_of_the_hub(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "smollm").mkdir(parents=True)
    monkeypatch.setattr(hub, "_snapshot", None)
    with pytest.raises(JloraError) as caught:
        hub.find(name.format(tmp_path))
    for part in expected:
        assert part in str(caught.value)


def test_names_and_revisions():
    assert hub.same_name("org/a@v1", Path("org/a"))
    assert not hub.same_name("org/a", "org/b")
    assert not hub.same_name("/models/a", "/models/a")
    assert hub.revision_of("org/a@refs/pr/1") == "refs/pr/1"
    assert hub.revision_of("org/a") is None
