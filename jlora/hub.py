"""Models by name: a directory here, or a model of the Hugging Face hub in the hub's own cache.

The token is that of `hf auth login` or HF_TOKEN; HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT count.
"""

import dataclasses
import json
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any

from jlora.errors import JloraError, nearest
from jlora.places import local

_NAME = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]*\w)(@(?P<revision>[^@]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 2.5  # seconds until the hub counts as out of reach, where HF_HUB_ETAG_TIMEOUT is not set

_INDEX = "model.safetensors.index.json"
# What a model mostly has: where its commit is here and these are, the hub has nothing to add.
_USUAL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
# What is downloaded: no weights in other forms, and nothing in other directories.
_WEIGHTS = ["model.safetensors", "model-*.safetensors", _INDEX]
_BESIDE = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
]  # fmt: skip

_log = logging.getLogger("jlora")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose files are here."""

    directory: Path
    """Holds config.json, tokenizer and weights."""
    name: str
    """On the hub, "org/name"; otherwise the directory as it was given."""
    commit: str | None = None
    """Hash of the commit in the hub's repository."""

    @property
    def pinned(self) -> str:
        """The name with the commit: what always means the same files."""
        return self.name if self.commit is None else f"{self.name}@{self.commit}"


def find(model: str | Path, *, weights: bool = True) -> Model:
    """Return the model that `model` names, downloaded first where it is the hub's and not here.

    Args:
        model: a directory; or "org/name" or "org/name@revision" of the hub, where no directory has
            that name. A revision is a branch, a tag or a commit. A file is returned as it is.
        weights: whether the weights are needed too.

    Raises:
        JloraError: no such directory, and no hub name, or a model that the hub does not give and
            its cache does not hold whole.
    """
    path = local(model)
    if path.exists():
        return Model(path, str(model))
    found = _NAME.fullmatch(str(model))
    slip = path.parent != Path() and path.parent.is_dir()
    if found is None or (slip and found["revision"] is None):
        raise JloraError(_absent(path, slip, found and found["name"]))
    directory = _snapshot(found["name"], found["revision"], weights)
    _log.info("model %s at commit %s, in %s", found["name"], directory.name, directory)
    return Model(directory, found["name"], directory.name)


def same_name(one: str | Path, other: str | Path) -> bool:
    """Say whether two names are of one model of the hub, whatever their revisions."""
    found = [_NAME.fullmatch(str(name)) for name in (one, other)]
    return all(found) and len({match["name"] for match in found if match}) == 1


def revision_of(model: str | Path) -> str | None:
    """Return the revision in a hub name, None where there is none."""
    found = _NAME.fullmatch(str(model))
    return found["revision"] if found else None


def _absent(path: Path, slip: bool, name: str | None) -> str:
    """Return the message for a name that is no directory here and is not asked of the hub."""
    text = (
        f"{path}/config.json does not exist; --model takes a Hugging Face model directory (jlora "
        "fetch and jlora convert write one), or a name on the hub: org/name, or org/name@revision"
    )
    if not slip:
        return text
    if name is not None:
        text += f"; the hub's model of that name is {name}@main"
    return text + nearest(path.name, [entry.name for entry in path.parent.iterdir()])


def _snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """Return the directory of one commit in the hub's cache, whole.

    A commit that the cache holds, tokenizer and all, is not asked about; where the hub cannot be
    reached, what the cache holds is used, with a word.
    """
    import huggingface_hub as hf

    wanted: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": _BESIDE + (_WEIGHTS if weights else []),
    }

    def cached() -> Path | None:
        try:
            directory = Path(hf.snapshot_download(**wanted, local_files_only=True))
        except hf.errors.LocalEntryNotFoundError:
            return None
        return None if _lacks(directory, weights) else directory

    pinned = cached() if revision and _COMMIT.fullmatch(revision) else None
    if pinned and all((pinned / file).is_file() for file in _USUAL):
        return pinned
    try:
        _demand_answer(name, revision)
        directory = Path(hf.snapshot_download(**wanted))
    except Exception as error:  # of many libraries; each has its cause in the message
        if here := cached():
            _log.warning("%s: %s; what its cache holds is used", name, _cause(error))
            return here
        raise JloraError(_refusal(name, revision, weights, error)) from error
    if lacks := _lacks(directory, weights):
        raise JloraError(
            f"{name} on the hub (commit {directory.name}) has no {' and no '.join(lacks)}: it is "
            "no model in transformers' format with safetensors weights; pickled ones (.bin) are "
            "not read, and a GGUF file is for `jlora convert`"
        )
    return directory


def _demand_answer(name: str, revision: str | None) -> None:
    """Ask the hub for a model, and wait for so long alone as tells that it can be reached.

    Where there is no network, downloading would wait for ever, or try again and again, and so may
    looking up the hub's address: hence a thread.

    Raises:
        TimeoutError: no answer came.
        Exception: whatever the hub's client raises.
    """
    import huggingface_hub as hf

    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _TIMEOUT)
    failed: list[Exception | None] = []

    def ask() -> None:
        try:
            hf.HfApi().model_info(name, revision=revision, timeout=limit)
            failed.append(None)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit)
    if not failed:
        raise TimeoutError(f"no answer in {limit:g} s; HF_HUB_ETAG_TIMEOUT sets how many to wait")
    if failed[0] is not None:
        raise failed[0]


def _lacks(directory: Path, weights: bool) -> list[str]:
    """Return the files that a model must have and `directory` has not."""
    needed = {"config.json"}
    if weights and not (directory / "model.safetensors").is_file():
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            needed |= set(index["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            needed.add("model.safetensors")
    return sorted(file for file in needed if not (directory / file).is_file())


def _refusal(name: str, revision: str | None, weights: bool, error: Exception) -> str:
    """Return what went wrong at the hub, and what to do."""
    from huggingface_hub import constants, errors

    hub, login = constants.ENDPOINT, "log in by `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"the hub gives it to those who accepted its terms: do so on {hub}/{name}, and {login}"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"the hub ({hub}) has no model of that name for you: check the name; where the model "
            f"is private, {login}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = (
            f"the hub's model has no revision {revision!r}: give a branch, a tag or a whole commit "
            f"that {hub}/{name} lists"
        )
    else:
        part = "all of it" if weights else "its config.json"
        text = f"the hub's cache ({constants.HF_HUB_CACHE}) does not hold {part}; "
        if isinstance(error, errors.OfflineModeIsEnabled):
            text += "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or give a directory"
        else:
            text += (
                f"{hub} does not give it ({_cause(error)}). Check the network; or run `hf download "
                f"{name}` where there is one, and give the directory"
            )
    return f"{name}: no such directory here, and {text}"


def _cause(error: Exception) -> str:
    """Return one line about an error: its type, and what it says first."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}{said and ': '}{said[:200]}"
